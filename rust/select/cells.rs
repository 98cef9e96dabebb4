//! Cells: the partial softmax of one query row over one KV block, from which block masses follow.
//!
//! A cell is a pair (`max`, `sum`) that stands for the weight `sum * 2^max`, in logits of base 2. Cells come from the
//! block's keys ([`Cells::read`], exact) or from its mean key ([`Cells::pool`]: `block_size * 2^(q . k_mean)`, which
//! never exceeds the exact weight, by Jensen). Weights divided by a row's total are shares of its attention.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use multiversion::multiversion;

use super::rows::Rows;
use super::{Input, Unit};
use crate::math::{self, Mat};
use crate::summaries::{BlockAt, Summaries};
use crate::types::Dtype;

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

    /// Fills the cells of the first `blocks` blocks for the rows that see them whole, from their mean keys.
    pub(super) fn pool(&mut self, summaries: &Summaries, blocks: usize) {
        let (layout, width) = (self.input.layout, self.rows.len());
        let (dim, block_size) = (layout.shape.head_dim, layout.geometry.block_size);
        let means = mean_keys(self.input, summaries, self.at, 0..blocks);
        let max = &mut self.max[..blocks * width];
        max.fill(0.0);
        math::gemm(Mat::new(&means, dim), Mat::new(&self.rows.q, width), max, width, [blocks, width, dim]);
        let cells = max.chunks_exact_mut(width).zip(self.sum.chunks_exact_mut(width));
        for (block, (max, sum)) in cells.enumerate() {
            let blind = self.rows.blind_to((block + 1) * block_size);
            let per_head = self.rows.visible.len();
            for (max, sum) in max.chunks_exact_mut(per_head).zip(sum.chunks_exact_mut(per_head)) {
                max[..blind].fill(f32::MIN);
                sum[..blind].fill(0.0);
                sum[blind..].fill(block_size as f32);
            }
        }
    }

    /// Fills the cells of `blocks` from their keys, each row as far as it sees.
    pub(super) fn read(&mut self, blocks: impl Iterator<Item = usize>) {
        let width = self.rows.len();
        let mut scratch = Scratch::default();
        for block in blocks {
            let cell = block * width..(block + 1) * width;
            let into = (&mut self.max[cell.clone()], &mut self.sum[cell]);
            scratch.read(self.input, self.at, self.rows, block, into);
        }
    }

    /// Fills each row's cell of the block that it sees in part, from `first` on, from the block's keys.
    pub(super) fn read_tails(&mut self, first: usize) {
        let block_size = self.input.layout.geometry.block_size;
        let (width, per_head) = (self.rows.len(), self.rows.visible.len());
        let mut scratch = Scratch::default();
        for block in first..self.blocks() {
            let (start, end) = (block * block_size, (block + 1) * block_size);
            let tokens = self.rows.blind_to(start + 1)..self.rows.blind_to(end);
            if tokens.is_empty() {
                continue;
            }
            let rows = self.rows.slice(tokens.clone());
            let (mut max, mut sum) = (vec![0.0; rows.len()], vec![0.0; rows.len()]);
            scratch.read(self.input, self.at, &rows, block, (&mut max, &mut sum));
            for head in 0..rows.heads {
                let to = block * width + head * per_head;
                let from = head * tokens.len()..(head + 1) * tokens.len();
                self.max[to + tokens.start..to + tokens.end].copy_from_slice(&max[from.clone()]);
                self.sum[to + tokens.start..to + tokens.end].copy_from_slice(&sum[from]);
            }
        }
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

/// Buffers of the product of one block's keys with the rows.
#[derive(Default)]
struct Scratch {
    /// `[tokens, head_dim]`.
    keys: Vec<f32>,
    /// `[tokens, rows]`.
    logits: Vec<f32>,
}

impl Scratch {
    /// Exact cells of one block, `(max, sum)`, one a row.
    fn read(
        &mut self,
        input: &Input,
        (req, kv_head): (usize, usize),
        rows: &Rows,
        block: usize,
        (max, sum): (&mut [f32], &mut [f32]),
    ) {
        let (block_size, dim) = (input.layout.geometry.block_size, input.layout.shape.head_dim);
        let tokens = block * block_size..((block + 1) * block_size).min(rows.kv_end());
        let (count, width) = (tokens.len(), rows.len());
        self.keys.resize(count * dim, 0.0);
        input.batch.load_k(req, kv_head, tokens.clone(), &mut self.keys);
        self.logits.clear();
        self.logits.resize(count * width, 0.0);
        let (keys, q) = (Mat::new(&self.keys, dim), Mat::new(&rows.q, width));
        math::gemm(keys, q, &mut self.logits, width, [count, width, dim]);
        hide(rows, tokens, &mut self.logits);
        fold(&mut self.logits, max, sum);
    }
}

/// Mean keys of `blocks` of a (request, KV head), `[blocks, head_dim]`, rounded to the queries' dtype: as FlashPrefill
/// (arXiv 2603.06199) keeps them, and tensor cores multiply them once.
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
    match input.layout.shape.dtype {
        Dtype::Bf16 => round_to::<bf16>(&mut means),
        Dtype::F16 => round_to::<f16>(&mut means),
        _ => (),
    }
    means
}

/// To nearest, ties to even; what is too large becomes infinite, and rows that meet it cannot be judged by it.
fn round_to<T: Copy + Default>(numbers: &mut [f32])
where
    [T]: HalfFloatSliceExt,
{
    let mut narrow = vec![T::default(); numbers.len()];
    narrow.convert_from_f32_slice(numbers);
    narrow.convert_to_f32_slice(numbers);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_are_rounded_to_even_and_what_is_too_large_is_infinite() {
        let mut numbers = [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 1e5, -f32::MAX, f32::NAN];
        let mut narrower = numbers;
        round_to::<bf16>(&mut numbers);
        assert_eq!(numbers[..4], [1.0, 1.015_625, 99_840.0, f32::NEG_INFINITY]);
        round_to::<f16>(&mut narrower);
        assert_eq!(narrower[..4], [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, f32::INFINITY, f32::NEG_INFINITY]);
        assert!(numbers[4].is_nan() && narrower[4].is_nan());
    }
}
