//! Mean correction over lists of the caller's own, which are anything: rows of means of more than one tile, so that pieces
//! are cut among them, and lists with holes under requests that are dense by policy. Judged against the f64 oracle.

use compactattn::mask;
use compactattn::reference::Request;
use compactattn::settings::{DenseRules, Scope, Selector, Settings};
use compactattn::types::{Dtype, Shape};

use super::abi::Refusal;
use super::cases;
use super::check::{Worker, arithmetic, attended};
use super::device::Device;
use super::rounds::Rounds;
use super::scenes;
use super::step::{Done, Given, Step};
use crate::common::case::{Case, Lens};
use crate::common::judge;
use crate::common::rng::Rng;

pub(crate) fn run(device: &Device, rounds: &Rounds) -> bool {
    rounds.run(device, one)
}

/// One for each kernel that corrects: head_dim, and whether the cache is e4m3.
const KERNELS: [(usize, bool); 6] =
    [(64, false), (96, false), (128, false), (256, false), (64, true), (128, true)];

fn one(worker: &mut Worker, rng: &mut Rng, index: u64) -> Result<(), Refusal> {
    let kernel = KERNELS[(index % 6) as usize];
    // Every other round of all kernels is long.
    let case = if (index / 6).is_multiple_of(2) { long(rng, kernel) } else { short(rng, kernel) };
    let arithmetic = arithmetic(worker.device, &case);
    let mut step = Step::new(worker.device, &mut worker.memory, &case, &Given::Nothing, worker.stream)?;
    let verdict = with_own_lists(&mut step, rng).and_then(|()| {
        let layout = &step.layout;
        let requests = Request::gather_all(&case.batch());
        let lists: Vec<u32> = bytemuck::pod_collect_to_vec(step.memory.bytes(step.parts.lists));
        let bits = judge::list_bits(layout, &requests, &lists);
        let attended = attended(&step, step.parts.staged);
        judge::tables(&case, layout, &requests, (&bits, &attended))?;
        judge::outputs_in(arithmetic, &case, (layout, &requests), (&bits, &attended))
    });
    verdict.map_err(|why| Refusal::Fault(format!("{}: {why}", cases::describe(&case))))
}

/// Past tokens of more than 128 means, that is of two tiles and more.
fn long(rng: &mut Rng, kernel: (usize, bool)) -> Case {
    let q = rng.within(1, 3);
    let lens = [Lens { q, kv: q + rng.within(65_600, 72_000) }, Lens { q: 2, kv: rng.within(2, 2000) }];
    with(rng, kernel, [2, 1], &lens)
}

fn short(rng: &mut Rng, kernel: (usize, bool)) -> Case {
    let lens: Vec<Lens> = (0..rng.within(1, 3))
        .map(|_| (rng.pick(&[1, 5, 140]), rng.below(3000)))
        .map(|(q, past)| Lens { q, kv: q + past })
        .collect();
    let heads = rng.pick(&[[4, 2], [7, 1], [8, 2]]);
    with(rng, kernel, heads, &lens)
}

fn with(rng: &mut Rng, (head_dim, over_e4m3): (usize, bool), heads: [usize; 2], lens: &[Lens]) -> Case {
    let dtype = rng.pick(&[Dtype::Bf16, Dtype::F16]);
    let shape = scenes::shape(heads, head_dim, rng.pick(&[16, 64, 256]), dtype);
    let shape = Shape { kv_dtype: if over_e4m3 { Dtype::E4m3 } else { dtype }, ..shape };
    let dense_below = rng.pick(&[0, 1_000_000]);
    let settings = Settings {
        mean_correction: true,
        scope: rng.pick(&[Scope::GROUP_CHUNK, Scope::HEAD_CHUNK, Scope::HEAD_128]),
        dense: DenseRules { below_kv_len: dense_below, max_q_len: 0, prefix_tokens: 0 },
        ..scenes::settings(Selector::Streaming, rng.pick(&[16, 32, 64, 128, 256]))
    };
    Case::with(rng, shape, settings, lens)
}

/// attend over lists that keep any of the past blocks, each list its own share.
fn with_own_lists(step: &mut Step, rng: &mut Rng) -> Done {
    step.update_summaries()?;
    step.stages()?;
    let (layout, words) = (step.layout, step.layout.mask_words());
    let mut lists: Vec<u32> = bytemuck::pod_collect_to_vec(&step.memory.get(step.parts.lists));
    let spans = layout.list_spans(&step.case.batch());
    for (i, row) in lists.chunks_mut(words).take(spans.len() * layout.lists_per_span()).enumerate() {
        let past = layout.geometry.past_blocks(spans[i / layout.lists_per_span()].past);
        let share = rng.pick(&[0, 1, 30, 95]);
        for block in 0..past {
            row[block / 32] &= !(1 << (block % 32));
            if rng.below(100) < share {
                mask::set(row, block);
            }
        }
    }
    step.memory.set(step.parts.lists, bytemuck::cast_slice(&lists));
    // What the first pass has left of means is gone.
    step.memory.forget_workspace();
    step.poison_results();
    step.attend_lists()?;
    step.memory.pull();
    Ok(())
}
