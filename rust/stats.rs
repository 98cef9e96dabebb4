//! Counters per layer, added by every call and read at any time without stopping one.

use std::sync::atomic::{AtomicU64, Ordering};

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
}

/// The counters behind [`Stats`].
#[derive(Debug, Default)]
pub(crate) struct LayerStats {
    calls: AtomicU64,
    lists: AtomicU64,
    candidates: AtomicU64,
    selected: AtomicU64,
    forced: AtomicU64,
    guarded: AtomicU64,
    dense: AtomicU64,
    refused: AtomicU64,
}

impl LayerStats {
    /// Adds one call.
    pub(crate) fn add(&self, counts: &Counts) {
        for (total, more) in [
            (&self.calls, 1),
            (&self.lists, counts.lists),
            (&self.candidates, counts.candidates),
            (&self.selected, counts.selected),
            (&self.forced, counts.forced),
            (&self.guarded, counts.guarded),
            (&self.dense, counts.dense),
            (&self.refused, counts.refused),
        ] {
            // Each counter stands alone; a reader may see a call half added.
            total.fetch_add(more, Ordering::Relaxed);
        }
    }

    /// The sums so far.
    pub(crate) fn read(&self) -> Stats {
        let get = |x: &AtomicU64| x.load(Ordering::Relaxed);
        Stats {
            calls: get(&self.calls),
            counts: Counts {
                lists: get(&self.lists),
                candidates: get(&self.candidates),
                selected: get(&self.selected),
                forced: get(&self.forced),
                guarded: get(&self.guarded),
                dense: get(&self.dense),
                refused: get(&self.refused),
            },
        }
    }
}
