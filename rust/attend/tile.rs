//! One tile of query rows on its way along a stream of keys and values.

use std::ops::Range;

use super::lanes::{self, LANES, Lane, Running, Weigh};
use crate::math::{self, Mat};
use crate::types::Shape;

/// Stream tokens taken at once: their keys and values (16 KiB each at head dimension 64) stay in the L1 cache.
pub(super) const STREAM_TILE: usize = 64;

/// Keys and values of consecutive stream tokens, widened.
#[derive(Debug)]
pub(super) struct KvTile {
    /// `[STREAM_TILE, head_dim]`; rows at and after `len` are leftovers.
    pub(super) k: Vec<f32>,
    /// As `k`.
    pub(super) v: Vec<f32>,
    /// Rows in use.
    pub(super) len: usize,
}

impl KvTile {
    pub(super) fn new(head_dim: usize) -> Self {
        let zeros = vec![0.0; STREAM_TILE * head_dim];
        Self { k: zeros.clone(), v: zeros, len: 0 }
    }
}

/// Query rows that attend to the same stream, and what they have gathered.
#[derive(Debug)]
pub(super) struct QueryTile {
    groups: Vec<Group>,
    /// Scores, then weights, of one group: `[STREAM_TILE, LANES]`.
    scores: Vec<Lane>,
    head_dim: usize,
    sm_scale: f32,
}

/// [`LANES`] rows of a tile, transposed.
#[derive(Debug)]
struct Group {
    /// `[head_dim, LANES]`.
    q: Vec<Lane>,
    /// `[head_dim, LANES]`, not yet divided by the sum.
    out: Vec<Lane>,
    running: Running,
    /// Stream tokens each row sees.
    visible: Lane<usize>,
}

impl QueryTile {
    /// Rows `0..rows`; `load(row, into [head_dim])` reads a query and returns how many stream tokens it sees.
    pub(super) fn new(shape: &Shape, rows: usize, load: impl Fn(usize, &mut [f32]) -> usize) -> Self {
        let head_dim = shape.head_dim;
        let mut row = vec![0.0; head_dim];
        let groups = (0..rows).step_by(LANES).map(|first| {
            let used = LANES.min(rows - first);
            let mut group = Group::empty(head_dim);
            for x in 0..used {
                group.visible[x] = load(first + x, &mut row);
                for (q, &value) in group.q.iter_mut().zip(&row) {
                    q[x] = value;
                }
            }
            // Idle lanes must not narrow what the group's rows have in common.
            let last = group.visible[used - 1];
            group.visible[used..].fill(last);
            group
        });
        let groups = groups.collect();
        Self { groups, scores: vec![[0.0; LANES]; STREAM_TILE], head_dim, sm_scale: shape.sm_scale }
    }

    /// Stream tokens that the keenest row sees.
    pub(super) fn max_visible(&self) -> usize {
        self.groups.iter().map(|group| group.seen().end).max().unwrap_or(0)
    }

    /// Takes in stream tokens `first..first + kv.len`, each row those that it sees.
    pub(super) fn absorb(&mut self, kv: &KvTile, first: usize) {
        let weigh = self.weigh(&[1.0; STREAM_TILE]);
        for group in &mut self.groups {
            group.absorb(kv, first, weigh, &mut self.scores);
        }
    }

    /// Takes in keys and values that every row sees, each standing for `tokens` of its own.
    pub(super) fn absorb_means(&mut self, kv: &KvTile, tokens: &[f32]) {
        let weigh = self.weigh(tokens);
        for group in &mut self.groups {
            group.weigh(kv, kv.len, weigh, (&[u32::MAX; LANES], &mut self.scores));
            group.add_values(kv, kv.len..kv.len, &[u32::MAX; LANES], &self.scores);
        }
    }

    fn weigh<'a>(&self, tokens: &'a [f32]) -> Weigh<'a> {
        Weigh { scale_log2: self.sm_scale * std::f32::consts::LOG2_E, tokens }
    }

    /// Writes `out [rows, head_dim]`, normalised, and `lse [rows]`; 0 and −inf for rows without weight.
    pub(super) fn write(&self, out: &mut [f32], lse: &mut [f32]) {
        for (i, (out, lse)) in out.chunks_exact_mut(self.head_dim).zip(lse).enumerate() {
            let (group, x) = (&self.groups[i / LANES], i % LANES);
            let (max, sum) = (group.running.max[x], group.running.sum[x]);
            if sum == 0.0 {
                out.fill(0.0);
                *lse = f32::NEG_INFINITY;
                continue;
            }
            for (out, row) in out.iter_mut().zip(&group.out) {
                *out = row[x] / sum;
            }
            *lse = max.mul_add(self.sm_scale, sum.ln());
        }
    }
}

impl Group {
    fn empty(head_dim: usize) -> Self {
        Self {
            q: vec![[0.0; LANES]; head_dim],
            out: vec![[0.0; LANES]; head_dim],
            running: Running { max: [f32::NEG_INFINITY; LANES], sum: [0.0; LANES] },
            visible: [0; LANES],
        }
    }

    /// From what all rows see to what any row sees.
    fn seen(&self) -> Range<usize> {
        let (least, most) = (self.visible.iter().min(), self.visible.iter().max());
        least.copied().unwrap_or(0)..most.copied().unwrap_or(0)
    }

    fn absorb(&mut self, kv: &KvTile, first: usize, weigh: Weigh, scores: &mut [Lane]) {
        let within = |seen: usize| seen.saturating_sub(first).min(kv.len);
        let seen = self.seen();
        let (all, any) = (within(seen.start), within(seen.end));
        if any == 0 {
            return;
        }
        let limit = self.visible.map(|seen| u32::try_from(within(seen)).unwrap_or(u32::MAX));
        self.weigh(kv, any, weigh, (&limit, scores));
        self.add_values(kv, all..any, &limit, scores);
    }

    /// Weights of the first `len` keys, into `scores`; rescales what was gathered before.
    fn weigh(&mut self, kv: &KvTile, len: usize, weigh: Weigh, (limit, scores): (&Lane<u32>, &mut [Lane])) {
        let head_dim = self.q.len();
        let scores = &mut scores[..len];
        scores.fill([0.0; LANES]);
        let (k, q) = (Mat::new(&kv.k, head_dim), Mat::new(self.q.as_flattened(), LANES));
        math::gemm(k, q, scores.as_flattened_mut(), LANES, [len, LANES, head_dim]);
        if limit.iter().any(|&limit| (limit as usize) < len) {
            lanes::mask(scores, limit);
        }
        let factor = lanes::softmax(scores, weigh, &mut self.running);
        if factor.iter().any(|&f| f != 1.0) {
            lanes::rescale(&mut self.out, &factor);
        }
    }

    /// Adds weighted values: those before `ragged` to every row, those within it to the rows that see them.
    fn add_values(&mut self, kv: &KvTile, ragged: Range<usize>, limit: &Lane<u32>, weights: &[Lane]) {
        let head_dim = self.q.len();
        let (v, p) = (Mat::new(&kv.v, head_dim), Mat::new(weights.as_flattened(), LANES));
        math::gemm_tn(v, p, self.out.as_flattened_mut(), LANES, [head_dim, LANES, ragged.start]);
        lanes::add_values_below(limit, ragged, (weights, &kv.v), &mut self.out);
    }
}
