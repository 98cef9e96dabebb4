//! reference: every stage once more, in f64 and in the plainest way, to judge the optimised stages by.
//!
//! Nothing here calls a stage's code: only the batch's accessors, the layout's fields and bits are shared. A request
//! is first copied out of its pages into vectors, then each formula is the textbook's. Memory and time grow with
//! `q_len * kv_len`; this is for tests and for checking a step in the field, not for serving.

pub mod attend;
pub mod gate;
pub mod keep;
pub mod select;
mod select_pooled;
mod select_sampled;
mod select_tokens;
pub mod table;
pub mod union;

use crate::batch::Batch;
use crate::plan::Layout;
use crate::settings::Selector;

/// One request, copied out of the engine's pages.
#[derive(Clone, Debug)]
pub struct Request {
    /// Query tokens of the chunk.
    pub q_len: usize,
    /// KV tokens, the chunk included.
    pub kv_len: usize,
    /// `[num_q_heads][q_len][head_dim]`.
    pub q: Vec<Vec<Vec<f64>>>,
    /// `[num_kv_heads][kv_len][head_dim]`.
    pub k: Vec<Vec<Vec<f64>>>,
    /// `[num_kv_heads][kv_len][head_dim]`.
    pub v: Vec<Vec<Vec<f64>>>,
}

impl Request {
    /// Copies request `req`; one that asks nothing is left empty, as its table row means nothing.
    #[must_use]
    pub fn gather(batch: &Batch, req: usize) -> Self {
        let shape = batch.shape();
        let q_len = batch.q_len(req);
        let kv_len = if q_len == 0 { 0 } else { batch.kv_len(req) };
        let query = |head: usize, token: usize| {
            let mut x = vec![0.0_f32; shape.head_dim];
            batch.q().load(batch.q_start(req) + token, head, &mut x);
            widen(&x)
        };
        let slot = |token: usize| (batch.page(req, token / shape.page_size), token % shape.page_size);
        let cached = |pool: &crate::tensor::Pool, head: usize, token: usize| {
            let mut x = vec![0.0_f32; shape.head_dim];
            let (page, row) = slot(token);
            pool.load_stored((page, row), head, &mut x);
            let scale = f64::from(pool.scale(head));
            x.iter().map(|&x| f64::from(x) * scale).collect()
        };
        let head = |pool, h: usize| (0..kv_len).map(|t| cached(pool, h, t)).collect();
        let kv = |pool| (0..shape.num_kv_heads).map(|h| head(pool, h)).collect();
        Self {
            q_len,
            kv_len,
            q: (0..shape.num_q_heads).map(|h| (0..q_len).map(|t| query(h, t)).collect()).collect(),
            k: kv(batch.k()),
            v: kv(batch.v()),
        }
    }

    /// All requests of a batch.
    #[must_use]
    pub fn gather_all(batch: &Batch) -> Vec<Self> {
        (0..batch.num_reqs()).map(|req| Self::gather(batch, req)).collect()
    }

    /// KV tokens before the chunk.
    #[must_use]
    pub fn past(&self) -> usize {
        self.kv_len.saturating_sub(self.q_len)
    }

    /// KV tokens that chunk token `t` sees, itself included: the chunk is the last `q_len` positions of the KV, so
    /// tokens of a chunk that is longer than the KV lie before position 0 and see nothing.
    #[must_use]
    pub fn visible(&self, t: usize) -> usize {
        let after = self.q_len - 1 - t;
        self.kv_len.saturating_sub(after)
    }
}

/// Consecutive query tokens of one request that are scored, or attended, together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The request.
    pub req: usize,
    /// Its tokens, counted from the chunk's first.
    pub tokens: std::ops::Range<usize>,
    /// Whether policy leaves the request dense.
    pub dense: bool,
}

/// Cuts every request's chunk into runs of `step` tokens from its first; 0 = one run.
#[must_use]
pub fn chunks(layout: &Layout, requests: &[Request], step: usize) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    for (req, request) in requests.iter().enumerate() {
        let mut first = 0;
        while first < request.q_len {
            let end = if step == 0 { request.q_len } else { (first + step).min(request.q_len) };
            chunks.push(Chunk { req, tokens: first..end, dense: dense(layout, request) });
            first = end;
        }
    }
    chunks
}

/// Whether the request is attended densely in this step.
fn dense(layout: &Layout, request: &Request) -> bool {
    let rules = layout.settings.dense;
    layout.settings.selector == Selector::Dense
        || request.q_len <= rules.max_q_len
        || request.kv_len < rules.below_kv_len
        || request.kv_len <= rules.prefix_tokens
        || request.past() < layout.settings.block_size
}

/// Tokens per run that a selector scores together.
///
/// FlashPrefill, the learned gate and XAttention score blocks of queries as large as blocks of keys, an external mask
/// has a row per such block; the others score what shares a list. A run never crosses the end of a list's run.
#[must_use]
pub fn select_step(layout: &Layout) -> usize {
    let (block, span) = (layout.settings.block_size, layout.settings.scope.query_span);
    let by_block = match layout.settings.selector {
        Selector::FlashPrefill | Selector::AttnGate | Selector::XAttention => true,
        Selector::External => block != 1,
        _ => false,
    };
    if !by_block {
        return span;
    }
    if span == 0 || block < span { block } else { span }
}

/// Mean of each whole block of `block_size` rows: `[rows.len() / block_size][head_dim]`.
#[must_use]
pub fn block_means(rows: &[Vec<f64>], block_size: usize) -> Vec<Vec<f64>> {
    rows.chunks_exact(block_size).map(mean).collect()
}

/// Mean of `rows`, of which there is at least one.
fn mean(rows: &[Vec<f64>]) -> Vec<f64> {
    let sum = |x: usize| rows.iter().map(|row| row[x]).sum::<f64>();
    (0..rows[0].len()).map(|x| sum(x) / rows.len() as f64).collect()
}

/// Inner product, in eight interleaved sums.
#[must_use]
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let ((a, rest_a), (b, rest_b)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in a.iter().zip(b) {
        for x in 0..8 {
            sums[x] += a[x] * b[x];
        }
    }
    let rest: f64 = rest_a.iter().zip(rest_b).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f64>() + rest
}

/// Softmax of one row of logits; all 0 for an empty row.
#[must_use]
pub fn softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = logits.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|w| w / sum).collect()
}

fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(q_len: usize, kv_len: usize) -> Request {
        Request { q_len, kv_len, q: Vec::new(), k: Vec::new(), v: Vec::new() }
    }

    #[test]
    fn the_last_token_sees_all_and_each_one_before_it_one_less() {
        let seen = |r: Request| (0..r.q_len).map(|t| r.visible(t)).collect::<Vec<_>>();
        assert_eq!(seen(request(3, 10)), [8, 9, 10]);
        assert_eq!(seen(request(4, 2)), [0, 0, 1, 2]);
        assert_eq!((request(3, 10).past(), request(4, 2).past()), (7, 0));
    }

    #[test]
    fn a_partial_block_has_no_mean() {
        let rows: Vec<Vec<f64>> = [1.0, 3.0, 10.0].map(|x| vec![x, -x]).to_vec();
        assert_eq!(block_means(&rows, 2), [[2.0, -2.0]]);
    }

    #[test]
    fn softmax_and_dot_are_the_textbooks() {
        assert_eq!(softmax(&[5.0, 5.0]), [0.5, 0.5]);
        assert!(softmax(&[]).is_empty());
        assert_eq!(dot(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[1.0; 6]), 21.0);
    }
}
