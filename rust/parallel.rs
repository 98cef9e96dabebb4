//! Work shared out to scoped threads: nothing outlives the call, so a host process may fork or unload between calls.

use std::sync::{Mutex, PoisonError};

/// How many threads a context may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parallel {
    threads: usize,
}

impl Parallel {
    /// `threads` workers; 0 asks the system how many cores it grants.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        Self { threads: if threads == 0 { cores() } else { threads } }
    }

    /// Workers.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `work` on every item, each item once, on the first worker that is free; no more workers than items.
    ///
    /// Which thread takes an item is left open, so `work` must not depend on it.
    pub fn for_each<T: Send>(&self, items: impl Iterator<Item = T> + Send, work: impl Fn(T) + Sync) {
        if self.threads == 1 {
            return items.for_each(work);
        }
        let most = items.size_hint().1.unwrap_or(usize::MAX);
        let queue = Mutex::new(items);
        let drain = || loop {
            let item = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            match item {
                Some(item) => work(item),
                None => break,
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..self.threads.min(most) {
                // Where the system grants no more threads, those that run do the rest.
                if std::thread::Builder::new().spawn_scoped(scope, drain).is_err() {
                    break;
                }
            }
            drain();
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn no_thread_is_started_that_would_find_nothing_to_do() {
        let seen = Mutex::new(HashSet::new());
        // More workers than any system grants: starting them all would end in a panic.
        Parallel::new(usize::MAX).for_each(0..2, |_| {
            seen.lock().unwrap().insert(std::thread::current().id());
        });
        assert!(seen.into_inner().unwrap().len() <= 2);
    }

    #[test]
    fn every_item_is_worked_on_once() {
        for threads in [1, 4] {
            let sum = AtomicUsize::new(0);
            Parallel::new(threads).for_each(0..100, |i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 4950);
        }
    }
}
