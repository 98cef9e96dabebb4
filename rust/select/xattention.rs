//! xattention: block mass estimated from antidiagonal samples (XAttention, arXiv 2503.16428).
//!
//! Queries of the span and keys are cut into groups of `S = xattention_stride` tokens. The logit of query group `u`
//! and key group `v` is the mean logit along one antidiagonal, `sm_scale / S * sum_t q[uS + S - 1 - t] . k[vS + t]`;
//! a softmax over the visible key groups of each query group gives each key group's mass; a block's mass is the sum
//! over its groups, averaged over the span's rows. So a score is the block's share of the span's attention over *all*
//! visible blocks, and what a row of scores lacks to 1 is held by the open region: [`Keep::Mass`] counts it as kept
//! (see `select/keep.rs`), as the paper counts its always-kept blocks.
//!
//! Three things follow from spans that are no multiple of S or start anywhere; none of them changes whole groups:
//! - a query group of `r < S` rows meets the keys in turn, row `r - 1 - t % r` with key `t`, and weighs `r / S`;
//! - a query group sees the keys up to its own last row, so its last key group may be cut short to `m < S` tokens;
//!   the logit is then the mean over those, and the group weighs `m / S` in the softmax;
//! - nothing is padded, so no padding votes.
//!
//! [`Keep::Mass`]: crate::settings::Keep::Mass

use super::{Input, Unit, max_or_nan};
use crate::math::{Mat, exp2_in_place, gemm};
use crate::plan::Span;

/// Scores the unit's past blocks. Reads each visible key once: `2 * span * kv_len * head_dim / S` FLOP a head.
pub(super) fn score(input: &Input, unit: &mut Unit) {
    let samples = Samples::of(input, unit);
    let mut logits = vec![0.0; samples.columns * samples.width];
    samples.whole_groups(input, unit, &mut logits);
    samples.cut_groups(input, unit, &mut logits);

    let groups_per_block = input.layout.geometry.block_size / samples.stride;
    for (head, logits) in logits.chunks_exact_mut(samples.groups * samples.width).enumerate() {
        let scores = &mut unit.scores[head * unit.stride..][..unit.past_blocks];
        scores.fill(0.0);
        for (u, row) in logits.chunks_exact_mut(samples.width).enumerate() {
            let edge = Edge::of(&unit.span, u, samples.stride);
            let row = &mut row[..edge.whole + usize::from(edge.cut > 0)];
            let total = to_masses(row, edge.cut as f32 / samples.stride as f32);
            let weight = edge.rows as f32 / unit.span.len as f32 / total;
            for (score, masses) in scores.iter_mut().zip(row.chunks_exact(groups_per_block)) {
                *score += masses.iter().sum::<f32>() * weight;
            }
        }
        // Rounding may carry a sum past 1.
        scores.iter_mut().for_each(|score| *score = score.clamp(0.0, 1.0));
    }
}

/// Turns base-2 logits into masses relative to the row's best group; returns their sum.
///
/// The last group counts for `last_share` of a whole one, unless that is 0: then it is whole itself.
fn to_masses(row: &mut [f32], last_share: f32) -> f32 {
    let most = row.iter().copied().fold(f32::NEG_INFINITY, max_or_nan);
    row.iter_mut().for_each(|x| *x -= most);
    exp2_in_place(row);
    if let (Some(last), true) = (row.last_mut(), last_share > 0.0) {
        *last *= last_share;
    }
    row.iter().sum()
}

/// What one query group holds and sees.
#[derive(Clone, Copy, Debug)]
struct Edge {
    /// Query rows; fewer than S in a span's last group only.
    rows: usize,
    /// Whole key groups seen.
    whole: usize,
    /// Tokens seen of the next key group.
    cut: usize,
}

impl Edge {
    fn of(span: &Span, u: usize, stride: usize) -> Self {
        let end = ((u + 1) * stride).min(span.len);
        let visible = span.visible(end - 1);
        Self { rows: end - u * stride, whole: visible / stride, cut: visible % stride }
    }
}

/// The span's queries, folded so that one matrix product sums along the antidiagonals.
struct Samples {
    /// `[S * head_dim, columns]`: column `head * groups + u` holds group u's rows in the order the keys meet them.
    folded: Vec<f32>,
    /// Heads of the KV group times query groups.
    columns: usize,
    /// Query groups of the span.
    groups: usize,
    /// Key groups that the span's last row sees, whole or cut: the stride of a row of logits.
    width: usize,
    /// S.
    stride: usize,
    /// From a dot product to a base-2 logit.
    scale: f32,
}

