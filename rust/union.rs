//! union: from rows of scores or bits (select spans x query heads) to one row of bits per list.
//!
//! Lists are laid out `[list spans, lists per span]` and bits `[.., mask_words]`. Merging masks is an OR, the
//! smallest set that covers every row under one list (arXiv 2605.16839, section 3); merging scores decides once on
//! the list's own scores, so that a list reads what was asked for and no more. For equal error neither wins on the 8K
//! trace (tests/bench/record/cpu/2026-11-22-pages-for-error.txt).

use crate::batch::Batch;
use crate::mask;
use crate::plan::{Layout, Span};
use crate::select::{Merge, keep, merge_of};
use crate::settings::KeepAt;

/// What a step selected, over all lists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Lists.
    pub lists: u64,
    /// Past blocks that could be selected.
    pub candidates: u64,
    /// Past blocks that were.
    pub selected: u64,
    /// Past blocks among them that were forced (sink, local).
    pub forced: u64,
    /// Lists that the density guard made dense.
    pub guarded: u64,
    /// Lists that were dense by policy, or because no span votes for them.
    pub dense: u64,
    /// Requests that a GPU refused for a length or page out of range; the CPU refuses the whole step instead.
    pub refused: u64,
}

/// Keeps blocks per row of scores: `scores [select spans, num_q_heads, max_blocks]` to bits `[.., mask_words]`.
///
/// Bits of the open region are set in every row, so a mask by itself never drops the chunk.
pub fn masks_of_scores(layout: &Layout, batch: &Batch, scores: &[f32], masks: &mut [u32]) {
    let heads = layout.shape.num_q_heads;
    let spans = layout.select_spans(batch);
    let rows = scores.chunks(layout.max_blocks()).zip(masks.chunks_mut(layout.mask_words()));
    for (i, (scores, row)) in rows.enumerate().take(spans.len() * heads) {
        let span = &spans[i / heads];
        row.fill(0);
        let past = layout.geometry.past_blocks(span.past);
        let total = layout.geometry.blocks(span.kv_end);
        if span.dense {
            mask::set_range(row, 0..total);
            continue;
        }
        if votes(layout, batch, span) {
            keep::keep(&layout.settings, &scores[..past], row);
        }
        mask::set_range(row, past.min(total)..total);
    }
}

/// Whether the rows of this select span count (`flashprefill`'s `non_voting_spans`; at least a chunk's first one does).
fn votes(layout: &Layout, batch: &Batch, span: &Span) -> bool {
    let silent = layout.settings.flashprefill.non_voting_spans;
    if silent == 0 || layout.settings.selector != crate::settings::Selector::FlashPrefill {
        return true;
    }
    let step = layout.select_span().max(1);
    let spans = batch.q_len(span.req).div_ceil(step);
    span.first / step < spans.saturating_sub(silent).max(1)
}

/// Unites rows of bits: `masks [select spans, num_q_heads, mask_words]` to `lists [list spans, lists per span, ..]`.
pub fn of_masks(layout: &Layout, batch: &Batch, masks: &[u32], lists: &mut [u32]) -> Counts {
    let words = layout.mask_words();
    each_list(layout, batch, lists, |rows, _, list| {
        for row in rows {
            mask::or(list, &masks[row * words..(row + 1) * words]);
        }
    })
}

/// Merges rows of scores per list, then keeps: `scores [select spans, num_q_heads, max_blocks]` to `lists`.
pub fn of_scores(layout: &Layout, batch: &Batch, scores: &[f32], lists: &mut [u32]) -> Counts {
    let stride = layout.max_blocks();
    let merge = merge_of(layout.settings.selector);
    let mut merged = vec![0.0_f32; stride];
    each_list(layout, batch, lists, |rows, past, list| {
        merged[..past].fill(if merge == Merge::Max { f32::NEG_INFINITY } else { 0.0 });
        for &row in rows {
            let row = &scores[row * stride..row * stride + past];
            merge_row(merge, &mut merged[..past], row, rows.len());
        }
        keep::keep(&layout.settings, &merged[..past], list);
    })
}

/// The layer's way from scores to lists; `masks` is scratch where the layer keeps by row.
pub fn unite(layout: &Layout, batch: &Batch, scores: &[f32], masks: &mut [u32], lists: &mut [u32]) -> Counts {
    match layout.settings.keep_at {
        KeepAt::Row => {
            masks_of_scores(layout, batch, scores, masks);
            of_masks(layout, batch, masks, lists)
        }
        KeepAt::List => of_scores(layout, batch, scores, lists),
    }
}

fn merge_row(merge: Merge, into: &mut [f32], row: &[f32], rows: usize) {
    for (a, &b) in into.iter_mut().zip(row) {
        match merge {
            Merge::Mean => *a += b / rows as f32,
            // NaN wins: a block that cannot be judged is read.
            Merge::Max => *a = if b.is_nan() || a.is_nan() { f32::NAN } else { a.max(b) },
        }
    }
}

