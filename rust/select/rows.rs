//! The query rows a selector scores with: the vectors of some tokens of a span as the products want them.

use super::{Input, Unit};
use crate::math;

/// Some tokens of one span, for every query head of one KV head.
///
/// Rows are numbered head by head: row `g * tokens + i` is token `i` of the group's head `g`, so one product with a
/// tile of keys serves the whole group, and the rows that do not see a token are the first ones of each head.
#[derive(Debug)]
pub(super) struct Rows {
    /// `[head_dim, rows]`, scaled by `sm_scale * log2(e)`: a product with a key is a logit in base 2.
    pub(super) q: Vec<f32>,
    /// KV tokens that token `i` sees; ascending.
    pub(super) visible: Vec<usize>,
    /// Query heads.
    pub(super) heads: usize,
}

impl Rows {
    /// Loads the vectors of `tokens`, ascending and counted from the span's first.
    pub(super) fn load(input: &Input, unit: &Unit, tokens: &[usize]) -> Self {
        let shape = &input.layout.shape;
        let (heads, dim) = (shape.group_size(), shape.head_dim);
        let scale = shape.sm_scale * std::f32::consts::LOG2_E;
        let rows = heads * tokens.len();
        let mut by_row = vec![0.0; rows * dim];
        for (row, vector) in by_row.chunks_exact_mut(dim).enumerate() {
            let (head, token) = (row / tokens.len(), tokens[row % tokens.len()]);
            input.batch.q().load(unit.span.q_start + token, unit.kv_head * heads + head, vector);
            vector.iter_mut().for_each(|x| *x *= scale);
        }
        let mut q = vec![0.0; rows * dim];
        math::transpose(&by_row, rows, dim, &mut q);
        Self { q, visible: tokens.iter().map(|&i| unit.span.visible(i)).collect(), heads }
    }

    /// The rows of some of the tokens.
    pub(super) fn slice(&self, tokens: std::ops::Range<usize>) -> Self {
        let heads = self.q.chunks_exact(self.visible.len());
        let q = heads.flat_map(|row| &row[tokens.clone()]).copied().collect();
        Self { q, visible: self.visible[tokens].to_vec(), heads: self.heads }
    }

    /// Rows: heads times tokens.
    pub(super) fn len(&self) -> usize {
        self.heads * self.visible.len()
    }

    /// How many of each head's rows, its first ones, see fewer than `tokens` KV tokens.
    pub(super) fn blind_to(&self, tokens: usize) -> usize {
        self.visible.partition_point(|&seen| seen < tokens)
    }

    /// KV tokens that the last row sees.
    pub(super) fn kv_end(&self) -> usize {
        self.visible.last().copied().unwrap_or(0)
    }
}

/// Tokens of a group of `heads` that are scored together.
pub(super) fn tokens_per_tile(heads: usize) -> usize {
    match TILE_ROWS / heads {
        n if n > COLUMNS => n - n % COLUMNS,
        n => n.max(1),
    }
}

/// Rows of one product: a tile of keys is loaded once for so many, and their logits stay in the L2 cache.
const TILE_ROWS: usize = 256;

/// Columns of the product's register tile; whole tiles leave no ragged edge.
const COLUMNS: usize = 16;
