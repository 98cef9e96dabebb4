//! Cells: the partial softmax of one query row over one KV block, from which block masses follow.
//!
//! A cell is a pair (`max`, `sum`) that stands for the weight `sum * 2^max`, in logits of base 2. Cells come from the
//! block's keys ([`Cells::read`], exact) or from its mean key ([`Cells::pool`]: `block_size * 2^(q . k_mean)`, which
//! never exceeds the exact weight, by Jensen). Weights divided by a row's total are shares of its attention.

use multiversion::multiversion;

use super::rows::Rows;
use super::{Input, Unit};
use crate::math::{self, Mat};
use crate::summaries::{BlockAt, Summaries};

/// Cells of some rows over the first blocks of their request; those never filled weigh nothing.
pub(super) struct Cells<'a> {
    input: &'a Input<'a>,
    /// Request and KV head.
    at: (usize, usize),
    rows: &'a Rows,
    /// `[blocks, rows]`, base-2 logits.
    max: Vec<f32>,
    /// `[blocks, rows]`.
    sum: Vec<f32>,
}

impl<'a> Cells<'a> {
    /// Empty cells for every block that a row sees.
    pub(super) fn new(input: &'a Input<'a>, unit: &Unit, rows: &'a Rows) -> Self {
        let cells = input.layout.geometry.blocks(rows.kv_end()) * rows.len();
        let at = (unit.span.req, unit.kv_head);
        Self { input, at, rows, max: vec![f32::MIN; cells], sum: vec![0.0; cells] }
    }

    /// Blocks that a row sees, the last perhaps in part.
    pub(super) fn blocks(&self) -> usize {
        self.input.layout.geometry.blocks(self.rows.kv_end())
    }

    /// Fills the cells of `blocks`, whole ones that every row sees, from their mean keys.
    pub(super) fn pool(&mut self, summaries: &Summaries, blocks: std::ops::Range<usize>) {
        let (layout, width) = (self.input.layout, self.rows.len());
        let dim = layout.shape.head_dim;
        let means = mean_keys(self.input, summaries, self.at, blocks.clone());
        let cells = blocks.start * width..blocks.end * width;
        let logits = &mut self.max[cells.clone()];
        logits.fill(0.0);
        let extents = [blocks.len(), width, dim];
        math::gemm(Mat::new(&means, dim), Mat::new(&self.rows.q, width), logits, width, extents);
        self.sum[cells].fill(layout.geometry.block_size as f32);
    }

    /// Fills the cells of `blocks` from their keys, each row as far as it sees.
    pub(super) fn read(&mut self, blocks: &[usize]) {
        let (block_size, dim) = (self.input.layout.geometry.block_size, self.input.layout.shape.head_dim);
        let per_tile = (TILE_TOKENS / block_size).max(1);
        let mut keys = vec![0.0; per_tile * block_size * dim];
        let mut logits = vec![0.0; per_tile * block_size * self.rows.len()];
        for tile in blocks.chunks(per_tile) {
            self.read_tile(tile, &mut keys, &mut logits);
        }
    }

    fn read_tile(&mut self, tile: &[usize], keys: &mut [f32], logits: &mut [f32]) {
        let (layout, width) = (self.input.layout, self.rows.len());
        let dim = layout.shape.head_dim;
        let ranges = || tile.iter().map(|&j| self.tokens(j));
        let mut loaded = 0;
        for range in ranges() {
            let end = loaded + range.len();
            self.input.batch.load_k(self.at.0, self.at.1, range, &mut keys[loaded * dim..end * dim]);
            loaded = end;
        }
        let logits = &mut logits[..loaded * width];
        logits.fill(0.0);
        math::gemm(Mat::new(keys, dim), Mat::new(&self.rows.q, width), logits, width, [loaded, width, dim]);
        let mut rest = logits;
        for &block in tile {
            let range = self.tokens(block);
            let (block_logits, after) = std::mem::take(&mut rest).split_at_mut(range.len() * width);
            hide(self.rows, range, block_logits);
            let cell = block * width..(block + 1) * width;
            fold(block_logits, &mut self.max[cell.clone()], &mut self.sum[cell]);
            rest = after;
        }
    }

    /// KV tokens of a block that some row sees.
    fn tokens(&self, block: usize) -> std::ops::Range<usize> {
        let block_size = self.input.layout.geometry.block_size;
        block * block_size..((block + 1) * block_size).min(self.rows.kv_end())
    }

