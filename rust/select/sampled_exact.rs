//! sampled_exact (the default): exact attention of a few query rows, summed by block.
//!
//! A score is the block's share of the attention of the span's rows of one query head, estimated from
//! `settings.sample_rows` of them: softmax over every key the row sees, past and open, then the mean over rows.
//! Sampled queries as block scorers: RRAttention (arXiv 2602.05853) and FlexPrefill (arXiv 2502.20766) with other
//! samples.

use super::cells::Cells;
use super::rows::{Rows, tokens_per_tile};
use super::{Input, Unit, sample};

/// Scores one unit by sampled rows.
pub(super) fn score(input: &Input, unit: &mut Unit) {
    of_rows(input, unit, &sample::tokens(input, &unit.span, unit.kv_head));
}

/// Scores one unit by the exact attention of the span's `tokens`.
pub(super) fn of_rows(input: &Input, unit: &mut Unit, tokens: &[usize]) {
    unit.fill(0.0);
    for tile in tokens.chunks(tokens_per_tile(input.layout.shape.group_size())) {
        let rows = Rows::load(input, unit, tile);
        let mut cells = Cells::new(input, unit, &rows);
        cells.read(0..cells.blocks());
        cells.add_mass(1.0 / tokens.len() as f32, unit);
    }
}

#[cfg(test)]
mod tests {
    use super::super::plain::{assert_scores, batches, scores, settings};
    use crate::fixture::{Paged, shape};
    use crate::settings::{Scope, Selector};
    use crate::types::Dtype;

    #[test]
    fn scores_are_the_mean_attention_shares_of_the_sampled_rows() {
        for (paged, block_size) in batches() {
            assert_scores(&paged, settings(Selector::SampledExact, block_size), |row| {
                row.mass(&row.sampled(), |i, j| row.exact(i, j))
            });
        }
    }

    #[test]
    fn spans_of_a_chunk_are_sampled_one_by_one() {
        let paged = Paged::random(5, shape(1, 2, 64, 16, Dtype::F32), &[(300, 600)]);
        let scope = Scope { query_span: 128, heads_per_list: 1 };
        let settings = crate::settings::Settings { scope, ..settings(Selector::SampledExact, 64) };
        assert_scores(&paged, settings, |row| row.mass(&row.sampled(), |i, j| row.exact(i, j)));
    }

    #[test]
    fn scores_do_not_depend_on_pages_or_neighbours() {
        let (paged, block_size) = batches().swap_remove(0);
        let settings = settings(Selector::SampledExact, block_size);
        let (layout, all) = scores(&paged, settings);
        assert_eq!(all, scores(&paged.repaged(99), settings).1);
        let (alone, first) = scores(&paged.only(0, 7), settings);
        for head in 0..8 {
            let range =
                |layout: &crate::plan::Layout| head * layout.max_blocks()..head * layout.max_blocks() + 5;
            assert_eq!(all[range(&layout)], first[range(&alone)]);
        }
    }

    #[test]
    fn a_block_with_nan_keys_cannot_be_judged() {
        let (mut paged, block_size) = batches().swap_remove(1);
        paged.requests[0].k[20 * 96] = f32::NAN;
        let paged = paged.repaged(1);
        let (_, scores) = scores(&paged, settings(Selector::SampledExact, block_size));
        assert!(scores[..6].iter().all(|x| x.is_nan()), "{scores:?}");
    }

    #[test]
    fn huge_logits_do_not_overflow() {
        let (mut paged, block_size) = batches().swap_remove(1);
        paged.requests[0].k.iter_mut().for_each(|x| *x *= 1e4);
        let paged = paged.repaged(1);
        let (_, scores) = scores(&paged, settings(Selector::SampledExact, block_size));
        assert!(scores[..6].iter().all(|x| (0.0..=1.0).contains(x)), "{scores:?}");
    }
}
