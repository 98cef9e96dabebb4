//! Summaries kept, sealed, through histories of pages used again: the bits of summaries made anew in every step.

use compactattn::settings::Selector;
use compactattn::types::Dtype;

use super::abi::Refusal;
use super::device::Device;
use super::memory::{Memory, Packing};
use super::step::{Done, Given, Step};
use crate::common::history::History;

const SELECTORS: [Selector; 3] = [Selector::FlashPrefill, Selector::PooledMass, Selector::TwoLevel];
const STEPS: usize = 10;

/// `count` histories; whether every step's scores, lists and results are those of fresh summaries, and whether without
/// seals some are not.
pub(crate) fn run(device: &Device, count: usize) -> bool {
    device.enter();
    let mut memory = Memory::new(device, Packing::Together);
    let mut other = [0, 0];
    for seed in 0..count as u64 {
        // Without seals for a few: what they show is that the comparison can fail.
        for (sealed, other) in [true, false].into_iter().zip(&mut other).take(if seed < 20 { 2 } else { 1 }) {
            match history(device, &mut memory, seed, sealed) {
                Ok(steps) => *other += steps,
                Err(why) => {
                    println!("  history {seed}: {why}");
                    return false;
                }
            }
        }
    }
    let [sealed, unsealed] = other;
    println!(
        "  {count} histories of {STEPS} steps: {sealed} steps differ from fresh summaries; without seals {unsealed}"
    );
    sealed == 0 && unsealed > 0
}

/// Steps in which kept summaries made a difference.
fn history(device: &Device, memory: &mut Memory, seed: u64, sealed: bool) -> Result<usize, String> {
    let mut history = History::new(seed, &SELECTORS, &[Dtype::Bf16, Dtype::F16]);
    let (mut kept, mut other): (Option<[Vec<u8>; 2]>, _) = (None, 0);
    for _ in 0..STEPS {
        let case = history.step();
        let step = Step::new(device, memory, &case, &Given::Nothing, std::ptr::null_mut());
        let mut step = step.map_err(|refusal| match refusal {
            Refusal::Unsupported(why) | Refusal::Fault(why) => why,
        })?;
        step.sealed = sealed;
        let parts = step.parts;
        let zeros = vec![0; parts.seals.len];
        let [means, seals] = kept.get_or_insert_with(|| [step.memory.get(parts.k_mean), zeros.clone()]);
        step.memory.set(parts.k_mean, means);
        step.memory.set(parts.seals, seals);
        if !sealed {
            step.update_completed()?;
        }
        let with_kept = once(&step)?;
        kept = Some([step.memory.get(parts.k_mean), step.memory.get(parts.seals)]);
        step.memory.poison(parts.k_mean);
        step.memory.set(parts.seals, &zeros);
        step.sealed = true;
        other += usize::from(once(&step)? != with_kept);
    }
    Ok(other)
}

/// Lists, boxes and results of the stages and of the whole pass.
fn once(step: &Step) -> Result<Vec<Vec<u8>>, String> {
    step.poison_results();
    let run = || -> Done {
        step.forward()?;
        step.stages()
    };
    run()?;
    let p = &step.parts;
    let parts = [p.whole[0], p.whole[1], p.staged[0], p.staged[1], p.scores, p.lists, p.counts, p.boxes];
    Ok(parts.iter().map(|&part| step.memory.get(part)).collect())
}