/// Clears every list, fills it by `fill(rows of scores or bits, past blocks, list)`, then forces and guards it.
fn each_list(
    layout: &Layout,
    batch: &Batch,
    lists: &mut [u32],
    mut fill: impl FnMut(&[usize], usize, &mut [u32]),
) -> Counts {
    let select = layout.select_spans(batch);
    let list_spans = layout.list_spans(batch);
    let mut counts = Counts::default();
    let (mut first, mut rows) = (0, Vec::new());
    let mut lists = lists.chunks_mut(layout.mask_words());
    for span in &list_spans {
        let count = select[first..]
            .iter()
            .take_while(|s| s.req == span.req && s.first < span.first + span.len)
            .count();
        let voting: Vec<usize> =
            (first..first + count).filter(|&s| votes(layout, batch, &select[s])).collect();
        // Nobody asked for less than everything, as for the last rows of the official block-sparse path.
        let span = Span { dense: span.dense || voting.is_empty(), ..*span };
        for list in 0..layout.lists_per_span() {
            let Some(row) = lists.next() else { return counts };
            row.fill(0);
            if !span.dense {
                rows.clear();
                let (_, heads) = layout.list_heads(list);
                let row_of = |s: usize| heads.clone().map(move |h| s * layout.shape.num_q_heads + h);
                rows.extend(voting.iter().flat_map(|&s| row_of(s)));
                fill(&rows, layout.geometry.past_blocks(span.past), row);
            }
            finish(layout, &span, row, &mut counts);
        }
        first += count;
    }
    counts
}

