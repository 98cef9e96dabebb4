//! Which blocks of a row of scores stay, for scores that are known only to lie in an interval.

use crate::settings::{Keep, Selector, Settings};

/// A score: at least `lo`, at most `hi`. NaN in both marks a block that cannot be judged.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// Lower end.
    pub lo: f64,
    /// Upper end.
    pub hi: f64,
}

impl Score {
    /// A score known exactly.
    #[must_use]
    pub fn exact(x: f64) -> Self {
        Self { lo: x, hi: x }
    }

    /// A score known up to a relative and an absolute error.
    #[must_use]
    pub fn within(x: f64, relative: f64, absolute: f64) -> Self {
        let error = x.abs() * relative + absolute;
        Self { lo: (x - error).max(0.0), hi: x + error }
    }

    fn is_nan(&self) -> bool {
        self.lo.is_nan()
    }

    /// Both ends, NaN read as the best score.
    fn worth(&self) -> (f64, f64) {
        if self.is_nan() { (f64::INFINITY, f64::INFINITY) } else { (self.lo, self.hi) }
    }
}

/// Blocks that every set of scores within the intervals keeps, and blocks that some do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Kept whatever the scores are.
    pub must: Vec<bool>,
    /// Kept for some.
    pub may: Vec<bool>,
}

impl Kept {
    /// The same answer for all: `false` or `true` for `n` blocks.
    #[must_use]
    pub fn all(n: usize, kept: bool) -> Self {
        Self { must: vec![kept; n], may: vec![kept; n] }
    }

    /// Blocks kept by either.
    pub fn or(&mut self, other: &Self) {
        for (a, b) in self.must.iter_mut().zip(&other.must) {
            *a |= b;
        }
        for (a, b) in self.may.iter_mut().zip(&other.may) {
            *a |= b;
        }
    }
}

/// Whether sink or local rules keep block `j` of `n` past blocks.
#[must_use]
pub fn forced(settings: &Settings, j: usize, n: usize) -> bool {
    j < settings.sink_blocks || n - j <= settings.local_blocks
}

/// Ranks blocks (forced first, then the better score, then the lower block) and keeps the first so many.
#[must_use]
pub fn keep(settings: &Settings, scores: &[Score]) -> Kept {
    ranked(settings, scores, how_many(settings, scores))
}

/// The first `fewest` to `most` blocks of the ranking.
fn ranked(settings: &Settings, scores: &[Score], (fewest, most): (usize, usize)) -> Kept {
    let n = scores.len();
    let class: Vec<bool> = (0..n).map(|j| forced(settings, j, n)).collect();
    let surely_before = |i: usize, j: usize| {
        let (a, b) = (scores[i].worth(), scores[j].worth());
        let same = a == b && a.0 == a.1;
        match (class[i], class[j]) {
            (true, false) => true,
            (false, true) => false,
            (true, true) => i < j,
            (false, false) => a.0 > b.1 || (same && i < j),
        }
    };
    let before = |j: usize| (0..n).filter(|&i| i != j && surely_before(i, j)).count();
    let perhaps_before = |j: usize| (0..n).filter(|&i| i != j && !surely_before(j, i)).count();
    Kept {
        must: (0..n).map(|j| perhaps_before(j) < fewest).collect(),
        may: (0..n).map(|j| before(j) < most).collect(),
    }
}

/// The fewest and the most blocks that stay.
fn how_many(settings: &Settings, scores: &[Score]) -> (usize, usize) {
    let n = scores.len();
    let forced_blocks = (0..n).filter(|&j| forced(settings, j, n)).count();
    let free = || (0..n).filter(|&j| !forced(settings, j, n));
    let (fewest, most) = match settings.keep {
        Keep::Threshold(t) => {
            let t = f64::from(t);
            let sure = free().filter(|&j| scores[j].worth().0 >= t).count();
            let perhaps = free().filter(|&j| scores[j].worth().1 >= t).count();
            (forced_blocks + sure, forced_blocks + perhaps)
        }
        Keep::Mass(share) => for_mass(settings, scores, f64::from(share)),
        Keep::Density(share) => (ceil_share(share, n), ceil_share(share, n)),
    };
    let floor = ceil_share(settings.min_density, n);
    let cap = ceil_share(settings.max_density, n);
    let best = budget(settings, scores);
    // Blocks that cannot be judged are as good as forced.
    let sure = forced_blocks + free().filter(|&j| scores[j].worth().0.is_infinite()).count();
    let bound = |count: usize, best: usize| count.max(floor).max(best).min(cap).max(sure);
    (bound(fewest, best.0), bound(most, best.1))
}

/// Forced blocks and those of FlashPrefill's `min_budget` best of the row that are not forced: fewest and most.
fn budget(settings: &Settings, scores: &[Score]) -> (usize, usize) {
    let (n, wanted) = (scores.len(), settings.flashprefill.min_budget);
    if settings.selector != Selector::FlashPrefill || wanted == 0 {
        return (0, 0);
    }
    let unforced = Settings { sink_blocks: 0, local_blocks: 0, ..*settings };
    let best = ranked(&unforced, scores, (wanted, wanted));
    let free = |bits: &[bool]| (0..n).filter(|&j| bits[j] && !forced(settings, j, n)).count();
    let forced_blocks = (0..n).filter(|&j| forced(settings, j, n)).count();
    (forced_blocks + free(&best.must), forced_blocks + free(&best.may))
}

