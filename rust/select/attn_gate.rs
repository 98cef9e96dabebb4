//! attn_gate: a learned gate scores pooled queries against pooled keys (SeerAttention, arXiv 2410.13276).
//!
//! The gate reads q and k as they were *before* the rotary embedding; the batch holds rotated ones, so they are
//! rotated back (exact up to the rounding of the cache's dtype). Per block and KV head, max, min and mean of the keys
//! are projected; per span (one block of queries) and query head, the mean query is taken, through a projection where
//! the gate has one. Both are rotated by the position of their first token. A score is the softmax, over the blocks
//! that the span's last token sees, of `q . k / sqrt(gate_dim)`; the published rule keeps what exceeds a threshold
//! (strictly; `Keep::Threshold` keeps equality too).
//!
//! Spans start where the chunk does. Where that is no block edge, keys stay cut at multiples of the block size and
//! queries from the chunk's start, so the past is scored all the same. The block that holds the span's last token is
//! pooled over the tokens up to it: no later token has a say.
//!
//! Without a gate the scores are NaN, which `keep` reads as "must be kept": callers check `needs_gate` first.

use std::ops::Range;

use super::gate_weights::{GateLayer, Projection};
use super::{Input, Unit, max_or_nan};
use crate::math::{Mat, exp2_in_place, gemm};
use crate::parallel::Parallel;
use crate::plan::Span;

/// The gate's vectors of every whole block of the requests that are not dense.
///
/// Made once per call and shared by all its spans. `blocks * key heads * gate_dim` f32 a request: for Llama-3.1-8B
/// 16 KB per 64 tokens.
#[derive(Debug)]
pub(super) struct GateKeys {
    /// Per request `[blocks, key heads, gate_dim]`; empty if dense.
    of_req: Vec<Vec<f32>>,
}

impl GateKeys {
    /// Pools and projects every whole block; reads each key once.
    pub(super) fn new(input: &Input, parallel: Parallel) -> Self {
        let (layout, batch) = (input.layout, input.batch);
        let mut of_req = vec![Vec::new(); batch.num_reqs()];
        let Some(gate) = input.gate else { return Self { of_req } };
        let row = gate.k.heads * gate.k.gate_dim;
        for span in layout.select_spans(batch).iter().filter(|span| !span.dense) {
            of_req[span.req].resize(layout.geometry.past_blocks(batch.kv_len(span.req)) * row, 0.0);
        }
        let tiles = of_req.iter_mut().enumerate().flat_map(|(req, keys)| {
            keys.chunks_mut(TILE_BLOCKS * row).enumerate().map(move |(i, out)| {
                let first = i * TILE_BLOCKS;
                (Blocks { req, range: first..first + out.len() / row, end: batch.kv_len(req) }, out)
            })
        });
        parallel.for_each(tiles, |(blocks, out)| {
            project_keys(input, gate, &blocks, 0..layout.shape.num_kv_heads, out);
        });
        Self { of_req }
    }
}

/// Blocks `range` of one request, pooled over tokens below `end`.
#[derive(Clone, Debug)]
struct Blocks {
    req: usize,
    range: Range<usize>,
    end: usize,
}

/// Scores the unit's past blocks.
pub(super) fn score(input: &Input, keys: &GateKeys, unit: &mut Unit) {
    let Some(gate) = input.gate else { return unit.fill(f32::NAN) };
    let shape = &input.layout.shape;
    let (gate_dim, span) = (gate.k.gate_dim, unit.span);
    let key_heads = gate.k.heads / shape.num_kv_heads;
    let block_size = input.layout.geometry.block_size;
    let whole = span.kv_end / block_size;
    let keys = &keys.of_req[span.req][..whole * gate.k.heads * gate_dim];

    // The block of the span's last token, if cut short by it.
    let cut = usize::from(!span.kv_end.is_multiple_of(block_size));
    let mut edge = vec![0.0; cut * key_heads * gate_dim];
    let edge_block = Blocks { req: span.req, range: whole..whole + cut, end: span.kv_end };
    project_keys(input, gate, &edge_block, unit.kv_head..unit.kv_head + 1, &mut edge);

    let queries = project_queries(input, gate, &span, unit.kv_head);
    let scale = std::f32::consts::LOG2_E / (gate_dim as f32).sqrt();
    let mut logits = Vec::with_capacity(whole + cut);
    for (head, query) in queries.chunks_exact(gate_dim).enumerate() {
        let key_head = if key_heads == 1 { 0 } else { head };
        let in_whole = keys.chunks_exact(gate_dim).skip(unit.kv_head * key_heads + key_head);
        let in_edge = edge.chunks_exact(gate_dim).skip(key_head);
        let blocks = in_whole.step_by(gate.k.heads).chain(in_edge.step_by(key_heads));
        logits.clear();
        logits.extend(blocks.map(|key| scale * query.iter().zip(key).map(|(q, k)| q * k).sum::<f32>()));
        softmax(&mut logits);
        unit.scores[head * unit.stride..][..unit.past_blocks].copy_from_slice(&logits[..unit.past_blocks]);
    }
    if gate.by_group {
        unit.share_first_row();
    }
}