/// Forces sink, local and the open region, applies the density guard, drops bits after the span's end, counts.
fn finish(layout: &Layout, span: &Span, row: &mut [u32], counts: &mut Counts) {
    let past = layout.geometry.past_blocks(span.past);
    let total = layout.geometry.blocks(span.kv_end);
    let forced = keep::Forced::of(&layout.settings);
    counts.lists += 1;
    if span.dense {
        counts.dense += 1;
        return mask::set_range(row, 0..total);
    }
    for j in (0..past).filter(|&j| forced.has(j, past)) {
        mask::set(row, j);
        counts.forced += 1;
    }
    let kept = mask::count(row, past);
    // The last bit of an f32 share must not decide: 9 of 10 are not more than 0.9.
    let guard = f64::from(layout.settings.density_guard) * (1.0 + f64::from(f32::EPSILON));
    if kept as f64 > guard * past as f64 {
        counts.guarded += u64::from(kept < past);
        mask::set_range(row, 0..past);
    }
    counts.candidates += past as u64;
    counts.selected += mask::count(row, past) as u64;
    mask::set_range(row, past.min(total)..total);
    mask::clear_from(row, total);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Paged, Rng, shape};
    use crate::settings::{Keep, Scope, Selector, Settings};
    use crate::types::Dtype;

    /// External masks of 16-token blocks, nothing forced, so that only the union speaks.
    fn settings(scope: Scope) -> Settings {
        let mut settings = Settings { block_size: 16, scope, ..Settings::of(Selector::External) };
        (settings.sink_blocks, settings.local_blocks, settings.density_guard) = (0, 0, 1.0);
        settings.dense.below_kv_len = 0;
        settings
    }

    fn paged() -> Paged {
        Paged::random(3, shape(2, 3, 64, 16, Dtype::F32), &[(300, 900), (1, 40), (50, 333), (0, 7)])
    }

    /// Random bits in the past of every row, the open region set.
    fn masks(layout: &Layout, batch: &Batch, seed: u64) -> Vec<u32> {
        let mut rng = Rng::new(seed);
        let mut masks = vec![0; layout.select_spans(batch).len() * 6 * layout.mask_words()];
        for (i, row) in masks.chunks_mut(layout.mask_words()).enumerate() {
            let span = layout.select_spans(batch)[i / 6];
            let total = layout.geometry.blocks(span.kv_end);
            let past = layout.geometry.past_blocks(span.past);
            (0..total).filter(|&j| j >= past || rng.below(10) == 0).for_each(|j| mask::set(row, j));
        }
        masks
    }

    fn united(layout: &Layout, batch: &Batch, masks: &[u32]) -> Vec<u32> {
        let mut lists = vec![u32::MAX; layout.max_list_rows() * layout.mask_words()];
        of_masks(layout, batch, masks, &mut lists);
        lists
    }

    #[test]
    fn a_list_holds_exactly_what_some_row_under_it_asked_for() {
        let paged = paged();
        let batch = paged.batch();
        for scope in [Scope::GROUP_CHUNK, Scope::HEAD_CHUNK, Scope { query_span: 128, heads_per_list: 2 }] {
            let layout = paged.layout(settings(scope));
            let masks = masks(&layout, &batch, 1);
            let lists = united(&layout, &batch, &masks);
            let select = layout.select_spans(&batch);
            for (row, list) in lists.chunks(layout.mask_words()).enumerate() {
                let Some(span) = layout.list_spans(&batch).get(row / layout.lists_per_span()).copied() else {
                    break;
                };
                let (_, heads) = layout.list_heads(row % layout.lists_per_span());
                for j in 0..layout.geometry.blocks(span.kv_end) {
                    let asked = select.iter().enumerate().any(|(s, part)| {
                        let inside =
                            part.req == span.req && (span.first..span.first + span.len).contains(&part.first);
                        inside
                            && heads
                                .clone()
                                .any(|h| mask::get(&masks[(s * 6 + h) * layout.mask_words()..], j))
                    });
                    let open = j >= layout.geometry.past_blocks(span.past);
                    assert_eq!(mask::get(list, j), asked || open || span.dense, "row {row} block {j}");
                }
            }
        }
    }

    #[test]
    fn a_list_above_the_density_guard_becomes_dense_and_is_counted() {
        let paged = paged();
        let batch = paged.batch();
        let layout = paged.layout(Settings { density_guard: 0.05, ..settings(Scope::HEAD_CHUNK) });
        let mut lists = vec![0; layout.max_list_rows() * layout.mask_words()];
        let counts = of_masks(&layout, &batch, &masks(&layout, &batch, 2), &mut lists);
        assert_eq!(counts.guarded, 12);
        assert_eq!(counts.selected, counts.candidates);
        assert_eq!((counts.lists, counts.dense), (18, 6));
    }

    #[test]
    fn merged_mass_is_the_mean_and_merged_relative_scores_the_maximum() {
        let (mut mean, mut max) = ([0.0; 2], [f32::NEG_INFINITY; 2]);
        for row in [[0.25, 1.0], [0.75, f32::NAN]] {
            merge_row(Merge::Mean, &mut mean, &row, 2);
            merge_row(Merge::Max, &mut max, &row, 2);
        }
        assert!(mean[0] == 0.5 && mean[1].is_nan());
        assert!(max[0] == 0.75 && max[1].is_nan());
    }

    #[test]
    fn a_list_that_no_span_votes_for_is_dense() {
        let paged = paged();
        let batch = paged.batch();
        let mut settings = Settings { keep: Keep::Threshold(1.0), ..Settings::of(Selector::FlashPrefill) };
        (settings.block_size, settings.scope, settings.dense.below_kv_len) = (16, Scope::HEAD_128, 0);
        (settings.sink_blocks, settings.local_blocks) = (0, 0);
        // Request 0 has 19 spans of 16 queries in lists of 8, 8 and 3.
        settings.flashprefill.non_voting_spans = 3;
        for keep_at in [KeepAt::Row, KeepAt::List] {
            let layout = paged.layout(Settings { keep_at, ..settings });
            let scores = vec![0.0; layout.max_select_spans() * 6 * layout.max_blocks()];
            let (mut masks, mut lists) = (vec![0; scores.len()], vec![0; scores.len()]);
            let counts = unite(&layout, &batch, &scores, &mut masks, &mut lists);
            let past = layout.geometry.past_blocks(batch.past_len(0));
            let kept: Vec<_> =
                (0..3).map(|span| mask::count(&lists[span * 6 * layout.mask_words()..], past)).collect();
            assert_eq!(kept, [0, 0, past]);
            // Beside them request 1, dense by policy.
            assert_eq!(counts.dense, 6 + 6);
        }
    }

    #[test]
    fn bits_after_the_spans_last_block_are_dropped() {
        let paged = paged();
        let batch = paged.batch();
        let layout = paged.layout(settings(Scope::GROUP_CHUNK));
        let masks = vec![u32::MAX; layout.select_spans(&batch).len() * 6 * layout.mask_words()];
        let lists = united(&layout, &batch, &masks);
        let spans = layout.list_spans(&batch);
        for (row, list) in lists.chunks(layout.mask_words()).take(spans.len() * 2).enumerate() {
            let total = layout.geometry.blocks(spans[row / 2].kv_end);
            assert_eq!(mask::count(list, layout.mask_words() * 32), total);
        }
    }

    #[test]
    fn spans_that_do_not_vote_leave_the_list_alone() {
        let paged = paged();
        let batch = paged.batch();
        let mut base = Settings { keep: Keep::Density(0.01), ..Settings::of(Selector::FlashPrefill) };
        (base.block_size, base.scope, base.dense.below_kv_len) = (16, Scope::GROUP_CHUNK, 0);
        (base.sink_blocks, base.local_blocks) = (0, 0);
        let mut silent = base;
        silent.flashprefill.non_voting_spans = 18;
        let layout = paged.layout(silent);
        let stride = layout.max_blocks();
        // Each select span of request 0 (19 of them) wants a block of its own.
        let mut scores = vec![0.0; layout.max_select_spans() * 6 * stride];
        (0..19).for_each(|s| scores[s * 6 * stride + 5 + s] = 1.0);
        let (mut masks, mut lists) = (vec![0; scores.len()], vec![0; scores.len()]);
        unite(&layout, &batch, &scores, &mut masks, &mut lists);
        let kept: Vec<_> = (5..24).filter(|&j| mask::get(&lists, j)).collect();
        assert_eq!(kept, [5], "only the first span votes");
        unite(&paged.layout(base), &batch, &scores, &mut masks, &mut lists);
        assert_eq!((5..24).filter(|&j| mask::get(&lists, j)).count(), 19);
    }
}
