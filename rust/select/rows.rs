//! The query rows a selector scores with: which tokens of a span, and their vectors as the products want them.

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

/// `count` of `0..len`: a quarter of them (rounded down) the last ones, the others evenly strided over those before,
/// first and last included; all of them for 0 or `>= len`.
///
/// What a prompt asks stands in its last few tokens, of which even strides over a chunk of 2048 meet one: the blocks that
/// only a question looks for were lost (tests/bench/record/h100/2026-11-22-hf-smollm2.txt). Sample `i` of the `n` strided
/// ones over `m` tokens is `floor(i * (m - 1) / (n - 1))`; a single sample is the last one, which sees most.
pub(super) fn samples(len: usize, count: usize) -> Vec<usize> {
    let last = count / LAST_SHARE;
    match count {
        _ if count == 0 || count >= len => (0..len).collect(),
        1 => vec![len - 1],
        _ => {
            let (strided, over) = (count - last, len - last);
            (0..strided).map(|i| i * (over - 1) / (strided - 1)).chain(over..len).collect()
        }
    }
}

/// Tokens of a group of `heads` that are scored together.
pub(super) fn tokens_per_tile(heads: usize) -> usize {
    match TILE_ROWS / heads {
        n if n > COLUMNS => n - n % COLUMNS,
        n => n.max(1),
    }
}

/// One sample in so many is of a span's last tokens.
const LAST_SHARE: usize = 4;

/// Rows of one product: a tile of keys is loaded once for so many, and their logits stay in the L2 cache.
const TILE_ROWS: usize = 256;

/// Columns of the product's register tile; whole tiles leave no ragged edge.
const COLUMNS: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_even_but_for_the_last_quarter() {
        assert_eq!(samples(1024, 3), [0, 511, 1023]);
        assert_eq!(samples(10, 4), [0, 4, 8, 9]);
        assert_eq!(samples(2048, 32)[22..], [1950, 2039, 2040, 2041, 2042, 2043, 2044, 2045, 2046, 2047]);
        for (len, count) in [(1024, 32), (33, 32), (1000, 7), (5, 4), (2, 1)] {
            let rows = samples(len, count);
            assert_eq!((rows.len(), rows[count - 1]), (count, len - 1));
            assert!(
                rows.windows(2)
                    .all(|w| w[0] < w[1] && w[1] - w[0] <= len.div_ceil((count - count / 4).max(2) - 1))
            );
        }
    }

    #[test]
    fn no_count_or_too_large_a_count_takes_every_row() {
        for count in [0, 5, 6] {
            assert_eq!(samples(5, count), [0, 1, 2, 3, 4]);
        }
    }
}
