//! pooled_mass: the block masses of `sampled_exact` with every past block's keys replaced by their mean.
//!
//! The scoring of FlashPrefill (arXiv 2603.06199), normalised row by row instead of over 128 rows together, so that
//! rows with large logits do not speak for the others. Reads no past keys, only one mean a block.
//!
//! A row's total holds every block it sees whole, those of the open region too, by its mean key, and the block it
//! sees in part by that block's keys. Pooling the open region like the past matters: pooled weights are too low
//! (Jensen), so an exact open region would make rows that attend far away count for less.

use super::cells::Cells;
use super::rows::{Rows, tokens_per_tile};
use super::{Input, Unit, sample};
use crate::summaries::Summaries;

/// Scores one unit by mean keys; without summaries nothing can be judged, and NaN keeps everything the cap allows.
pub(super) fn score(input: &Input, unit: &mut Unit) {
    let Some(summaries) = &input.summaries else { return unit.fill(f32::NAN) };
    let tokens = sample::tokens(input, &unit.span, unit.kv_head);
    unit.fill(0.0);
    for tile in tokens.chunks(tokens_per_tile(input.layout.shape.group_size())) {
        let rows = Rows::load(input, unit, tile);
        cells(input, unit, &rows, summaries).add_mass(1.0 / tokens.len() as f32, unit);
    }
}

/// Blocks seen whole by their mean keys, those seen in part by their keys.
pub(super) fn cells<'a>(
    input: &'a Input<'a>,
    unit: &Unit,
    rows: &'a Rows,
    summaries: &Summaries,
) -> Cells<'a> {
    let mut cells = Cells::new(input, unit, rows);
    cells.pool(summaries, rows.kv_end() / input.layout.geometry.block_size);
    cells.read_tails(unit.past_blocks);
    cells
}

#[cfg(test)]
mod tests {
    use super::super::plain::{assert_scores, batches, settings};
    use crate::settings::{Selector, Settings};

    #[test]
    fn scores_are_the_mean_shares_of_mean_keys() {
        for (paged, block_size) in batches() {
            for sample_rows in [0, 5] {
                let settings = Settings { sample_rows, ..settings(Selector::PooledMass, block_size) };
                assert_scores(&paged, settings, |row| row.mass(&row.sampled(), |i, j| row.pooled(i, j)));
            }
        }
    }
}
