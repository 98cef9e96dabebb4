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
                    let (base, sum) = self.total(self.row(span, head, token));
                    let lse = if sum == 0.0 { f32::NEG_INFINITY } else { base + sum.ln() };
                    into.elements[head * into.stride_head + token] = lse;
                }
            }
        }
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
            // A split without weight holds zeros that may be stale; it has nothing to say.
            if weight == 0.0 {
                continue;
            }
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
