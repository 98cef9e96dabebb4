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
        (self.sink + self.local).min(n)
    }

    /// Whether block `j` of `n` past blocks is forced.
    pub(crate) fn has(&self, j: usize, n: usize) -> bool {
        j < self.sink || j + self.local >= n
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
    let kept = wanted.max(least).min(most).max(forced_blocks);
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
/// open region. Those blocks are always read: their mass counts as held before any past block is taken.
fn counts_open_region(selector: Selector) -> bool {
    selector == Selector::XAttention
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
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of n, between 0 and n")]
pub(super) fn blocks(share: f32, n: usize) -> usize {
    ((f64::from(share) * n as f64).ceil() as usize).min(n)
}