/// The shortest prefix of the ranking that holds `share` of the total: for the kindest and the unkindest scores.
fn for_mass(settings: &Settings, scores: &[Score], share: f64) -> (usize, usize) {
    let n = scores.len();
    let of = |end: fn(&Score) -> f64| {
        let mass = |j: usize| if end(&scores[j]).is_finite() { end(&scores[j]).max(0.0) } else { 0.0 };
        let mut order: Vec<usize> = (0..n).collect();
        // Stable: equal scores stay in block order. Infinite and NaN scores go first and weigh nothing.
        order.sort_by(|&a, &b| {
            let rank = |j: usize| if end(&scores[j]).is_nan() { f64::INFINITY } else { end(&scores[j]) };
            forced(settings, b, n).cmp(&forced(settings, a, n)).then(rank(b).total_cmp(&rank(a)))
        });
        order.iter().map(|&j| mass(j)).collect::<Vec<f64>>()
    };
    let (low, high) = (of(|s| s.lo), of(|s| s.hi));
    let total = |xs: &[f64]| xs.iter().sum::<f64>();
    // These scores are shares of all that is visible: what they lack to 1 lies in the open region, is read whatever is
    // kept, and so is held before any past block is.
    let of_all_visible = match settings.selector {
        Selector::SampledExact | Selector::Oracle | Selector::XAttention => true,
        Selector::Dense | Selector::Streaming | Selector::FlashPrefill | Selector::PooledMass => false,
        Selector::TwoLevel | Selector::Quoka | Selector::AttnGate | Selector::External => false,
    };
    let open = |past: f64| if of_all_visible { (1.0 - past).max(0.0) } else { 0.0 };
    let prefix = |held: &[f64], open: f64, wanted: f64| {
        let sum = |i: usize| open + held[..i].iter().sum::<f64>();
        (0..n).find(|&i| sum(i) >= wanted).unwrap_or(n)
    };
    let (few, many) = (total(&low), total(&high));
    let (open_low, open_high) = (open(many), open(few));
    // With an open share the same numbers can be added in two orders, which differ by f64's rounding.
    let rounding = if open_high > 0.0 { (n + 1) as f64 * f64::EPSILON } else { 0.0 };
    let fewest = prefix(&high, open_high, share * (few + open_low) - rounding);
    let most = prefix(&low, open_low, share * (many + open_high) + rounding);
    // A running sum may reach all of it before masses that f64 loses beside the rest; sums that lose nothing go on to
    // the last block with any.
    let with_any = high.iter().rposition(|&mass| mass > 0.0).map_or(0, |last| last + 1);
    (fewest, if share >= 1.0 { most.max(with_any) } else { most })
}

/// `ceil(share * n)`, at most `n`; a share is a decimal that f32 rounds, and that rounding buys no block.
pub(super) fn ceil_share(share: f32, n: usize) -> usize {
    if share >= 1.0 {
        return n;
    }
    let wanted = f64::from(share) * n as f64 * (1.0 - f64::from(f32::EPSILON));
    (0..n).find(|&count| count as f64 >= wanted).unwrap_or(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits(keep_rule: Keep, scores: &[Score]) -> (String, String) {
        let settings = Settings {
            keep: keep_rule,
            sink_blocks: 1,
            local_blocks: 0,
            min_density: 0.0,
            max_density: 1.0,
            ..Settings::of(Selector::Oracle)
        };
        let kept = keep(&settings, scores);
        let text = |bits: &[bool]| bits.iter().map(|&bit| if bit { '1' } else { '0' }).collect();
        (text(&kept.must), text(&kept.may))
    }

    #[test]
    fn exact_scores_leave_no_doubt_and_ties_go_to_the_lower_block() {
        let scores = [0.0, 0.5, 0.25, 0.25, 0.0].map(Score::exact);
        for (rule, want) in [
            (Keep::Threshold(0.25), "11110"),
            (Keep::Mass(0.75), "11100"),
            (Keep::Mass(1.0), "11110"),
            (Keep::Density(0.5), "11100"),
        ] {
            assert_eq!(bits(rule, &scores), (want.into(), want.into()), "{rule:?}");
        }
    }

    #[test]
    fn a_score_near_the_line_may_stay_or_go() {
        let scores = [0.0, 0.5, 0.25, 0.1].map(|x| Score::within(x, 0.01, 0.0));
        assert_eq!(bits(Keep::Threshold(0.25), &scores), ("1100".into(), "1110".into()));
        assert_eq!(bits(Keep::Density(0.5), &scores), ("1100".into(), "1100".into()));
    }

    #[test]
    fn a_mass_that_f64_loses_beside_the_rest_may_stay_or_go() {
        let scores = [0.5, 1e-30, 0.5, 0.0].map(Score::exact);
        assert_eq!(bits(Keep::Mass(1.0), &scores), ("1010".into(), "1110".into()));
        assert_eq!(bits(Keep::Mass(0.9), &scores), ("1010".into(), "1010".into()));
    }

    #[test]
    fn what_shares_lack_to_one_is_held_before_any_block() {
        let scores = [0.0, 0.25, 0.125, 0.0].map(Score::exact);
        for (share, want) in [(0.5, "1000"), (0.75, "1100"), (0.9, "1110")] {
            assert_eq!(bits(Keep::Mass(share), &scores), (want.into(), want.into()), "{share}");
        }
    }

    #[test]
    fn what_cannot_be_judged_stays_even_if_forced_blocks_hold_the_share() {
        let scores = [1.0, 0.0, f64::NAN, 0.0].map(Score::exact);
        assert_eq!(bits(Keep::Mass(0.5), &scores).0, "1010");
    }
}
