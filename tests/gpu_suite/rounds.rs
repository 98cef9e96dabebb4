//! Numbered cases of a part, on all threads, until their number or the time is up. A seed and a number repeat one.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::abi::Refusal;
use super::cases;
use super::check::Worker;
use super::device::Device;
use super::differential::text_of;
use super::memory::Packing;
use crate::common::rng::Rng;
use compactattn::types::Dtype;

/// Which cases of a part, and for how long.
#[derive(Clone, Copy)]
pub(crate) struct Rounds {
    /// As the command line names it.
    pub(crate) part: &'static str,
    pub(crate) seed: u64,
    /// This one alone.
    pub(crate) case: Option<u64>,
    pub(crate) count: u64,
    /// No case starts after so many; 0 = no limit.
    pub(crate) seconds: u64,
    pub(crate) threads: usize,
    pub(crate) packing: Packing,
    /// Of the soak's cache.
    pub(crate) kv: Dtype,
    /// Whether others may be using the GPU.
    pub(crate) shared: bool,
    /// Whether the soak leaks on purpose.
    pub(crate) leak: bool,
}

/// Bytes of results that other tenants' contents have changed.
static FOREIGN: AtomicU64 = AtomicU64::new(0);

/// Counts the bytes of a result in which another tenant shows; whether there are none.
pub(crate) fn is_own(wanted: &[u8], got: &[u8]) -> bool {
    let differing = wanted.iter().zip(got).filter(|(a, b)| a != b).count() + wanted.len().abs_diff(got.len());
    FOREIGN.fetch_add(differing as u64, Ordering::Relaxed);
    differing == 0
}

/// What came of them.
#[derive(Default)]
struct Tally {
    done: u64,
    unsupported: u64,
    wrong: Vec<(u64, String)>,
}

impl Rounds {
    /// Runs `one` for each, with its number; whether all were right, and some ran.
    pub(crate) fn run<F>(&self, device: &Device, one: F) -> bool
    where
        F: Fn(&mut Worker, &mut Rng, u64) -> Result<(), Refusal> + Sync,
    {
        let (first, count) = self.case.map_or((0, self.count), |case| (case, 1));
        let next = AtomicU64::new(first);
        let lost = AtomicBool::new(false);
        let tally = Mutex::new(Tally::default());
        let until = self.until();
        std::thread::scope(|scope| {
            for _ in 0..self.threads.max(1) {
                scope.spawn(|| {
                    let mut worker = Worker::new(device, self.packing);
                    while !lost.load(Ordering::Relaxed) && until.is_none_or(|until| Instant::now() < until) {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        if index >= first + count {
                            break;
                        }
                        if !self.try_one(&mut worker, index, (&one, &tally)) {
                            lost.store(true, Ordering::Relaxed);
                            // Its memory cannot be given back through a broken context.
                            std::mem::forget(worker);
                            break;
                        }
                    }
                });
            }
        });
        let tally = tally.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.report(device, &tally, lost.into_inner())
    }

    /// When no further case may start.
    pub(crate) fn until(&self) -> Option<Instant> {
        (self.seconds > 0).then(|| Instant::now() + Duration::from_secs(self.seconds))
    }

    /// The command that repeats a case.
    pub(crate) fn repro(&self, device: &Device, index: u64) -> String {
        let kind = if device.cuda.is_some() { "" } else { " --device cpu" };
        format!("gpu_suite {} --seed {} --case {index}{kind}", self.part, self.seed)
    }

    /// False if the device is of no more use.
    fn try_one<F>(&self, worker: &mut Worker, index: u64, (one, tally): (&F, &Mutex<Tally>)) -> bool
    where
        F: Fn(&mut Worker, &mut Rng, u64) -> Result<(), Refusal>,
    {
        let on_cpu = worker.device.cuda.is_none();
        let mut rng = cases::rng(self.seed, index);
        let verdict = catch_unwind(AssertUnwindSafe(|| one(worker, &mut rng, index)));
        let mut tally = tally.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match verdict {
            Ok(Ok(())) => tally.done += 1,
            Ok(Err(Refusal::Unsupported(_))) => tally.unsupported += 1,
            Ok(Err(Refusal::Fault(why))) => tally.wrong.push((index, why)),
            Err(panic) => {
                tally.wrong.push((index, format!("panic: {}", text_of(panic.as_ref()))));
                return on_cpu;
            }
        }
        true
    }

    fn report(&self, device: &Device, tally: &Tally, lost: bool) -> bool {
        let (done, wrong) = (tally.done, tally.wrong.len());
        println!(
            "  seed {}: {done} cases right, {wrong} wrong, {} not offered here, {} foreign bytes",
            self.seed,
            tally.unsupported,
            FOREIGN.load(Ordering::Relaxed)
        );
        let mut failures = tally.wrong.clone();
        failures.sort();
        for (index, why) in failures.iter().take(20) {
            println!("  {}\n    {why}", self.repro(device, *index));
        }
        if lost {
            println!(
                "  the device failed; cases that ran beside it may be at fault: repeat with --threads 1"
            );
        }
        // Nothing tried is nothing shown.
        wrong == 0 && !lost && done > 0
    }
}
