//! Random cases against the f64 oracle, on all cores: each thread has a stream of its own.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use compactattn::settings::Selector;

use super::abi::Refusal;
use super::check::{self, Worker};
use super::device::Device;
use super::memory::Packing;
use super::{cases, laws};

/// Which cases to judge.
#[derive(Clone, Copy)]
pub(crate) struct Range {
    pub(crate) seed: u64,
    pub(crate) first: u64,
    pub(crate) count: u64,
    pub(crate) threads: usize,
    /// No case starts after it.
    pub(crate) until: Option<Instant>,
}

/// What came of it.
#[derive(Default)]
struct Tally {
    judged: BTreeMap<&'static str, u64>,
    /// Of those, cases where some past blocks were selected and some were not.
    choices: u64,
    unsupported: BTreeMap<String, u64>,
    wrong: Vec<(u64, String)>,
}

/// Judges the cases, one in three by a law too; whether all were right.
pub(crate) fn run(device: &Device, range: Range) -> bool {
    let next = AtomicU64::new(range.first);
    let lost = AtomicBool::new(false);
    let tally = Mutex::new(Tally::default());
    std::thread::scope(|scope| {
        for _ in 0..range.threads {
            scope.spawn(|| {
                let mut worker = Worker::new(device, Packing::Together);
                let late = || range.until.is_some_and(|until| Instant::now() >= until);
                while !lost.load(Ordering::Relaxed) && !late() {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= range.first + range.count {
                        break;
                    }
                    if !judge(&mut worker, (range.seed, index), &tally) {
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
    report(device, range, &tally, lost.into_inner())
}

/// False if the device is of no more use.
fn judge(worker: &mut Worker, (seed, index): (u64, u64), tally: &Mutex<Tally>) -> bool {
    let case = cases::random(seed, index);
    let mut rng = cases::rng(!seed, index);
    let given = check::given(&case, &mut rng);
    let judged = catch_unwind(AssertUnwindSafe(|| {
        let ran = worker.judged(&case, &given)?;
        if rng.once_in(3) {
            laws::one(worker, &mut rng, &case, (&given, &ran))?;
        }
        let counts = ran.selected.counts;
        Ok((1..counts.candidates).contains(&counts.selected))
    }));
    let mut tally = tally.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    match judged {
        Ok(Ok(choice)) => {
            *tally.judged.entry(case.settings.selector.name()).or_default() += 1;
            tally.choices += u64::from(choice);
        }
        Ok(Err(Refusal::Unsupported(why))) => *tally.unsupported.entry(why).or_default() += 1,
        Ok(Err(Refusal::Fault(why))) => tally.wrong.push((index, why)),
        Err(panic) => {
            tally.wrong.push((index, format!("panic: {}", text_of(panic.as_ref()))));
            return worker.device.cuda.is_none();
        }
    }
    true
}

pub(crate) fn text_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or(panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or("no text".into())
}

fn report(device: &Device, range: Range, tally: &Tally, lost: bool) -> bool {
    let judged: u64 = tally.judged.values().sum();
    let by: Vec<String> = tally.judged.iter().map(|(name, n)| format!("{name} {n}")).collect();
    println!(
        "  seed {}: {judged} of {} cases judged and right ({}; {} with blocks left out), {} wrong",
        range.seed,
        range.count,
        by.join(", "),
        tally.choices,
        tally.wrong.len()
    );
    for (why, count) in &tally.unsupported {
        println!("  {count} cases not offered here: {why}");
    }
    let mut wrong = tally.wrong.clone();
    wrong.sort();
    for (index, why) in wrong.iter().take(20) {
        let case = cases::random(range.seed, *index);
        println!("  {}\n    {why}", check::repro(device, (range.seed, *index), &case));
    }
    if lost {
        println!("  the device failed; cases that ran beside it may be at fault: repeat with --threads 1");
    }
    // Nothing judged is nothing shown.
    wrong.is_empty() && !lost && judged > 0
}

/// Every request of a batch of 16 alone, for each selector that scores.
pub(crate) fn batches_of_16(device: &Device) -> bool {
    let mut worker = Worker::new(device, Packing::Together);
    let mut right = true;
    for selector in [
        Selector::SampledExact,
        Selector::FlashPrefill,
        Selector::PooledMass,
        Selector::TwoLevel,
        Selector::XAttention,
        Selector::Oracle,
    ] {
        for seed in 0..2 {
            match laws::batch_of_16(&mut worker, selector, seed) {
                Ok(()) => {}
                Err(Refusal::Unsupported(why)) => println!("  not offered here: {why}"),
                Err(Refusal::Fault(why)) => {
                    println!("  {why}");
                    right = false;
                }
            }
        }
    }
    right
}
