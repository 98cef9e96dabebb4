//! pooled_mass: the block masses of `sampled_exact` with every past block's keys replaced by their mean.
//!
//! The scoring of FlashPrefill (arXiv 2603.06199), normalised row by row instead of over 128 rows together, so that
//! rows with large logits do not speak for the others. Reads no past keys, only one mean a block.

use super::cells::Cells;
use super::rows::{Rows, strided, tokens_per_tile};
use super::{Input, Unit};
use crate::summaries::Summaries;

/// Scores one unit by mean keys; without summaries nothing can be judged, and NaN keeps everything the cap allows.
pub(super) fn score(input: &Input, unit: &mut Unit) {
    let Some(summaries) = &input.summaries else { return unit.fill(f32::NAN) };
    let tokens = strided(unit.span.len, input.layout.settings.sample_rows);
    unit.fill(0.0);
    for tile in tokens.chunks(tokens_per_tile(input.layout.shape.group_size())) {
        let rows = Rows::load(input, unit, tile);
        cells(input, unit, &rows, summaries).add_mass(1.0 / tokens.len() as f32, unit);
    }
}

/// Past blocks by their mean keys, the open region by its keys.
pub(super) fn cells<'a>(
    input: &'a Input<'a>,
    unit: &Unit,
    rows: &'a Rows,
    summaries: &Summaries,
) -> Cells<'a> {
    let mut cells = Cells::new(input, unit, rows);
    let open: Vec<usize> = (unit.past_blocks..cells.blocks()).collect();
    cells.pool(summaries, 0..unit.past_blocks);
    cells.read(&open);
    cells
}