/// Softmax of base-2 logits, in place.
fn softmax(row: &mut [f32]) {
    let most = row.iter().copied().fold(f32::NEG_INFINITY, max_or_nan);
    row.iter_mut().for_each(|x| *x -= most);
    exp2_in_place(row);
    let total: f32 = row.iter().sum();
    row.iter_mut().for_each(|x| *x = (*x / total).clamp(0.0, 1.0));
}

/// Gate vectors of `blocks` for the key heads of `kv_heads`: `out [blocks, key heads of kv_heads, gate_dim]`.
fn project_keys(input: &Input, gate: &GateLayer, blocks: &Blocks, kv_heads: Range<usize>, out: &mut [f32]) {
    let shape = &input.layout.shape;
    let (features, gate_dim) = (3 * shape.head_dim, gate.k.gate_dim);
    let (count, per_kv_head) = (blocks.range.len(), gate.k.heads / shape.num_kv_heads);
    let row = kv_heads.len() * per_kv_head * gate_dim;
    if count == 0 {
        return;
    }
    // [KV heads, blocks, features]
    let mut pooled = vec![0.0; kv_heads.len() * count * features];
    for (i, block) in blocks.range.clone().enumerate() {
        let tokens = block_tokens(input, block, blocks.end);
        let turns: Vec<_> = tokens.clone().flat_map(|t| gate.rope.turns(t)).collect();
        let mut keys = vec![0.0; tokens.len() * shape.head_dim];
        for (h, kv_head) in kv_heads.clone().enumerate() {
            input.batch.load_k(blocks.req, kv_head, tokens.clone(), &mut keys);
            unrotate_rows(gate, &turns, &mut keys);
            pool_keys(&keys, &mut pooled[(h * count + i) * features..][..features]);
        }
    }
    for (h, kv_head) in kv_heads.enumerate() {
        let pooled = Mat::new(&pooled[h * count * features..], features);
        for head in 0..per_kv_head {
            let weights = Mat::new(gate.k.head(kv_head * per_kv_head + head), gate_dim);
            let out = &mut out[(h * per_kv_head + head) * gate_dim..];
            gemm(pooled, weights, out, row, [count, gate_dim, features]);
        }
    }
    for (block, row) in blocks.range.clone().zip(out.chunks_exact_mut(row)) {
        let position = block_tokens(input, block, blocks.end).start;
        row.chunks_exact_mut(gate_dim).for_each(|key| gate.rope.rotate_gate(position, key));
    }
}

/// Tokens of `block` below `end`.
fn block_tokens(input: &Input, block: usize, end: usize) -> Range<usize> {
    let size = input.layout.geometry.block_size;
    block * size..((block + 1) * size).min(end)
}

/// Elementwise max, min and mean, one after the other, of `keys [tokens, head_dim]`.
fn pool_keys(keys: &[f32], into: &mut [f32]) {
    let head_dim = into.len() / 3;
    let tokens = (keys.len() / head_dim) as f32;
    let (most, rest) = into.split_at_mut(head_dim);
    let (least, mean) = rest.split_at_mut(head_dim);
    most.fill(f32::NEG_INFINITY);
    least.fill(f32::INFINITY);
    for key in keys.chunks_exact(head_dim) {
        for (x, &value) in key.iter().enumerate() {
            most[x] = most[x].max(value);
            least[x] = least[x].min(value);
            mean[x] += value / tokens;
        }
    }
}

/// Gate vectors of the span's queries: `[group_size, gate_dim]`, or `[1, gate_dim]` if the gate is group-aware.
fn project_queries(input: &Input, gate: &GateLayer, span: &Span, kv_head: usize) -> Vec<f32> {
    let shape = &input.layout.shape;
    let (group, head_dim) = (shape.group_size(), shape.head_dim);
    let first = span.visible(0) - 1;
    let turns: Vec<_> = (first..first + span.len).flat_map(|t| gate.rope.turns(t)).collect();
    let mut means = vec![0.0; group * head_dim];
    let mut queries = vec![0.0; span.len * head_dim];
    for (g, mean) in means.chunks_exact_mut(head_dim).enumerate() {
        for (i, query) in queries.chunks_exact_mut(head_dim).enumerate() {
            input.batch.q().load(span.q_start + i, kv_head * group + g, query);
        }
        unrotate_rows(gate, &turns, &mut queries);
        for query in queries.chunks_exact(head_dim) {
            mean.iter_mut().zip(query).for_each(|(m, x)| *m += x / span.len as f32);
        }
    }
    let mut projected = match &gate.q {
        None => means,
        Some(q) if gate.by_group => project(q, kv_head, &means),
        Some(q) => {
            let by_head = means.chunks_exact(head_dim).enumerate();
            by_head.flat_map(|(g, mean)| project(q, kv_head * group + g, mean)).collect()
        }
    };
    projected.chunks_exact_mut(gate.k.gate_dim).for_each(|query| gate.rope.rotate_gate(first, query));
    projected
}

