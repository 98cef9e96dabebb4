//! combine: one output row from its KV splits, weighted by their log-sum-exps.
//!
//! Splits are merged in their order, so the bits do not depend on which was attended first. The weights are those of
//! flash decoding: `exp(lse_split - lse)`.

use std::ops::Range;

use crate::attend::Partials;
use crate::batch::Batch;
use crate::parallel::Parallel;
use crate::plan::{Layout, Span};
use crate::tensor::{ElementsMut, LseMut, TokensMut};

/// Writes `out` and, where given, `lse`. A row that saw nothing gets 0 and −inf.
///
/// Only the `[total_q, num_q_heads, head_dim]` and `[num_q_heads, total_q]` elements are written, never the gaps
/// that strides leave between them.
pub fn combine(
    layout: &Layout,
    batch: &Batch,
    partials: &Partials,
    out: &mut TokensMut,
    lse: Option<&mut LseMut>,
    parallel: Parallel,
) {
    let spans = layout.list_spans(batch);
    let from = Splits { layout, partials, rows: batch.total_q() * layout.shape.num_q_heads };
    if let Some(lse) = lse {
        from.write_lse(&spans, lse);
    }
    let heads = layout.shape.num_q_heads;
    let token_extent = heads.saturating_sub(1) * out.stride_head + layout.shape.head_dim;
    // Tokens whose heads interleave with the next token's cannot be handed to different threads.
    let chunk = if out.stride_token >= token_extent { TOKEN_CHUNK } else { batch.total_q().max(1) };
    let strides = [out.stride_token, out.stride_head];
    let chunks = token_chunks(batch.total_q(), chunk, out);
    parallel.for_each(chunks.into_iter(), |(tokens, mut elements)| {
        from.write_out(&spans, tokens, strides, &mut elements);
    });
}

/// Tokens `first..end` with the part of `out` that starts at their first element.
type TokenChunk<'a> = (Range<usize>, ElementsMut<'a>);

fn token_chunks<'a>(total_q: usize, chunk: usize, out: &'a mut TokensMut) -> Vec<TokenChunk<'a>> {
    let stride = out.stride_token;
    let mut rest = match &mut out.elements {
        ElementsMut::Bf16(x) => ElementsMut::Bf16(x),
        ElementsMut::F16(x) => ElementsMut::F16(x),
        ElementsMut::F32(x) => ElementsMut::F32(x),
    };
    let mut chunks = Vec::new();
    for first in (0..total_q).step_by(chunk) {
        let end = total_q.min(first + chunk);
        // The last token's extent may end before its stride does.
        let mid = ((end - first) * stride).min(rest.len());
        let (head, tail) =
            if end == total_q { (rest, ElementsMut::F32(&mut [])) } else { rest.split_at(mid) };
        chunks.push((first..end, head));
        rest = tail;
    }
    chunks
}

/// What `attend` left.
#[derive(Clone, Copy)]
struct Splits<'a> {
    layout: &'a Layout,
    partials: &'a Partials<'a>,
    /// Rows of each split.
    rows: usize,
}

impl Splits<'_> {
    fn write_out(
        &self,
        spans: &[Span],
        tokens: Range<usize>,
        [stride_token, stride_head]: [usize; 2],
        into: &mut ElementsMut,
    ) {
        let mut vector = vec![0.0; self.layout.shape.head_dim];
        for span in spans {
            let (start, end) = (span.q_start.max(tokens.start), (span.q_start + span.len).min(tokens.end));
            for token in start..end {
                for head in 0..self.layout.shape.num_q_heads {
                    self.merge(self.row(span, head, token), &mut vector);
                    into.store((token - tokens.start) * stride_token + head * stride_head, &vector);
                }
            }
        }
    }

    fn write_lse(&self, spans: &[Span], into: &mut LseMut) {
        for span in spans {
            for head in 0..self.layout.shape.num_q_heads {
                for token in span.q_start..span.q_start + span.len {
                    into.elements[head * into.stride_head + token] = self.lse(self.row(span, head, token));
                }
            }
        }
    }

    /// The row's log-sum-exp over all splits.
    fn lse(&self, row: usize) -> f32 {
        let (base, sum) = self.total(row);
        if sum == 0.0 { f32::NEG_INFINITY } else { base + sum.ln() }
    }

    /// Where `attend` put a token, counted over the whole batch, of one head.
    fn row(&self, span: &Span, head: usize, token: usize) -> usize {
        span.q_start * self.layout.shape.num_q_heads + head * span.len + token - span.q_start
    }

    /// The weighted mean of the row's splits.
    fn merge(&self, row: usize, into: &mut [f32]) {
        let (base, sum) = self.total(row);
        into.fill(0.0);
        if sum == 0.0 {
            return;
        }
        for split in 0..self.partials.splits {
            let weight = self.weight(split, row, base) / sum;
            let at = (split * self.rows + row) * into.len();
            for (x, y) in into.iter_mut().zip(&self.partials.out[at..]) {
                *x = weight.mul_add(*y, *x);
            }
        }
    }

    /// Largest lse of the row's splits (0 where all are −inf), and the sum of their weights against it.
    fn total(&self, row: usize) -> (f32, f32) {
        let splits = 0..self.partials.splits;
        let largest =
            splits.clone().map(|s| self.partials.lse[s * self.rows + row]).fold(f32::NEG_INFINITY, f32::max);
        let base = if largest == f32::NEG_INFINITY { 0.0 } else { largest };
        (base, splits.map(|s| self.weight(s, row, base)).sum())
    }

    fn weight(&self, split: usize, row: usize, base: f32) -> f32 {
        (self.partials.lse[split * self.rows + row] - base).exp()
    }
}