    /// Adds each past block's share of every row's weight, times `weight`, to the row's head in `unit`.
    pub(super) fn add_mass(mut self, weight: f32, unit: &mut Unit) {
        let (width, per_head) = (self.rows.len(), self.rows.visible.len());
        let mut scale = vec![f32::MIN; width];
        normalise(&mut self.max, &self.sum, &mut scale, weight);
        for (j, shares) in self.max.chunks_exact(width).take(unit.past_blocks).enumerate() {
            for (head, row) in unit.scores.chunks_mut(unit.stride).take(self.rows.heads).enumerate() {
                let rows = head * per_head..(head + 1) * per_head;
                row[j] += shares[rows].iter().sum::<f32>();
            }
        }
    }
}

/// Mean keys of `blocks` of a (request, KV head), `[blocks, head_dim]`.
pub(super) fn mean_keys(
    input: &Input,
    summaries: &Summaries,
    (req, kv_head): (usize, usize),
    blocks: std::ops::Range<usize>,
) -> Vec<f32> {
    let mut means = Vec::with_capacity(blocks.len() * input.layout.shape.head_dim);
    for block in blocks {
        means.extend_from_slice(summaries.k(input.layout, input.batch, BlockAt { req, block, kv_head }));
    }
    means
}

/// Sets the logits `[range, rows]` of tokens that a row does not see to -inf.
fn hide(rows: &Rows, range: std::ops::Range<usize>, logits: &mut [f32]) {
    let per_head = rows.visible.len();
    for (token, logits) in range.zip(logits.chunks_exact_mut(rows.len())) {
        let blind = rows.blind_to(token + 1);
        for head in logits.chunks_exact_mut(per_head) {
            head[..blind].fill(f32::NEG_INFINITY);
        }
    }
}

/// Folds `logits [tokens, rows]` into one cell a row; they are scratch afterwards.
///
/// A maximum starts at the lowest finite number, so a row that sees nothing gets a sum of 0 and not NaN.
#[multiversion(targets("x86_64+avx512f+avx512vl+fma", "x86_64+avx2+fma", "aarch64+neon"))]
fn fold(logits: &mut [f32], max: &mut [f32], sum: &mut [f32]) {
    max.fill(f32::MIN);
    sum.fill(0.0);
    for row in logits.chunks_exact(max.len()) {
        raise(max, row);
    }
    for row in logits.chunks_exact_mut(max.len()) {
        for (x, &m) in row.iter_mut().zip(&*max) {
            *x -= m;
        }
        math::exp2_in_place(row);
        for (s, &x) in sum.iter_mut().zip(&*row) {
            *s += x;
        }
    }
}

/// Turns cells `[blocks, rows]` into shares of each row's weight, times `weight`, left in `max`.
///
/// `scale` comes in at the lowest finite number. NaN in one cell makes NaN of its whole row: none can be judged.
#[multiversion(targets("x86_64+avx512f+avx512vl+fma", "x86_64+avx2+fma", "aarch64+neon"))]
fn normalise(max: &mut [f32], sum: &[f32], scale: &mut [f32], weight: f32) {
    let width = scale.len();
    let mut total = vec![0.0_f32; width];
    for row in max.chunks_exact(width) {
        raise(scale, row);
    }
    for (row, sum) in max.chunks_exact_mut(width).zip(sum.chunks_exact(width)) {
        for (x, &top) in row.iter_mut().zip(&*scale) {
            *x -= top;
        }
        math::exp2_in_place(row);
        for ((x, &s), t) in row.iter_mut().zip(sum).zip(&mut total) {
            *x *= s;
            *t += *x;
        }
    }
    for (scale, t) in scale.iter_mut().zip(total) {
        *scale = weight / t;
    }
    for row in max.chunks_exact_mut(width) {
        for (x, &scale) in row.iter_mut().zip(&*scale) {
            *x *= scale;
        }
    }
}

/// Elementwise maximum; NaN in `row` is passed over.
#[inline(always)]
fn raise(max: &mut [f32], row: &[f32]) {
    for (m, &x) in max.iter_mut().zip(row) {
        *m = if x > *m { x } else { *m };
    }
}

/// Keys per product, where a block is not longer: 128 x 64 f32 fill a level-1 cache.
const TILE_TOKENS: usize = 128;
