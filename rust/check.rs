//! Checked mode: the last look at every list before attend follows it.
//!
//! Each row of the table must name, in order, the boxes of the blocks that its bits say, on the pages that the engine's
//! block table holds for the request, all within the pool. plan checks a page when it first reads it, table copies it
//! later: what changes in between (an engine that edits a table too early, a stray write into the workspace) shows here
//! and nowhere else. A damaged row is emptied and counted as refused; its queries get out 0 and lse −inf.

use crate::batch::Batch;
use crate::mask;
use crate::plan::{Layout, Span};
use crate::table::TableMut;

/// Empties the rows of `table` that are not what `lists [list rows, mask_words]` and the block table say; how many.
pub fn lists(layout: &Layout, batch: &Batch, lists: &[u32], table: &mut TableMut) -> u64 {
    let spans = layout.list_spans(batch);
    let per_span = layout.lists_per_span();
    let mut damaged = 0;
    for (row, bits) in lists.chunks(layout.mask_words()).enumerate().take(spans.len() * per_span) {
        if is_right(layout, batch, (&spans[row / per_span], bits), (table, row)) {
            continue;
        }
        (table.counts[row], table.stream_lens[row]) = (0, 0);
        damaged += 1;
    }
    damaged
}

fn is_right(
    layout: &Layout,
    batch: &Batch,
    (span, bits): (&Span, &[u32]),
    (table, row): (&TableMut, usize),
) -> bool {
    let geometry = layout.geometry;
    let Ok(count) = usize::try_from(table.counts[row]) else { return false };
    if count > layout.max_boxes() {
        return false;
    }
    let mut found = table.boxes[row * layout.max_boxes()..][..count].iter();
    let mut tokens = 0;
    for block in mask::ones(bits, geometry.blocks(span.kv_end)) {
        let (start, end) =
            (block * geometry.block_size, ((block + 1) * geometry.block_size).min(span.kv_end));
        tokens += end - start;
        for token in (start..end).step_by(geometry.box_tokens()) {
            let page = batch.page(span.req, token / geometry.page_size);
            let part = token % geometry.page_size / geometry.box_tokens();
            let id = i32::try_from(page * geometry.boxes_per_page() + part);
            if page >= batch.k().num_pages || found.next().copied() != id.ok() {
                return false;
            }
        }
    }
    found.next().is_none() && usize::try_from(table.stream_lens[row]) == Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Lists, Paged, shape};
    use crate::settings::{Scope, Selector, Settings};
    use crate::types::Dtype;

    type Damage = fn(&mut TableMut, usize, usize);

    /// `(table, row, first box of the row)`; each leaves its row other than it was.
    const DAMAGE: [(&str, Damage); 8] = [
        ("another page of the pool", |t, _, at| t.boxes[at] ^= 1),
        ("a page outside the pool", |t, _, at| t.boxes[at] = i32::MAX),
        ("a negative page", |t, _, at| t.boxes[at] = -1),
        ("two boxes exchanged", |t, _, at| t.boxes.swap(at, at + 1)),
        ("a box twice", |t, _, at| t.boxes[at + 1] = t.boxes[at]),
        ("a box less", |t, row, _| t.counts[row] -= 1),
        ("more boxes than there is room for", |t, row, _| t.counts[row] = i32::MAX),
        ("a token more", |t, row, _| t.stream_lens[row] += 1),
    ];

    #[test]
    fn a_damaged_row_is_emptied_and_no_other() {
        let paged = Paged::random(5, shape(2, 2, 64, 16, Dtype::F16), &[(70, 700), (3, 50), (90, 600)]);
        let batch = paged.batch();
        let mut settings =
            Settings { block_size: 32, scope: Scope::HEAD_CHUNK, ..Settings::of(Selector::External) };
        settings.dense.below_kv_len = 0;
        let layout = paged.layout(settings);
        let drawn = Lists::random(9, &layout, &batch, 0.4);
        let good = drawn.table();
        for (name, damage) in DAMAGE {
            for row in [0, 1, layout.list_spans(&batch).len() * layout.lists_per_span() - 1] {
                let owned = [good.counts, good.stream_lens, good.boxes].map(<[i32]>::to_vec);
                let [mut counts, mut stream_lens, mut boxes] = owned;
                let mut table =
                    TableMut { counts: &mut counts, stream_lens: &mut stream_lens, boxes: &mut boxes };
                assert_eq!(lists(&layout, &batch, &drawn.bits, &mut table), 0);
                damage(&mut table, row, row * layout.max_boxes());
                assert_eq!(lists(&layout, &batch, &drawn.bits, &mut table), 1, "{name}, row {row}");
                assert_eq!((table.counts[row], table.stream_lens[row]), (0, 0), "{name}");
                let others = (0..good.counts.len()).filter(|&other| other != row);
                assert!(others.into_iter().all(|i| counts[i] == good.counts[i]), "{name}");
            }
        }
    }
}
