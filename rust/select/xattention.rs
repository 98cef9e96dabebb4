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
