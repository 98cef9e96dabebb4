//! two_level: `pooled_mass` ranks all blocks, `sampled_exact` re-scores the best of them.
//!
//! Candidates of a KV group are the best `ceil(two_level_factor * budget)` blocks of any of its heads (so that heads
//! share key loads), and the forced ones. The budget is the share a list may keep: that of `Keep::Density`, else
//! `max_density`. A row's total is exact over candidates and the open region and pooled over the rest, so a row
//! whose attention lies elsewhere says less; blocks that are no candidates score 0.

use super::keep::{self, Forced};
use super::rows::{Rows, strided, tokens_per_tile};
use super::{Input, Unit, pooled_mass};
use crate::settings::{Keep, Settings};

/// Scores one unit in two passes.
pub(super) fn score(input: &Input, unit: &mut Unit) {
    let Some(summaries) = &input.summaries else { return unit.fill(f32::NAN) };
    pooled_mass::score(input, unit);
    let candidates = candidates(&input.layout.settings, unit);
    let tokens = strided(unit.span.len, input.layout.settings.sample_rows);
    unit.fill(0.0);
    for tile in tokens.chunks(tokens_per_tile(input.layout.shape.group_size())) {
        let rows = Rows::load(input, unit, tile);
        let mut cells = pooled_mass::cells(input, unit, &rows, summaries);
        cells.read(&candidates);
        cells.add_mass(1.0 / tokens.len() as f32, unit);
    }
    for row in unit.scores.chunks_mut(unit.stride) {
        for j in (0..unit.past_blocks).filter(|j| candidates.binary_search(j).is_err()) {
            row[j] = 0.0;
        }
    }
}

/// The blocks to re-score, ascending, by the scores in `unit`.
fn candidates(settings: &Settings, unit: &Unit) -> Vec<usize> {
    let n = unit.past_blocks;
    let budget = match settings.keep {
        Keep::Density(share) => share,
        Keep::Threshold(_) | Keep::Mass(_) => settings.max_density,
    };
    let wanted = keep::blocks((budget * settings.two_level_factor).min(1.0), n);
    let forced = Forced::of(settings);
    let count = wanted.max(forced.count(n));
    let best = unit.scores.chunks(unit.stride).flat_map(|row| {
        let mut order = keep::ranked(&row[..n], forced);
        order.truncate(count);
        order
    });
    let mut candidates: Vec<usize> = best.collect();
    candidates.sort_unstable();
    candidates.dedup();
    candidates
}