fn project(weights: &Projection, head: usize, x: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; weights.gate_dim];
    let (a, b) = (Mat::new(x, weights.inputs), Mat::new(weights.head(head), weights.gate_dim));
    gemm(a, b, &mut out, weights.gate_dim, [1, weights.gate_dim, weights.inputs]);
    out
}

/// Rotates each row of `rows [tokens, head_dim]` back; `turns [tokens, head_dim / 2]`.
fn unrotate_rows(gate: &GateLayer, turns: &[[f32; 2]], rows: &mut [f32]) {
    let pairs = gate.rope.inv_freq.len();
    for (row, turns) in rows.chunks_exact_mut(2 * pairs).zip(turns.chunks_exact(pairs)) {
        gate.rope.unrotate(turns, row);
    }
}

/// Blocks projected together: enough rows to reuse a head's weights from cache.
const TILE_BLOCKS: usize = 16;

#[cfg(test)]
mod tests {
    use super::super::gate_weights::tests::{Form, gate};
    use super::*;
    use crate::fixture::{Paged, Request, shape};
    use crate::plan::Layout;
    use crate::select::Gate;
    use crate::select::scored::{
        assert_equals, assert_later_keys_do_not_matter, assert_laws, k, q, score as scores, settings, softmax,
    };
    use crate::settings::{Selector, Settings};
    use crate::types::{Dtype, Shape};

    /// Turns pairs `(i, i + dim / 2)` by `sign * position * freq[i]`, the angle rounded to f32, and scales.
    fn turned(x: &[f64], freq: &[f32], position: usize, (sign, scale): (f64, f64)) -> Vec<f64> {
        let half = x.len() / 2;
        let angle = |i: usize| f64::from(position as f32 * freq[i]) * sign;
        let low = (0..half).map(|i| x[i] * angle(i).cos() - x[i + half] * angle(i).sin());
        let high = (0..half).map(|i| x[i + half] * angle(i).cos() + x[i] * angle(i).sin());
        low.chain(high).map(|v| v * scale).collect()
    }

    fn times(x: &[f64], weights: &Projection, head: usize) -> Vec<f64> {
        let w = weights.head(head);
        let column = |o| x.iter().enumerate().map(|(i, v)| v * f64::from(w[i * weights.gate_dim + o])).sum();
        (0..weights.gate_dim).map(column).collect()
    }

    fn mean(rows: &[Vec<f64>]) -> Vec<f64> {
        (0..rows[0].len()).map(|x| rows.iter().map(|r| r[x]).sum::<f64>() / rows.len() as f64).collect()
    }

    /// The definition, block by block.
    fn formula(gate: &GateLayer, layout: &Layout, r: &Request, span: &Span, head: usize) -> Vec<f64> {
        let (group, size) = (layout.shape.group_size(), layout.geometry.block_size);
        let (kv_head, rope) = (head / group, &gate.rope);
        let gate_freq = rope.gate_inv_freq.as_ref().unwrap_or(&rope.inv_freq);
        let back = (-1.0, 1.0 / f64::from(rope.scale));
        let there = (1.0, f64::from(rope.scale));
        let first = span.past + span.first;
        let mean_query = |head: usize| {
            let plain = |i: usize| {
                let query: Vec<f64> = q(layout, r, span.first + i, head).collect();
                turned(&query, &rope.inv_freq, first + i, back)
            };
            mean(&(0..span.len).map(plain).collect::<Vec<_>>())
        };
        let query = match &gate.q {
            None => mean_query(head),
            Some(w) if w.heads == layout.shape.num_q_heads => times(&mean_query(head), w, head),
            Some(w) => {
                let group: Vec<f64> = (kv_head * group..(kv_head + 1) * group).flat_map(mean_query).collect();
                times(&group, w, kv_head)
            }
        };
        let query = turned(&query, gate_freq, first, there);
        let last = first + span.len - 1;
        let logit = |j: usize| {
            let tokens = j * size..((j + 1) * size).min(last + 1);
            let plain = |t: usize| {
                let key: Vec<f64> = k(layout, r, t, kv_head).collect();
                turned(&key, &rope.inv_freq, t, back)
            };
            let keys: Vec<Vec<f64>> = tokens.map(plain).collect();
            let fold = |f: fn(f64, f64) -> f64| -> Vec<f64> {
                (0..keys[0].len()).map(|x| keys.iter().map(|k| k[x]).reduce(f).unwrap()).collect()
            };
            let features = [fold(f64::max), fold(f64::min), mean(&keys)].concat();
            let key_head = if gate.k.heads == layout.shape.num_q_heads { head } else { kv_head };
            let key = turned(&times(&features, &gate.k, key_head), gate_freq, j * size, there);
            query.iter().zip(&key).map(|(a, b)| a * b).sum::<f64>() / (gate.k.gate_dim as f64).sqrt()
        };
        let mut probabilities = softmax(&(0..=last / size).map(logit).collect::<Vec<_>>());
        probabilities.truncate(span.past / size);
        probabilities
    }

