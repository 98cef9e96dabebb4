//! attend: softmax attention over the listed boxes only, in place, by online softmax; split over KV where asked.
//!
//! A work item is a tile of rows of one list and one KV split. It reads the list's boxes in order, so its bits depend
//! on the request, the list and the split alone: not on threads, neighbours in the batch, or physical pages.

mod lanes;
mod stream;
#[cfg(test)]
mod tests;
mod tile;

use std::ops::Range;

use crate::batch::Batch;
use crate::error::{Error, Result, Status};
use crate::mask;
use crate::parallel::Parallel;
use crate::plan::{Layout, Span};
use crate::summaries::{BlockAt, Summaries};
use crate::table::Table;
use crate::types::Geometry;
use stream::Stream;
use tile::{KvTile, QueryTile, STREAM_TILE};

/// Results of one or more KV splits before they are combined.
///
/// Rows of one span lie together: span `s`, query head `h`, token `t` of the span is row
/// `s.q_start * num_q_heads + h * s.len + t` of each split.
#[derive(Debug)]
pub struct Partials<'a> {
    /// KV splits of each row, at least 1.
    pub splits: usize,
    /// `[splits, total_q * num_q_heads, head_dim]`, each split normalised by its own sum.
    pub out: &'a mut [f32],
    /// `[splits, total_q * num_q_heads]`, natural log; −inf where the split holds nothing the row sees.
    pub lse: &'a mut [f32],
}

/// The zeroth-order stand-in for blocks that a list skips (FlashPrefill V2, arXiv 2608.19758): the mean of each run of
/// past blocks, [`Geometry::MEAN_TOKENS`] in all, adds `1.5 n * exp(q . k_mean * sm_scale)` of weight with value `v_mean`,
/// where the list skips `n` tokens of the run; the 1.5 is [`Geometry::MEAN_WEIGHT`].
///
/// Means are over all of a run, read or not, so they are the same for every list.
#[derive(Clone, Copy, Debug)]
pub struct Correction<'a> {
    lists: &'a [u32],
    /// Means of keys, and means of values in the place of keys.
    means: [Summaries<'a>; 2],
}

impl<'a> Correction<'a> {
    /// `lists [list spans, lists per span, mask_words]` is what the lists do read; `summaries` stands for the rest.
    ///
    /// # Errors
    /// [`Status::Null`] where `summaries` has no mean values.
    pub fn new(lists: &'a [u32], summaries: Summaries<'a>) -> Result<Self> {
        let missing = || Error::new(Status::Null, "v_mean", "mean values, for mean correction", "none");
        let v_mean = summaries.v_mean.ok_or_else(missing)?;
        let of = |k_mean| Summaries { k_mean, v_mean: None };
        Ok(Self { lists, means: [of(summaries.k_mean), of(v_mean)] })
    }
}

/// Attends every query of the batch to its list in `table`.
pub fn attend(
    layout: &Layout,
    batch: &Batch,
    table: &Table,
    correction: Option<&Correction>,
    partials: &mut Partials,
    parallel: Parallel,
) {
    let spans = layout.list_spans(batch);
    let splits = partials.splits;
    let items = items(layout, batch, &spans, partials);
    parallel.for_each(items.into_iter(), |item| {
        let stream = Stream::new(layout, batch, table, item.row);
        let tokens = stream.split(item.split, splits);
        let mut rows = queries(layout, batch, &item, stream.len);
        let mut kv = KvTile::new(layout.shape.head_dim);
        let end = tokens.end.min(rows.max_visible());
        for first in (tokens.start..end).step_by(STREAM_TILE) {
            stream.load(first..end.min(first + STREAM_TILE), &mut kv);
            rows.absorb(&kv, first);
        }
        // An empty list is one that was found damaged: its queries see nothing, means neither.
        if let Some(correction) = correction.filter(|_| item.split == 0 && stream.len > 0) {
            correction.absorb(layout, batch, &item, (&mut rows, &mut kv));
        }
        rows.write(item.out, item.lse);
    });
}

/// A tile of the rows of one list, and one split of its stream.
#[derive(Debug)]
struct Item<'a> {
    split: usize,
    span: Span,
    /// Row of the table, and of the lists' bits.
    row: usize,
    /// First row within the list: head by head, token by token.
    first: usize,
    /// `[rows, head_dim]`.
    out: &'a mut [f32],
    /// `[rows]`.
    lse: &'a mut [f32],
}