impl Samples {
    fn of(input: &Input, unit: &Unit) -> Self {
        let (shape, stride) = (&input.layout.shape, input.layout.settings.xattention_stride);
        let (group, head_dim, span) = (shape.group_size(), shape.head_dim, &unit.span);
        let groups = span.len.div_ceil(stride);
        let columns = group * groups;
        let mut folded = vec![0.0; stride * head_dim * columns];
        let mut query = vec![0.0; head_dim];
        for column in 0..columns {
            let (head, u) = (unit.kv_head * group + column / groups, column % groups);
            let rows = Edge::of(span, u, stride).rows;
            for t in 0..stride {
                let row = u * stride + (rows - 1 - t % rows);
                input.batch.q().load(span.q_start + row, head, &mut query);
                for (x, &value) in query.iter().enumerate() {
                    folded[(t * head_dim + x) * columns + column] = value;
                }
            }
        }
        let scale = shape.sm_scale * std::f32::consts::LOG2_E;
        Self { folded, columns, groups, width: span.kv_end.div_ceil(stride), stride, scale }
    }

    /// Logits `[columns, width]` of every whole key group, those that a query group must not see among them.
    fn whole_groups(&self, input: &Input, unit: &Unit, logits: &mut [f32]) {
        let depth = self.stride * input.layout.shape.head_dim;
        let whole = unit.span.kv_end / self.stride;
        let mut keys = vec![0.0; TILE_GROUPS * depth];
        let mut dots = vec![0.0; TILE_GROUPS * self.columns];
        for first in (0..whole).step_by(TILE_GROUPS) {
            let tile = TILE_GROUPS.min(whole - first);
            let tokens = first * self.stride..(first + tile) * self.stride;
            input.batch.load_k(unit.span.req, unit.kv_head, tokens, &mut keys[..tile * depth]);
            let dots = &mut dots[..tile * self.columns];
            dots.fill(0.0);
            let (a, b) = (Mat::new(&keys, depth), Mat::new(&self.folded, self.columns));
            gemm(a, b, dots, self.columns, [tile, self.columns, depth]);
            for (i, row) in dots.chunks_exact(self.columns).enumerate() {
                for (column, &dot) in row.iter().enumerate() {
                    logits[column * self.width + first + i] = dot * self.scale / self.stride as f32;
                }
            }
        }
    }

    /// Logits of the key groups that a query group sees in part.
    fn cut_groups(&self, input: &Input, unit: &Unit, logits: &mut [f32]) {
        let head_dim = input.layout.shape.head_dim;
        let mut keys = vec![0.0; self.stride * head_dim];
        for u in 0..self.groups {
            let edge = Edge::of(&unit.span, u, self.stride);
            if edge.cut == 0 {
                continue;
            }
            let keys = &mut keys[..edge.cut * head_dim];
            let first = edge.whole * self.stride;
            input.batch.load_k(unit.span.req, unit.kv_head, first..first + edge.cut, keys);
            for column in (u..self.columns).step_by(self.groups) {
                let queries = self.folded[column..].iter().step_by(self.columns);
                let dot: f32 = keys.iter().zip(queries).map(|(k, q)| k * q).sum();
                logits[column * self.width + edge.whole] = dot * self.scale / edge.cut as f32;
            }
        }
    }
}

