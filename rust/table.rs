//! table: from bits to ordered lists of physical boxes, through the engine's block map.
//!
//! A box is `min(page_size, block_size)` tokens; entry `page * boxes_per_page + part` names one. A row holds its
//! selected past boxes, ascending, then every box of the open region up to the span's last token: a stream whose end
//! is the chunk, so causality is the plain bottom-right mask on stream positions. This is the one place that reads
//! the engine's table, whose entries [`Batch::new`](crate::batch::Batch::new) has bounds-checked.

use crate::batch::Batch;
use crate::mask;
use crate::plan::{Layout, Span};

/// Lists to read; row = list of a span.
#[derive(Clone, Copy, Debug)]
pub struct Table<'a> {
    /// `[rows]` boxes a row holds.
    pub counts: &'a [i32],
    /// `[rows]` KV tokens a row's boxes hold; the last box may be partial.
    pub stream_lens: &'a [i32],
    /// `[rows, max_boxes]` physical boxes; entries at and after `counts[row]` are undefined.
    pub boxes: &'a [i32],
}

/// Lists to write; laid out as [`Table`].
#[derive(Debug)]
pub struct TableMut<'a> {
    /// `[rows]`.
    pub counts: &'a mut [i32],
    /// `[rows]`.
    pub stream_lens: &'a mut [i32],
    /// `[rows, max_boxes]`.
    pub boxes: &'a mut [i32],
}

/// Writes one row per list of `lists [list spans, lists per span, mask_words]`; the row count.
pub fn build(layout: &Layout, batch: &Batch, lists: &[u32], out: &mut TableMut) -> usize {
    let spans = layout.list_spans(batch);
    let per_span = layout.lists_per_span();
    let rows = lists.chunks(layout.mask_words()).zip(out.boxes.chunks_mut(layout.max_boxes()));
    for (i, (bits, boxes)) in rows.enumerate().take(spans.len() * per_span) {
        let span = &spans[i / per_span];
        let (count, tokens) = build_row(layout, batch, span, (bits, boxes));
        out.counts[i] = to_i32(count);
        out.stream_lens[i] = to_i32(tokens);
    }
    spans.len() * per_span
}

/// One row; its boxes and tokens.
fn build_row(
    layout: &Layout,
    batch: &Batch,
    span: &Span,
    (bits, boxes): (&[u32], &mut [i32]),
) -> (usize, usize) {
    let geometry = layout.geometry;
    let (mut count, mut tokens) = (0, 0);
    for block in mask::ones(bits, geometry.blocks(span.kv_end)) {
        let end = ((block + 1) * geometry.block_size).min(span.kv_end);
        for start in (block * geometry.block_size..end).step_by(geometry.box_tokens()) {
            let page = batch.page(span.req, start / geometry.page_size);
            let part = start % geometry.page_size / geometry.box_tokens();
            boxes[count] = to_i32(page * geometry.boxes_per_page() + part);
            count += 1;
        }
        tokens += end - block * geometry.block_size;
    }
    (count, tokens)
}

/// Counts and ids fit: `Layout::new` bounds lengths by 2^31, `Layout::admit` pools by what a box id can name.
fn to_i32(x: usize) -> i32 {
    i32::try_from(x).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Lists, Paged, shape};
    use crate::settings::{Scope, Selector, Settings};
    use crate::types::Dtype;

    #[test]
    fn a_row_names_each_selected_box_once_in_order_through_the_block_table() {
        for (page_size, block_size) in [(16, 64), (64, 16), (32, 32), (256, 128)] {
            let paged =
                Paged::random(5, shape(2, 2, 64, page_size, Dtype::F16), &[(70, 700), (3, 50), (90, 600)]);
            let batch = paged.batch();
            let mut settings =
                Settings { block_size, scope: Scope::HEAD_CHUNK, ..Settings::of(Selector::External) };
            settings.dense.below_kv_len = 0;
            let layout = paged.layout(settings);
            let lists = Lists::random(9, &layout, &batch, 0.4);
            let table = lists.table();
            for (row, bits) in lists.bits.chunks(layout.mask_words()).enumerate() {
                let span = layout.list_spans(&batch)[row / layout.lists_per_span()];
                let want = plain_boxes(&layout, &batch, &span, bits);
                let got = &table.boxes[row * layout.max_boxes()..][..want.len()];
                assert_eq!(usize::try_from(table.counts[row]), Ok(want.len()));
                assert_eq!(got, want);
                let tokens = (0..span.kv_end).filter(|t| mask::get(bits, t / block_size)).count();
                assert_eq!(usize::try_from(table.stream_lens[row]), Ok(tokens));
            }
        }
    }

    /// Boxes of selected tokens, token by token.
    fn plain_boxes(layout: &Layout, batch: &Batch, span: &Span, bits: &[u32]) -> Vec<i32> {
        let Geometry { page_size, block_size } = layout.geometry;
        let tokens = (0..span.kv_end).filter(|t| mask::get(bits, t / block_size));
        let mut boxes: Vec<_> = tokens
            .map(|t| {
                let slot = batch.page(span.req, t / page_size) * page_size + t % page_size;
                i32::try_from(slot / layout.geometry.box_tokens()).unwrap()
            })
            .collect();
        boxes.dedup();
        boxes
    }

    use crate::types::Geometry;
}
