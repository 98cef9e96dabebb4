//! Which blocks of one row of scores stay: threshold, mass or density, between a floor and a cap.

use crate::mask;
use crate::settings::{Keep, Selector, Settings};

/// Blocks kept whatever their score.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Forced {
    /// First blocks.
    pub(crate) sink: usize,
    /// Last past blocks.
    pub(crate) local: usize,
}

impl Forced {
    /// The row's forced blocks.
    pub(crate) fn of(settings: &Settings) -> Self {
        Self { sink: settings.sink_blocks, local: settings.local_blocks }
    }

    /// How many of `n` past blocks are forced.
    pub(super) fn count(&self, n: usize) -> usize {
        self.sink.saturating_add(self.local).min(n)
    }

    /// Whether block `j` of `n` past blocks is forced.
    pub(crate) fn has(&self, j: usize, n: usize) -> bool {
        j < self.sink || n - j <= self.local
    }
}

/// Sets the bits of the blocks of `scores` (one a past block) that stay; bits already set stay set.
///
/// Forced blocks stay and count against the budget. NaN counts as the best score: a block that cannot be judged is
/// read. The cap never drops a forced block, the floor never exceeds the cap.
pub(crate) fn keep(settings: &Settings, scores: &[f32], row: &mut [u32]) {
    let n = scores.len();
    let forced = Forced::of(settings);
    let order = ranked(scores, forced);
    let forced_blocks = forced.count(n);
    let wanted = match settings.keep {
        Keep::Threshold(t) => {
            forced_blocks + order[forced_blocks..].iter().take_while(|&&j| worth(scores[j]) >= t).count()
        }
        Keep::Mass(share) => smallest_mass(scores, &order, share, counts_open_region(settings.selector)),
        Keep::Density(share) => blocks(share, n),
    };
    let most = blocks(settings.max_density, n);
    let least = blocks(settings.min_density, n).max(budget(settings, scores, forced));
    // Neither budget nor cap may drop a block that cannot be judged: the sick one must be read to be seen.
    let unjudged = order[forced_blocks..].iter().take_while(|&&j| worth(scores[j]) == f32::INFINITY).count();
    let kept = wanted.max(least).min(most).max(forced_blocks + unjudged);
    for &j in &order[..kept] {
        mask::set(row, j);
    }
}

/// Length of the prefix of the ranked blocks that holds `flashprefill`'s `min_budget` best of the row, forced or not.
fn budget(settings: &Settings, scores: &[f32], forced: Forced) -> usize {
    let best = settings.flashprefill.min_budget;
    if best == 0 || settings.selector != Selector::FlashPrefill {
        return 0;
    }
    let by_score = ranked(scores, Forced { sink: 0, local: 0 });
    let free = by_score.iter().take(best).filter(|&&j| !forced.has(j, scores.len())).count();
    forced.count(scores.len()) + free
}

/// Forced blocks first, then by score, best first; equal scores by block.
pub(super) fn ranked(scores: &[f32], forced: Forced) -> Vec<usize> {
    let n = scores.len();
    let mut order: Vec<usize> = (0..n).collect();
    let key = |j: usize| if forced.has(j, n) { f32::INFINITY } else { worth(scores[j]) };
    order.sort_by(|&a, &b| {
        let by_force = forced.has(b, n).cmp(&forced.has(a, n));
        by_force.then(key(b).total_cmp(&key(a))).then(a.cmp(&b))
    });
    order
}

/// A score with NaN read as the best.
fn worth(score: f32) -> f32 {
    if score.is_nan() { f32::INFINITY } else { score }
}

/// Whether `selector`'s scores are shares of all that a row attends to, so that what they lack to 1 is the mass of the
/// open region. Those blocks are always read: their mass counts as held before any past block is taken, and lists whose
/// rows look mostly there stay short (tests/bench/record/h100/2026-11-23-keep-mass.txt). Not `two_level`, which lacks
/// the mass of blocks it has not read too, and not `pooled_mass`, whose pooled past weighs too little beside the rest.
pub(crate) fn counts_open_region(selector: Selector) -> bool {
    matches!(selector, Selector::SampledExact | Selector::Oracle | Selector::XAttention)
}

