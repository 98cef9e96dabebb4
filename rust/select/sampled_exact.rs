//! sampled_exact (the default): exact attention of a few evenly strided query rows, summed by block.
//!
//! A score is the block's share of the attention of the span's rows of one query head, estimated from
//! `settings.sample_rows` of them: softmax over every key the row sees, past and open, then the mean over rows.
//! Sampled queries as block scorers: RRAttention (arXiv 2602.05853) and FlexPrefill (arXiv 2502.20766) with other
//! samples.

use super::cells::Cells;
use super::rows::{Rows, strided, tokens_per_tile};
use super::{Input, Unit};

/// Scores one unit by sampled rows.
pub(super) fn score(input: &Input, unit: &mut Unit) {
    of_rows(input, unit, &strided(unit.span.len, input.layout.settings.sample_rows));
}

/// Scores one unit by the exact attention of the span's `tokens`.
pub(super) fn of_rows(input: &Input, unit: &mut Unit, tokens: &[usize]) {
    unit.fill(0.0);
    for tile in tokens.chunks(tokens_per_tile(input.layout.shape.group_size())) {
        let rows = Rows::load(input, unit, tile);
        let mut cells = Cells::new(input, unit, &rows);
        let all: Vec<usize> = (0..cells.blocks()).collect();
        cells.read(&all);
        cells.add_mass(1.0 / tokens.len() as f32, unit);
    }
}