/// Key groups per matrix product: 1024 keys at S = 16.
const TILE_GROUPS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Paged, Request, shape};
    use crate::mask;
    use crate::plan::Layout;
    use crate::select::keep::keep;
    use crate::select::scored::{
        assert_equals, assert_later_keys_do_not_matter, assert_laws, k, q, score, settings,
    };
    use crate::settings::{Keep, Scope, Selector, Settings};
    use crate::types::Dtype;

    /// The definition, a pair of tokens at a time.
    fn formula(layout: &Layout, r: &Request, span: &Span, head: usize) -> Vec<f64> {
        let stride = layout.settings.xattention_stride;
        let kv_head = head / layout.shape.group_size();
        let mut scores = vec![0.0; layout.geometry.past_blocks(span.past)];
        for first in (0..span.len).step_by(stride) {
            let rows = stride.min(span.len - first);
            // Absolute position of the group's last row.
            let last = span.past + span.first + first + rows - 1;
            let masses: Vec<f64> = (0..=last / stride)
                .map(|v| {
                    let tokens = stride.min(last + 1 - v * stride);
                    let sum: f64 = (0..tokens)
                        .map(|t| {
                            let row = span.first + first + rows - 1 - t % rows;
                            let key = k(layout, r, v * stride + t, kv_head);
                            q(layout, r, row, head).zip(key).map(|(a, b)| a * b).sum::<f64>()
                        })
                        .sum();
                    let logit = sum * f64::from(layout.shape.sm_scale) / tokens as f64;
                    logit.exp() * tokens as f64 / stride as f64
                })
                .collect();
            let total: f64 = masses.iter().sum();
            for (v, mass) in masses.iter().enumerate() {
                if let Some(score) = scores.get_mut(v * stride / layout.geometry.block_size) {
                    *score += mass / total * rows as f64 / span.len as f64;
                }
            }
        }
        scores
    }

    /// Chunks at and off every edge: of pages, strides, blocks; the last span ragged.
    fn paged() -> Paged {
        let lens = [(150, 406), (128, 512), (37, 301), (5, 100), (1, 257)];
        Paged::random(5, shape(2, 3, 64, 16, Dtype::Bf16), &lens)
    }

    fn small_blocks() -> Settings {
        Settings { block_size: 64, ..settings(Selector::XAttention) }
    }

    #[test]
    fn scores_are_shares_of_antidiagonal_mass() {
        for stride in [8, 16, 64] {
            let settings = Settings { xattention_stride: stride, ..small_blocks() };
            // A logit sums n = S * head_dim products one by one: its error is below n * eps / 2 of the sum of
            // magnitudes, itself below sm_scale * |q| * |k| < 2 * sqrt(head_dim) after division by S (|x|^2 of a
            // normal vector stays below 2 * head_dim). A mass errs by that much of itself, its total by as much.
            let tolerance = 2.0 * (stride * 64) as f64 * f64::from(f32::EPSILON) / 2.0 * 2.0 * 8.0;
            assert_equals(&paged(), settings, None, tolerance, formula);
        }
    }

    #[test]
    fn spans_shorter_than_a_block_score_their_own_rows() {
        let scope = Scope { query_span: 128, heads_per_list: 1 };
        let settings = Settings { block_size: 256, scope, ..settings(Selector::XAttention) };
        let paged = Paged::random(6, shape(1, 2, 64, 64, Dtype::F32), &[(200, 900)]);
        assert_equals(&paged, settings, None, 1e-3, formula);
    }

    #[test]
    fn scores_ignore_pages_neighbours_and_dirty_slots() {
        assert_laws(&paged(), small_blocks(), None);
    }

    #[test]
    fn keys_after_a_span_do_not_matter_to_it() {
        // Request 0's chunk covers 256..406 in spans of 64; its second ends at 384.
        let paged = paged();
        let later = (384, |span: &Span| span.kv_end <= 384);
        assert!(assert_later_keys_do_not_matter(&paged, small_blocks(), None, later) > 0);
        let within = (383, |span: &Span| span.kv_end <= 383);
        assert!(assert_later_keys_do_not_matter(&paged, small_blocks(), None, within) > 6);
    }

    #[test]
    fn equal_keys_give_each_block_its_tokens_share_of_the_visible_ones() {
        let shape = shape(1, 1, 64, 16, Dtype::F32);
        let mut request = Request::random(4, &shape, 1, 200);
        request.k.fill(0.5);
        let (_, scores) = score(&Paged::place(1, shape, vec![request]), small_blocks(), None);
        // One row sees 200 tokens. Counting the cut group of 8 as a whole one would give 64 / 208, off by 0.012.
        assert!(scores[..3].iter().all(|x| (x - 64.0 / 200.0).abs() < 1e-3), "{scores:?}");
    }

    #[test]
    fn mass_held_by_the_open_region_counts_as_kept() {
        let settings = Settings { keep: Keep::Mass(0.9), ..settings(Selector::XAttention) };
        let kept = |scores: &[f32]| {
            let mut row = [0];
            keep(&settings, scores, &mut row);
            mask::ones(&row, scores.len()).collect::<Vec<_>>()
        };
        // Open 0.5, block 0 always: 0.55 held; 0.9 of 1 needs 0.25 and 0.12 more.
        assert_eq!(kept(&[0.05, 0.12, 0.25, 0.04, 0.04]), [0, 1, 2]);
        // Open 0.95: nothing but block 0.
        assert_eq!(kept(&[0.01, 0.02, 0.01, 0.005, 0.005]), [0]);
    }
}