    /// Chunks at and off the edges of pages and blocks; the last span ragged.
    fn paged(shape: Shape) -> Paged {
        Paged::random(5, shape, &[(150, 450), (128, 512), (37, 1301), (5, 100), (1, 257)])
    }

    fn model() -> Shape {
        shape(2, 3, 64, 16, Dtype::Bf16)
    }

    fn attn_gate() -> Settings {
        settings(Selector::AttnGate)
    }

    fn layer(gate: &Gate) -> Option<&GateLayer> {
        gate.layer(0)
    }

    #[test]
    fn scores_are_the_gates_softmax_in_every_published_form() {
        for (form, gate_dim) in [(Form::KeysOnly, 64), (Form::Both, 64), (Form::ByGroup, 32)] {
            let gate = gate("softmax", &model(), form, gate_dim);
            let layer = layer(&gate);
            // A feature or gate element errs by at most n * eps / 2 of the sum of its terms' magnitudes, n = 3 *
            // head_dim + block_size; a logit's terms sum to less than 32 here (|query| < 2, |key| < 100 over 8);
            // a probability errs by twice its logit's error, relatively.
            let tolerance = 2.0 * 256.0 * 0.5 * f64::from(f32::EPSILON) * 32.0;
            let want =
                |l: &Layout, r: &Request, s: &Span, head: usize| formula(layer.unwrap(), l, r, s, head);
            assert_equals(&paged(model()), attn_gate(), layer, tolerance, want);
        }
    }

    #[test]
    fn scores_ignore_pages_neighbours_and_dirty_slots() {
        let gate = gate("laws", &model(), Form::KeysOnly, 64);
        assert_laws(&paged(model()), attn_gate(), layer(&gate));
    }

    #[test]
    fn keys_after_a_span_do_not_matter_to_it() {
        let gate = gate("later", &model(), Form::Both, 64);
        let paged = Paged::random(9, model(), &[(150, 450)]);
        // Spans of 64 from 300 on: the first ends at 364, within block 320..384.
        let later = (364, |span: &Span| span.kv_end <= 364);
        assert!(assert_later_keys_do_not_matter(&paged, attn_gate(), layer(&gate), later) > 0);
    }

    #[test]
    fn blocks_beside_a_nan_key_cannot_be_judged() {
        let gate = gate("nan", &model(), Form::KeysOnly, 64);
        let mut paged = Paged::random(9, model(), &[(64, 640), (64, 640)]);
        paged.requests[0].k[100 * 2 * 64] = f32::NAN;
        let paged = paged.repaged(3);
        let (layout, found) = scores(&paged, attn_gate(), layer(&gate));
        // KV head 0 serves query heads 0..3 of request 0's only span.
        let row = |head: usize| &found[head * layout.max_blocks()..][..9];
        assert!((0..3).all(|head| row(head).iter().all(|x| x.is_nan())), "{:?}", row(0));
        assert!((3..12).all(|head| row(head).iter().all(|x| x.is_finite())));
    }

    #[test]
    fn an_unaligned_chunk_keeps_the_whole_past_in_view() {
        let gate = gate("unaligned", &model(), Form::KeysOnly, 64);
        let paged = Paged::random(9, model(), &[(64, 64 * 9 + 33)]);
        let (_, found) = scores(&paged, attn_gate(), layer(&gate));
        // 545 past tokens: 8 whole blocks, and all of them have a probability.
        assert!(found[..8].iter().all(|&x| x > 0.0));
        assert!(found[..8].iter().sum::<f32>() > 0.1);
    }

    #[test]
    fn without_a_gate_nothing_is_dropped() {
        let (layout, found) = scores(&paged(model()), attn_gate(), None);
        let mut row = vec![0; layout.mask_words()];
        super::super::keep::keep(&layout.settings, &found[..4], &mut row);
        assert_eq!(crate::mask::count(&row, 4), 4);
    }
}
