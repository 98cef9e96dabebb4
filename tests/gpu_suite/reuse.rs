//! Pages, summaries, workspace and outputs used before by another tenant: no bit of a step shows it.
//!
//! A tenant with huge, infinite and NaN contents runs first, on the same plan; its pages are then given away, and what
//! the next one does not write stays as it was. The judge is the same step in memory that nobody used.

use super::abi::Refusal;
use super::cases;
use super::check::Worker;
use super::device::Device;
use super::rounds::{Rounds, is_own};
use super::step::{Given, Step, store_bytes};
use crate::common::case::{Case, Lens};
use crate::common::rng::Rng;
use crate::common::tenants;
use compactattn::settings::Selector;

pub(crate) fn run(device: &Device, rounds: &Rounds) -> bool {
    rounds.run(device, |worker, rng, _| one(worker, rng))
}

fn one(worker: &mut Worker, rng: &mut Rng) -> Result<(), Refusal> {
    let [before, mut case] = tenants_of_one_pool(rng);
    let virgin = case.clone();
    tenants::on_leftovers(&mut case, &before);
    let sealed = rng.once_in(2);
    let (device, stream) = (worker.device, worker.stream);
    let fault = |e: String| Refusal::Fault(format!("{}, sealed {sealed}: {e}", cases::describe(&case)));
    let wanted = {
        let mut step = Step::new(device, &mut worker.spare, &virgin, &Given::Nothing, stream)?;
        step.memory.forget_workspace();
        step.sealed = false;
        step.update_summaries().map_err(fault)?;
        once(&step).map_err(fault)?
    };
    let mut step = Step::new(device, &mut worker.memory, &before, &Given::Nothing, stream)?;
    step.sealed = sealed;
    step.memory.set(step.parts.seals, &vec![0; step.parts.seals.len]);
    if !sealed {
        step.update_summaries().map_err(fault)?;
    }
    once(&step).map_err(fault)?;
    hand_over(&mut step, &case);
    step.case = &case;
    if !sealed {
        step.update_summaries().map_err(fault)?;
    }
    let got = once(&step).map_err(fault)?;
    match (0..got.len()).find(|&part| !is_own(&wanted[part], &got[part])) {
        None => Ok(()),
        Some(part) => Err(fault(format!("{} shows who was there before", PARTS[part]))),
    }
}

/// Two steps of as many requests and queries, on the same pool, at the same strides.
fn tenants_of_one_pool(rng: &mut Rng) -> [Case; 2] {
    let mut settings = cases::settings(rng);
    if settings.selector == Selector::External {
        (settings.selector, settings.block_size) = (Selector::FlashPrefill, settings.block_size.max(16));
    }
    let shape = cases::shape_for(rng, &settings);
    let (reqs, each) = (rng.within(1, 4), rng.pick(&[1, 20, 40]));
    let longest = rng.pick(&[300, 600, 1000]);
    let full = vec![Lens { q: each, kv: longest }; reqs];
    let mut base = Case { splits: 1, ..Case::with(rng, shape, settings, &full) };
    // Shared pages leave a pool too small for requests that share none.
    let pages = full.iter().map(|l| l.kv.div_ceil(shape.page_size)).sum::<usize>();
    if base.pools.num_pages < pages {
        base.pools = Case::with(rng, shape, settings, &[Lens { q: 1, kv: pages * shape.page_size }]).pools;
    }
    [true, false].map(|wild| {
        let mut case = base.clone();
        let lens: Vec<Lens> = (0..reqs)
            .map(|_| Lens {
                q: each,
                kv: if rng.once_in(8) { rng.below(each + 1) } else { rng.within(each, longest) },
            })
            .collect();
        case.refill(rng, &lens);
        if wild {
            tenants::make_wild(&mut case, rng);
        }
        case
    })
}

fn hand_over(step: &mut Step, case: &Case) {
    let parts = step.parts;
    for (part, bytes) in [
        (parts.q, store_bytes(&case.q.store)),
        (parts.kv, store_bytes(&case.pools.store)),
        (parts.cu, bytemuck::cast_slice(&case.cu_seqlens_q)),
        (parts.lens, bytemuck::cast_slice(&case.seq_lens)),
        (parts.table, bytemuck::cast_slice(&case.table)),
    ] {
        step.memory.set(part, bytes);
    }
}

const PARTS: [&str; 7] =
    ["lists", "counts", "stream_lens", "out of the stages", "lse of the stages", "out", "lse"];

/// Every part but what rows that are not there leave as it was: those are poisoned before.
fn once(step: &Step) -> Result<Vec<Vec<u8>>, String> {
    step.poison_results();
    let p = &step.parts;
    for part in [p.lists, p.counts, p.stream_lens] {
        step.memory.poison(part);
    }
    step.forward()?;
    step.stages()?;
    let parts = [p.lists, p.counts, p.stream_lens, p.staged[0], p.staged[1], p.whole[0], p.whole[1]];
    Ok(parts.iter().map(|&part| step.memory.get(part)).collect())
}
