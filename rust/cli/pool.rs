//! Packs a layer into a paged pool as an engine would hold it: shuffled pages, K and V interleaved, dirty elsewhere.

use std::ops::Range;

use compactattn::batch::BlockTable;
use compactattn::tensor::Pool;
use compactattn::types::Shape;

use crate::trace::{Data, Layer};

/// Order of a page's tokens and heads in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum KvLayout {
    /// Token, then head.
    Nhd,
    /// Head, then token.
    Hnd,
}

/// One layer's KV cache: `[num_pages, 2 (K, V), page_size x heads in either order, head_dim]`.
///
/// What no token was written to is NaN, and the block table's entries after the valid prefix name no page, so that a
/// read outside the sequence cannot go unnoticed.
#[derive(Clone, Debug)]
pub(crate) struct PagedKv {
    data: Data,
    table: Vec<i32>,
    num_pages: usize,
    shape: Shape,
    layout: KvLayout,
}

impl PagedKv {
    /// An empty, dirty pool with room for `tokens` and a quarter more, pages handed out in shuffled order.
    pub(crate) fn new(shape: Shape, layout: KvLayout, tokens: usize) -> Self {
        let pages = tokens.div_ceil(shape.page_size);
        let num_pages = pages + pages / 4 + 3;
        let mut table = shuffled(num_pages);
        table.truncate(pages);
        table.extend([-1, i32::MAX]);
        let elements = num_pages * 2 * Self::half_page(&shape);
        Self { data: Data::filled(shape.dtype, elements, f32::NAN), table, num_pages, shape, layout }
    }

    /// Writes K and V of `tokens`, which must lie within the pool's tokens.
    pub(crate) fn write(&mut self, layer: &Layer, tokens: Range<usize>) {
        let Shape { num_kv_heads, head_dim, .. } = self.shape;
        for token in tokens {
            for head in 0..num_kv_heads {
                let from = (token * num_kv_heads + head) * head_dim;
                let to = self.offset(token, head);
                self.data.copy(to, &layer.k.data, from, head_dim);
                self.data.copy(to + Self::half_page(&self.shape), &layer.v.data, from, head_dim);
            }
        }
    }

    /// The keys.
    pub(crate) fn k(&self) -> Pool<'_> {
        self.view(0)
    }

    /// The values.
    pub(crate) fn v(&self) -> Pool<'_> {
        self.view(Self::half_page(&self.shape))
    }

    /// The map of the one request that lives in the pool.
    pub(crate) fn block_table(&self) -> BlockTable<'_> {
        BlockTable { entries: &self.table, stride_row: self.table.len(), width: self.table.len() }
    }

    fn view(&self, first: usize) -> Pool<'_> {
        let (stride_token, stride_head) = self.strides();
        Pool {
            scales: &[],
            elements: self.data.elements(first),
            num_pages: self.num_pages,
            stride_page: 2 * Self::half_page(&self.shape),
            stride_token,
            stride_head,
        }
    }

    /// Elements of K (or of V) in one page.
    fn half_page(shape: &Shape) -> usize {
        shape.page_size * shape.num_kv_heads * shape.head_dim
    }

    /// From a token and from a head to the next.
    fn strides(&self) -> (usize, usize) {
        let Shape { num_kv_heads, head_dim, page_size, .. } = self.shape;
        match self.layout {
            KvLayout::Nhd => (num_kv_heads * head_dim, head_dim),
            KvLayout::Hnd => (head_dim, page_size * head_dim),
        }
    }

    /// Where the token's key lies.
    fn offset(&self, token: usize, head: usize) -> usize {
        let (stride_token, stride_head) = self.strides();
        let page = usize::try_from(self.table[token / self.shape.page_size]).unwrap_or(0);
        let row = token % self.shape.page_size;
        page * 2 * Self::half_page(&self.shape) + row * stride_token + head * stride_head
    }
}

/// `0..n` in an order that looks like a long-running engine's free list; the same in every run.
fn shuffled(n: usize) -> Vec<i32> {
    let mut pages: Vec<i32> = (0..i32::try_from(n).unwrap_or(i32::MAX)).collect();
    let mut state = SEED;
    for i in (1..pages.len()).rev() {
        pages.swap(i, next(&mut state) % (i + 1));
    }
    pages
}

/// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), its upper 32 bits.
fn next(state: &mut u64) -> usize {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 32) as usize
}

const SEED: u64 = 2026;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic;

    #[test]
    fn what_is_written_comes_back_bit_for_bit_and_all_else_is_nan() {
        let trace = synthetic::trace(1, 100, 40);
        for layout in [KvLayout::Nhd, KvLayout::Hnd] {
            for page_size in [16, 64] {
                let shape = trace.shape(page_size, None).unwrap();
                let mut kv = PagedKv::new(shape, layout, 100);
                kv.write(&trace.layers[0], 0..100);
                for (pool, tensor) in [(kv.k(), &trace.layers[0].k), (kv.v(), &trace.layers[0].v)] {
                    check_vectors(&kv, &pool, tensor);
                }
                let finite = (0..kv.data.elements(0).len()).filter(|&i| {
                    let mut x = [0.0];
                    kv.data.elements(i).load(0, &mut x);
                    !x[0].is_nan()
                });
                assert_eq!(finite.count(), 2 * 100 * shape.num_kv_heads * shape.head_dim);
            }
        }
    }

    fn check_vectors(kv: &PagedKv, pool: &Pool, tensor: &crate::trace::Tensor) {
        let Shape { head_dim, num_kv_heads, page_size, .. } = kv.shape;
        let (mut got, mut want) = (vec![0.0; head_dim], vec![0.0; head_dim]);
        for token in 0..100 {
            for head in 0..num_kv_heads {
                let page = usize::try_from(kv.table[token / page_size]).unwrap();
                pool.load(page, token % page_size, head, &mut got);
                tensor.data.elements((token * num_kv_heads + head) * head_dim).load(0, &mut want);
                assert_eq!(got, want, "token {token} head {head}");
            }
        }
    }

    #[test]
    fn pages_are_distinct_and_not_in_order() {
        let pages = shuffled(64);
        let distinct: std::collections::HashSet<_> = pages.iter().collect();
        assert_eq!(distinct.len(), 64);
        assert!(pages.windows(2).any(|w| w[1] != w[0] + 1));
    }
}
