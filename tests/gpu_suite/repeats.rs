//! The same call again: the same bits, whichever CTA came first. And every kernel once, for sanitizers.

use super::abi::Refusal;
use super::check::{self, Worker};
use super::device::Device;
use super::driver::Handle;
use super::memory::Packing;
use super::scenes;
use super::step::{Done, Given, Step};
use crate::common::case::Case;
use crate::common::rng::Rng;

/// Stages and whole pass `count` times over on each shape; whether all bits are the first time's.
pub(crate) fn run(device: &Device, count: usize) -> bool {
    let mut worker = Worker::new(device, Packing::Together);
    let mut right = true;
    let scenes = scenes::repeated();
    println!("  {} shapes, {count} times each", scenes.len());
    for (name, case) in scenes {
        let verdict = match worker.judged(&case, &Given::Nothing) {
            Ok(_) => repeat(&mut worker, &case, count),
            Err(refusal) => Err(refusal),
        };
        right &= said(name, verdict);
    }
    right
}

/// Prints why not; whether it is right or not offered.
fn said(name: &str, verdict: Result<(), Refusal>) -> bool {
    match verdict {
        Ok(()) => true,
        Err(Refusal::Unsupported(why)) => {
            println!("  {name}: not offered here: {why}");
            true
        }
        Err(Refusal::Fault(why)) => {
            println!("  {name}: {why}");
            false
        }
    }
}

fn repeat(worker: &mut Worker, case: &Case, count: usize) -> Result<(), Refusal> {
    let stream: Handle = worker.stream;
    let step = Step::new(worker.device, &mut worker.memory, case, &Given::Nothing, stream)?;
    (|| -> Done {
        let first = once(&step)?;
        for i in 1..count {
            let again = once(&step)?;
            if let Some(part) = (0..first.len()).find(|&part| first[part] != again[part]) {
                return Err(format!("repeat {i}: other bits in {}", PARTS[part]));
            }
        }
        Ok(())
    })()
    .map_err(Refusal::Fault)
}

const PARTS: [&str; 8] =
    ["lists", "counts", "stream_lens", "boxes", "out of the stages", "lse of the stages", "out", "lse"];

fn once(step: &Step) -> Result<Vec<Vec<u8>>, String> {
    step.poison_results();
    step.update_summaries()?;
    step.stages()?;
    step.forward()?;
    let p = &step.parts;
    let parts = [p.lists, p.counts, p.stream_lens, p.boxes, p.staged[0], p.staged[1], p.whole[0], p.whole[1]];
    Ok(parts.iter().map(|&part| step.memory.get(part)).collect())
}

/// Small cases, judged; no threads, so that a sanitizer's report names the case printed before it.
pub(crate) fn miniatures(device: &Device) -> bool {
    let mut worker = Worker::new(device, Packing::Apart);
    let mut right = true;
    for (i, case) in scenes::miniatures().iter().enumerate() {
        let name = format!("case {i}: {}", super::cases::describe(case));
        let given = check::given_as(case, &mut Rng::new(i as u64), i % 2 == 0);
        let passed = said(&name, worker.judged(case, &given).map(|_| ()));
        right &= passed;
    }
    right
}
