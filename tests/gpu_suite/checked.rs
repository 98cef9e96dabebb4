//! Checked mode (COMPACTATTN_CHECK=1): a table that is damaged after it was built is found before attend follows it.
//!
//! The list's queries see nothing, every other row has the bits it had, and the list is counted. On a GPU, where the
//! stages can be called one by one; on the CPU context such a table is refused by status, and rust/check.rs has tests.

use compactattn::settings::{Selector, Settings};

use super::abi::Refusal;
use super::cases;
use super::check::Worker;
use super::device::Device;
use super::rounds::Rounds;
use super::scenes;
use super::step::{Done, Given, Step, lse_stride};
use crate::common::case::{Case, Lens};
use crate::common::rng::Rng;

pub(crate) const WANTED: &str = "COMPACTATTN_CHECK must be 1, and the context a GPU's";

pub(crate) fn available(device: &Device) -> bool {
    device.cuda.is_some() && std::env::var("COMPACTATTN_CHECK").is_ok_and(|value| value == "1")
}

pub(crate) fn run(device: &Device, rounds: &Rounds) -> bool {
    if !available(device) {
        println!("  not run: {WANTED}");
        return false;
    }
    rounds.run(device, |worker, rng, _| one(worker, rng))
}

/// What is changed, with the list's bits at hand and without them.
#[derive(Clone, Copy, Debug)]
enum Damage {
    OtherPage,
    Swapped,
    Twice,
    Outside,
    Negative,
    Fewer,
    TooMany,
}

const BY_BITS: [Damage; 7] = [
    Damage::OtherPage,
    Damage::Swapped,
    Damage::Twice,
    Damage::Outside,
    Damage::Negative,
    Damage::Fewer,
    Damage::TooMany,
];
const BY_RANGE: [Damage; 4] = [Damage::Outside, Damage::Negative, Damage::Fewer, Damage::TooMany];

fn one(worker: &mut Worker, rng: &mut Rng) -> Result<(), Refusal> {
    let corrected = rng.once_in(2);
    let drawn =
        scenes::settings(rng.pick(&[Selector::PooledMass, Selector::FlashPrefill]), rng.pick(&[16, 32, 64]));
    let settings = Settings { mean_correction: corrected, ..drawn };
    let shape = cases::shape_for(rng, &settings);
    let lens: Vec<Lens> = (0..rng.within(1, 3))
        .map(|_| (rng.within(1, 60), rng.within(100, 700)))
        .map(|(q, past)| Lens { q, kv: q + past })
        .collect();
    let case = Case { splits: 1, ..Case::with(rng, shape, settings, &lens) };
    let mut step = Step::new(worker.device, &mut worker.memory, &case, &Given::Nothing, worker.stream)?;
    let verdict = damaged(&mut step, rng, if corrected { &BY_BITS } else { &BY_RANGE });
    verdict.map_err(|why| Refusal::Fault(format!("{}: {why}", cases::describe(&case))))
}

fn damaged(step: &mut Step, rng: &mut Rng, kinds: &[Damage]) -> Done {
    step.update_summaries()?;
    step.stages()?;
    let good = step.parts.staged.map(|part| step.memory.get(part));
    let lists = step.layout.list_spans(&step.case.batch()).len() * step.layout.lists_per_span();
    let (row, kind) = (rng.below(lists), rng.pick(kinds));
    let before = refused(step);
    if !spoil(step, row, kind) {
        return Ok(());
    }
    step.poison_results();
    step.attend_again()?;
    let got = step.parts.staged.map(|part| step.memory.get(part));
    let counted = refused(step) - before;
    if counted != 1 {
        return Err(format!("{kind:?} in list {row}: {counted} lists counted"));
    }
    others_agree(step, row, (&good, &got)).map_err(|e| format!("{kind:?} in list {row}: {e}"))
}

fn refused(step: &Step) -> i64 {
    step.memory.get_at(step.parts.counts, 0, 4);
    step.plan.stats().refused
}

/// False if the list is too short for it.
fn spoil(step: &mut Step, row: usize, kind: Damage) -> bool {
    let (p, most) = (step.parts, step.plan.sizes.max_boxes as usize);
    let word = |step: &Step, part, at: usize| -> i32 {
        let bytes = step.memory.get_at(part, at * 4, 4);
        i32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[i]))
    };
    let count = word(step, p.counts, row);
    if count < 2 {
        return false;
    }
    let at = row * most;
    let boxes = [0, 1].map(|i| word(step, p.boxes, at + i));
    let writes: &[_] = &match kind {
        Damage::OtherPage => [(p.boxes, at, boxes[0] ^ 1)],
        Damage::Outside => [(p.boxes, at + count as usize - 1, i32::MAX)],
        Damage::Negative => [(p.boxes, at, -1)],
        Damage::Twice => [(p.boxes, at + 1, boxes[0])],
        Damage::Fewer => [(p.counts, row, count - 1)],
        Damage::TooMany => [(p.counts, row, i32::MAX)],
        Damage::Swapped => {
            step.memory.set_at(p.boxes, at * 4, bytemuck::bytes_of(&boxes[1]));
            [(p.boxes, at + 1, boxes[0])]
        }
    };
    for (part, at, value) in writes {
        step.memory.set_at(*part, at * 4, bytemuck::bytes_of(value));
    }
    true
}

/// Rows that the list does not serve are as they were; those it serves see nothing, means neither.
fn others_agree(step: &Step, row: usize, (good, got): (&[Vec<u8>; 2], &[Vec<u8>; 2])) -> Done {
    let (case, layout) = (step.case, &step.layout);
    let span = layout.list_spans(&case.batch())[row / layout.lists_per_span()];
    let heads = layout.list_heads(row % layout.lists_per_span()).1;
    let bytes = |results: &[Vec<u8>; 2], token: usize, head: usize| {
        let at = (token * case.q.stride_token + head * case.q.stride_head) * 2;
        let out = results[0][at..at + case.shape.head_dim * 2].to_vec();
        let at = (head * lse_stride(case) + token) * 4;
        (out, f32::from_le_bytes([0, 1, 2, 3].map(|i| results[1][at + i])))
    };
    for (token, head) in
        (0..case.batch().total_q()).flat_map(|t| (0..case.shape.num_q_heads).map(move |h| (t, h)))
    {
        let served = (span.q_start..span.q_start + span.len).contains(&token) && heads.contains(&head);
        let (was, is) = (bytes(good, token, head), bytes(got, token, head));
        if !served && (was.0 != is.0 || was.1.to_bits() != is.1.to_bits()) {
            return Err(format!("token {token}, head {head} has other bits"));
        }
        let blind = is.1 == f32::NEG_INFINITY && is.0.iter().all(|&byte| byte == 0);
        if served && !blind {
            return Err(format!("token {token}, head {head} still sees something"));
        }
    }
    Ok(())
}
