//! Counters per layer, added by every call and read at any time without stopping one.

use crate::sync::{AtomicU64, Ordering};
use crate::union::Counts;

/// What one layer has selected since the plan was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// `forward` calls.
    pub calls: u64,
    /// Sums of the calls' counts.
    pub counts: Counts,
}

impl Stats {
    /// Share of past blocks that sparse lists read; `None` before the first one.
    #[must_use]
    pub fn density(&self) -> Option<f64> {
        (self.counts.candidates > 0).then(|| self.counts.selected as f64 / self.counts.candidates as f64)
    }

    /// What the counters hold, in the order of `Stats` in cuda/params.h; calls may go on meanwhile.
    pub(crate) fn of(counters: &[AtomicU64; NUM_COUNTERS]) -> Self {
        let [calls, lists, candidates, selected, forced, guarded, dense, refused] = read(counters);
        Self { calls, counts: Counts { lists, candidates, selected, forced, guarded, dense, refused } }
    }
}

/// Numbers in [`Stats`].
pub(crate) const NUM_COUNTERS: usize = 8;

/// The counters behind [`Stats`].
#[derive(Debug, Default)]
pub(crate) struct LayerStats([AtomicU64; NUM_COUNTERS]);

impl LayerStats {
    /// Adds one call.
    pub(crate) fn add(&self, counts: &Counts) {
        let &Counts { lists, candidates, selected, forced, guarded, dense, refused } = counts;
        add(&self.0, [1, lists, candidates, selected, forced, guarded, dense, refused]);
    }

    /// The sums so far.
    pub(crate) fn read(&self) -> Stats {
        Stats::of(&self.0)
    }
}

// Each counter stands alone, and is added to and read whole; a reader may see a call half added.
fn add<const N: usize>(counters: &[AtomicU64; N], more: [u64; N]) {
    for (counter, more) in counters.iter().zip(more) {
        counter.fetch_add(more, Ordering::Relaxed);
    }
}

fn read<const N: usize>(counters: &[AtomicU64; N]) -> [u64; N] {
    counters.each_ref().map(|counter| counter.load(Ordering::Relaxed))
}

#[cfg(all(test, loom))]
#[path = "stats_model.rs"]
mod model;