/// Cuts `partials` into items that share nothing; its row layout makes each item's rows contiguous.
fn items<'a>(layout: &Layout, batch: &Batch, spans: &[Span], partials: &'a mut Partials) -> Vec<Item<'a>> {
    let (head_dim, per_span) = (layout.shape.head_dim, layout.lists_per_span());
    let rows = batch.total_q() * layout.shape.num_q_heads;
    let (mut out, mut lse) = (&mut *partials.out, &mut *partials.lse);
    let mut items = Vec::new();
    for split in 0..if rows == 0 { 0 } else { partials.splits } {
        for row in 0..spans.len() * per_span {
            let span = spans[row / per_span];
            let (_, heads) = layout.list_heads(row % per_span);
            let rows = heads.len() * span.len;
            for first in (0..rows).step_by(ROW_TILE) {
                let n = ROW_TILE.min(rows - first);
                let (item_out, item_lse);
                (item_out, out) = std::mem::take(&mut out).split_at_mut(n * head_dim);
                (item_lse, lse) = std::mem::take(&mut lse).split_at_mut(n);
                items.push(Item { split, span, row, first, out: item_out, lse: item_lse });
            }
        }
    }
    items
}

/// The item's queries; `stream_len` tokens end at the span's last token (bottom-right causal).
fn queries(layout: &Layout, batch: &Batch, item: &Item, stream_len: usize) -> QueryTile {
    let (_, heads) = layout.list_heads(item.row % layout.lists_per_span());
    let span = item.span;
    QueryTile::new(&layout.shape, item.lse.len(), |i, into| {
        let (head, token) = ((item.first + i) / span.len, (item.first + i) % span.len);
        batch.q().load(span.q_start + token, heads.start + head, into);
        (stream_len + token + 1).saturating_sub(span.len)
    })
}

impl Correction<'_> {
    /// Adds the mean of every run of past blocks of which the item's list skips any.
    fn absorb(&self, layout: &Layout, batch: &Batch, item: &Item, (rows, kv): (&mut QueryTile, &mut KvTile)) {
        let bits = &self.lists[item.row * layout.mask_words()..][..layout.mask_words()];
        let (kv_head, _) = layout.list_heads(item.row % layout.lists_per_span());
        let geometry = &layout.geometry;
        let (past, blocks) = (geometry.past_blocks(item.span.past), geometry.blocks_per_mean());
        let runs = (0..past).step_by(blocks).map(|first| first..past.min(first + blocks));
        let left_out = |run: &Range<usize>| run.clone().filter(|&j| !mask::get(bits, j)).count();
        let skipped: Vec<_> =
            runs.map(|run| (left_out(&run), run)).filter(|&(blocks, _)| blocks > 0).collect();
        let head_dim = layout.shape.head_dim;
        for runs in skipped.chunks(STREAM_TILE) {
            kv.len = runs.len();
            for (means, into) in self.means.iter().zip([&mut kv.k, &mut kv.v]) {
                for ((_, run), into) in runs.iter().zip(into.chunks_exact_mut(head_dim)) {
                    let at = |block| BlockAt { req: item.span.req, block, kv_head };
                    average(run.clone().map(|block| means.k(layout, batch, at(block))), into);
                }
            }
            let tokens: Vec<f32> = runs
                .iter()
                .map(|(blocks, _)| (blocks * geometry.block_size) as f32 * Geometry::MEAN_WEIGHT)
                .collect();
            rows.absorb_means(kv, &tokens);
        }
    }
}

/// Mean of `means`, at least one and of equally many tokens each.
fn average<'a>(means: impl ExactSizeIterator<Item = &'a [f32]>, into: &mut [f32]) {
    let share = 1.0 / means.len() as f32;
    into.fill(0.0);
    for mean in means {
        for (sum, x) in into.iter_mut().zip(mean) {
            *sum += x;
        }
    }
    into.iter_mut().for_each(|x| *x *= share);
}

/// Query rows of one item: enough to make widening keys and values cheap, few enough to share out small batches.
const ROW_TILE: usize = 128;