/// Tokens merged by one thread at a time.
const TOKEN_CHUNK: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Paged, shape};
    use crate::settings::{Scope, Selector, Settings};
    use crate::types::Dtype;

    /// Two splits whose rows hold their own number, and the second's weight is three times the first's.
    fn combined(stride_token: usize, stride_head: usize, threads: usize) -> (Vec<f32>, Vec<f32>) {
        let paged = Paged::random(1, shape(1, 2, 64, 16, Dtype::F32), &[(100, 120), (0, 0), (3, 9)]);
        let settings = Settings { scope: Scope::HEAD_128, ..Settings::of(Selector::Dense) };
        let (layout, rows) = (paged.layout(settings), 103 * 2);
        let mut out: Vec<f32> = (0..2 * rows * 64).map(|i| (i / 64 % rows) as f32).collect();
        out[rows * 64..].iter_mut().for_each(|x| *x += 4.0);
        let mut lse = vec![0.0; 2 * rows];
        lse[rows..].fill(3.0_f32.ln());
        lse[5] = f32::NEG_INFINITY;
        lse[rows + 5] = f32::NEG_INFINITY;
        let partials = Partials { splits: 2, out: &mut out, lse: &mut lse };
        let mut got = vec![-1.0; 102 * stride_token + stride_head + 64];
        let elements = ElementsMut::F32(&mut got);
        let mut got_lse = vec![-1.0; 2 * 110];
        let mut tokens = TokensMut { elements, stride_token, stride_head };
        let mut lse = LseMut { elements: &mut got_lse, stride_head: 110 };
        let parallel = Parallel::new(threads);
        combine(&layout, &paged.batch(), &partials, &mut tokens, Some(&mut lse), parallel);
        (got, got_lse)
    }

    #[test]
    fn rows_are_weighted_means_and_gaps_stay_as_they_were() {
        // Token-major, with gaps; and head-major, where one token's heads lie around the next token's.
        for (stride_token, stride_head, threads) in [(150, 70, 3), (64, 7000, 3)] {
            let (out, lse) = combined(stride_token, stride_head, threads);
            let mut expected = vec![-1.0; out.len()];
            for (token, head) in (0..103).flat_map(|t| [(t, 0), (t, 1)]) {
                let row = if token < 100 { head * 100 + token } else { 200 + head * 3 + token - 100 };
                let want = if row == 5 { 0.0 } else { row as f32 + 3.0 };
                expected[token * stride_token + head * stride_head..][..64].fill(want);
                let want = if row == 5 { f32::NEG_INFINITY } else { 4.0_f32.ln() };
                // ln, exp and a sum of two: a few units in the last place of a number near 1.4.
                let got = lse[head * 110 + token];
                assert!(got == want || (got - want).abs() < 4.0 * f32::EPSILON, "{got}, wanted {want}");
            }
            for (i, (got, want)) in out.iter().zip(&expected).enumerate() {
                assert!(
                    (got - want).abs() <= 4.0 * f32::EPSILON * want.abs(),
                    "out[{i}]: {got}, wanted {want}"
                );
            }
            assert!(lse[103..110].iter().chain(&lse[213..]).all(|&x| x == -1.0));
        }
    }
}
