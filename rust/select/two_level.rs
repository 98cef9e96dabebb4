//! two_level: `pooled_mass` ranks all blocks, `sampled_exact` re-scores the best of them.
//!
//! Candidates of a KV group are the forced blocks and the best by the pooled mass of all its heads together, `ceil(
//! two_level_factor * budget)` of the past in all: heads share what is read of the keys, so one budget bounds it. (The
//! best of each head were .66 of a group's blocks for .25 of each of 4 heads.) The budget is the share a list may keep: that of `Keep::Density`, else
//! `max_density`. A row's total is exact over candidates and the open region and pooled over the rest, so a row
//! whose attention lies elsewhere says less; blocks that are no candidates score 0.

use super::keep::{self, Forced};
use super::rows::{Rows, tokens_per_tile};
use super::{Input, Unit, pooled_mass, sample};
use crate::settings::{Keep, Settings};

/// Scores one unit in two passes.
pub(super) fn score(input: &Input, unit: &mut Unit) {
    let Some(summaries) = &input.summaries else { return unit.fill(f32::NAN) };
    pooled_mass::score(input, unit);
    let candidates = candidates(&input.layout.settings, unit);
    let tokens = sample::tokens(input, &unit.span, unit.kv_head);
    unit.fill(0.0);
    for tile in tokens.chunks(tokens_per_tile(input.layout.shape.group_size())) {
        let rows = Rows::load(input, unit, tile);
        let mut cells = pooled_mass::cells(input, unit, &rows, summaries);
        cells.read(candidates.iter().copied().chain(unit.past_blocks..cells.blocks()));
        cells.add_mass(1.0 / tokens.len() as f32, unit);
    }
    for row in unit.scores.chunks_mut(unit.stride) {
        for j in (0..unit.past_blocks).filter(|j| candidates.binary_search(j).is_err()) {
            // A NaN in one block makes NaN of the whole row: none of it can be judged.
            row[j] = if row[j].is_nan() { f32::NAN } else { 0.0 };
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
    let mut candidates = keep::ranked(&group_mass(unit), forced);
    candidates.truncate(count);
    candidates.sort_unstable();
    candidates
}

/// What all heads of the group say of each past block: the sum of their shares, head by head. A head that cannot be
/// judged says nothing.
fn group_mass(unit: &Unit) -> Vec<f32> {
    let mut mass = vec![0.0; unit.past_blocks];
    for row in unit.scores.chunks(unit.stride) {
        for (sum, share) in mass.iter_mut().zip(row) {
            *sum += if share.is_nan() { 0.0 } else { *share };
        }
    }
    mass
}

#[cfg(test)]
mod tests {
    use super::super::plain::{Row, assert_scores, batches, scores, settings};
    use super::*;
    use crate::settings::Selector;

    /// Keeps 1 of 8 blocks' worth of budget, and re-scores twice that.
    fn small_budget(block_size: usize) -> Settings {
        let keep = Keep::Density(0.125);
        Settings { keep, two_level_factor: 2.0, ..settings(Selector::TwoLevel, block_size) }
    }

    /// Best blocks of the row's group by pooled mass, sink and last past block included.
    fn best(row: &Row, tokens: &[usize]) -> Vec<usize> {
        let n = row.past_blocks();
        let count = (n.div_ceil(4)).max(n.min(2));
        let group = row.paged.shape.group_size();
        let heads = row.head / group * group..(row.head / group + 1) * group;
        let mut mass = vec![0.0; n];
        for head in heads {
            let row = Row { head, ..*row };
            let shares = row.mass(tokens, |i, j| row.pooled(i, j));
            mass.iter_mut().zip(shares).for_each(|(sum, share)| *sum += share);
        }
        (mass[0], mass[n - 1]) = (f64::INFINITY, f64::INFINITY);
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| mass[b].total_cmp(&mass[a]));
        order.truncate(count);
        order
    }

    #[test]
    fn the_best_pooled_blocks_get_exact_scores_and_the_others_none() {
        for (paged, block_size) in batches() {
            assert_scores(&paged, small_budget(block_size), |row| {
                let tokens = row.sampled();
                let best = best(row, &tokens);
                let is_exact = |j: usize| j >= row.past_blocks() || best.contains(&j);
                let cell = |i, j| if is_exact(j) { row.exact(i, j) } else { row.pooled(i, j) };
                let mass = row.mass(&tokens, cell);
                mass.iter().enumerate().map(|(j, &x)| if is_exact(j) { x } else { 0.0 }).collect()
            });
        }
    }

    #[test]
    fn a_nan_key_leaves_no_block_of_its_rows_judged() {
        let (mut paged, block_size) = batches().swap_remove(1);
        // Block 5 of 6; two candidates besides the forced ones.
        paged.requests[0].k[85 * 96] = f32::NAN;
        let paged = paged.repaged(1);
        let (_, scores) = scores(&paged, small_budget(block_size));
        assert!(scores[..6].iter().all(|x| x.is_nan()), "{scores:?}");
    }

    #[test]
    fn a_budget_of_everything_is_sampled_exact() {
        for (paged, block_size) in batches() {
            let all = Settings { keep: Keep::Density(1.0), ..small_budget(block_size) };
            let exact = Settings { selector: Selector::SampledExact, ..all };
            assert_eq!(scores(&paged, all).1, scores(&paged, exact).1);
        }
    }
}