/// Length of the shortest prefix of `order` that holds `share` of all finite scores (and of the open region's mass).
fn smallest_mass(scores: &[f32], order: &[usize], share: f32, with_open: bool) -> usize {
    let mass = |j: usize| if scores[j].is_finite() { f64::from(scores[j].max(0.0)) } else { 0.0 };
    let past: f64 = order.iter().map(|&j| mass(j)).sum();
    let open = if with_open { (1.0 - past).max(0.0) } else { 0.0 };
    // Forced blocks may hold the share by themselves; blocks that cannot be judged rank after them and stay too.
    let unjudged = order.iter().rposition(|&j| scores[j].is_nan()).map_or(0, |last| last + 1);
    let mut held = open;
    for (i, &j) in order.iter().enumerate() {
        if held >= f64::from(share) * (past + open) {
            return i.max(unjudged);
        }
        held += mass(j);
    }
    order.len()
}

/// `ceil(share * n)`, at most `n`.
///
/// The last bit of an f32 share must not buy a block: 0.4 of 5 is 2, although the f32 nearest to 0.4 lies above it.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of n, between 0 and n")]
pub(super) fn blocks(share: f32, n: usize) -> usize {
    if share >= 1.0 {
        return n;
    }
    let product = f64::from(share) * n as f64 * (1.0 - f64::from(f32::EPSILON));
    (product.ceil() as usize).min(n)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::FlashPrefill;

    /// No floor, no cap, nothing forced.
    fn plain(keep: Keep) -> Settings {
        Settings {
            keep,
            min_density: 0.0,
            max_density: 1.0,
            sink_blocks: 0,
            local_blocks: 0,
            ..Settings::of(Selector::SampledExact)
        }
    }

    fn kept(settings: &Settings, scores: &[f32]) -> Vec<usize> {
        let mut row = vec![0; mask::words(scores.len())];
        keep(settings, scores, &mut row);
        mask::ones(&row, scores.len()).collect()
    }

    #[test]
    fn a_threshold_keeps_scores_at_and_above_it() {
        let scores = [0.1, 0.5, 0.49, 0.9, 0.0];
        assert_eq!(kept(&plain(Keep::Threshold(0.5)), &scores), [1, 3]);
        assert!(kept(&plain(Keep::Threshold(1.0)), &scores).is_empty());
    }

    #[test]
    fn neither_budget_nor_cap_drops_a_block_that_cannot_be_judged() {
        let nan = [0.9, f32::NAN, 0.1, f32::NAN, f32::NAN];
        for keep in [Keep::Density(0.2), Keep::Mass(0.1), Keep::Threshold(1.0)] {
            let capped = Settings { max_density: 0.2, ..plain(keep) };
            assert_eq!(kept(&capped, &nan), [1, 3, 4]);
            assert_eq!(kept(&capped, &[f32::NAN; 3]), [0, 1, 2]);
        }
    }

    #[test]
    fn mass_keeps_the_fewest_best_blocks_that_hold_the_share() {
        let scores = [0.125, 0.5, 0.0, 0.25, 0.125];
        assert_eq!(kept(&plain(Keep::Mass(0.5)), &scores), [1]);
        assert_eq!(kept(&plain(Keep::Mass(0.625)), &scores), [1, 3]);
        assert_eq!(kept(&plain(Keep::Mass(1.0)), &scores), [0, 1, 3, 4]);
    }

    #[test]
    fn what_shares_lack_to_one_is_open_and_held_before_any_block() {
        let scores = [0.125, 0.25, 0.0];
        assert!(kept(&plain(Keep::Mass(0.5)), &scores).is_empty());
        assert_eq!(kept(&plain(Keep::Mass(0.875)), &scores), [1]);
        assert_eq!(kept(&plain(Keep::Mass(1.0)), &scores), [0, 1]);
        assert!(kept(&plain(Keep::Mass(1.0)), &[0.0, 0.0]).is_empty());
    }

    #[test]
    fn scores_that_are_no_shares_of_all_count_by_what_past_blocks_hold() {
        for selector in [Selector::PooledMass, Selector::TwoLevel, Selector::External] {
            let past = Settings { selector, ..plain(Keep::Mass(0.75)) };
            assert_eq!(kept(&past, &[0.03, 0.01]), [0]);
            assert!(kept(&past, &[0.0, 0.0]).is_empty());
        }
    }

    #[test]
    fn density_rounds_up_and_ties_go_to_the_lower_block() {
        let scores = [0.2, 0.5, 0.2, 0.2, 0.2];
        assert_eq!(kept(&plain(Keep::Density(0.41)), &scores), [0, 1, 2]);
        assert_eq!(kept(&plain(Keep::Density(0.4)), &scores), [0, 1]);
        for percent in 1..=100 {
            let share = percent as f32 / 100.0;
            assert_eq!((blocks(share, 100), blocks(share, 700)), (percent, percent * 7), "{share}");
        }
    }

    #[test]
    fn the_floor_fills_up_with_the_best_and_the_cap_drops_the_worst() {
        let scores = [0.4, 0.3, 0.2, 0.1];
        let floor = Settings { min_density: 0.5, ..plain(Keep::Threshold(1.0)) };
        assert_eq!(kept(&floor, &scores), [0, 1]);
        let cap = Settings { max_density: 0.5, ..plain(Keep::Threshold(0.05)) };
        assert_eq!(kept(&cap, &scores), [0, 1]);
    }

    #[test]
    fn forced_blocks_stay_and_count_against_the_budget() {
        let scores = [0.0, 0.9, 0.5, 0.8, 0.1];
        let forced = Settings { sink_blocks: 1, local_blocks: 1, ..plain(Keep::Density(0.6)) };
        assert_eq!(kept(&forced, &scores), [0, 1, 4]);
        let threshold = Settings { keep: Keep::Threshold(0.7), ..forced };
        assert_eq!(kept(&threshold, &scores), [0, 1, 3, 4]);
        let mass = Settings { keep: Keep::Mass(0.4), ..forced };
        assert_eq!(kept(&mass, &scores), [0, 1, 4]);
    }

    #[test]
    fn the_cap_never_drops_a_forced_block_even_where_forced_ranges_meet() {
        let forced = Settings { sink_blocks: 2, local_blocks: 2, ..plain(Keep::Density(0.1)) };
        let capped = Settings { max_density: 0.1, ..forced };
        assert_eq!(kept(&capped, &[0.5; 6]), [0, 1, 4, 5]);
        assert_eq!(kept(&capped, &[0.5; 3]), [0, 1, 2]);
    }

    #[test]
    fn a_forced_range_may_be_longer_than_any_row() {
        for (sink_blocks, local_blocks) in [(usize::MAX, 0), (0, usize::MAX), (usize::MAX, usize::MAX)] {
            let forced = Settings { sink_blocks, local_blocks, ..plain(Keep::Density(0.1)) };
            assert_eq!(kept(&forced, &[0.5; 3]), [0, 1, 2]);
        }
    }

    #[test]
    fn nan_is_the_best_score_under_every_rule() {
        let scores = [0.5, 0.25, f32::NAN, 0.75];
        assert_eq!(kept(&plain(Keep::Threshold(1.0)), &scores), [2]);
        assert_eq!(kept(&plain(Keep::Density(0.25)), &scores), [2]);
        assert_eq!(kept(&plain(Keep::Mass(0.5)), &scores), [2, 3]);
        assert_eq!(kept(&plain(Keep::Mass(0.5)), &[f32::NAN; 3]), [0, 1, 2]);
    }

    #[test]
    fn bits_already_set_stay_set() {
        let mut row = [1 << 4];
        keep(&plain(Keep::Density(0.2)), &[0.0, 1.0, 0.0, 0.0, 0.0], &mut row);
        assert_eq!(row, [1 << 4 | 1 << 1]);
    }

    #[test]
    fn min_budget_keeps_the_best_of_the_row_beside_the_forced() {
        let flashprefill = FlashPrefill { non_voting_spans: 0, min_budget: 2, relative_to_past: false };
        let fp = Settings {
            selector: Selector::FlashPrefill,
            sink_blocks: 1,
            flashprefill,
            ..plain(Keep::Threshold(0.95))
        };
        assert_eq!(kept(&fp, &[0.1, 0.2, 0.9, 0.8, 0.3]), [0, 2, 3]);
        // A forced block among the best uses up one of them.
        assert_eq!(kept(&fp, &[0.9, 0.2, 0.9, 0.8, 0.3]), [0, 2]);
        let other = Settings { selector: Selector::AttnGate, ..fp };
        assert_eq!(kept(&other, &[0.1, 0.2, 0.9, 0.8, 0.3]), [0]);
    }
}
