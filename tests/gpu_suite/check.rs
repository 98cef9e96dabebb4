//! One case through the library on a device, and the f64 oracle's verdict on every stage.

use compactattn::capi::compactattn_stats;
use compactattn::plan::Layout;
use compactattn::reference::{Request, chunks, select_step};
use compactattn::settings::Selector;
use compactattn::summaries::Which;
use compactattn::union::Counts;

use super::abi::Refusal;
use super::cases;
use super::device::Device;
use super::driver::Handle;
use super::exports;
use super::memory::{Memory, Packing, Part};
use super::step::{Done, Given, Step, lse_stride, store_bytes, store_of, total_q};
use crate::common::case::Case;
use crate::common::judge::{self, Arithmetic};
use crate::common::pipeline::{Attended, Means, Selected};
use crate::common::pool::Packed;
use crate::common::rng::Rng;

/// What a device made of a case.
pub(crate) struct Ran {
    pub(crate) selected: Selected,
    pub(crate) attended: Attended,
    /// `[pages, slots, num_kv_heads, head_dim]`; empty where the selector reads none.
    pub(crate) k_mean: Vec<f32>,
    /// The same of values; empty without mean correction.
    pub(crate) v_mean: Vec<f32>,
}

/// A thread's own part of a device.
pub(crate) struct Worker<'d> {
    pub(crate) device: &'d Device,
    pub(crate) memory: Memory<'d>,
    /// For a second step beside it.
    pub(crate) spare: Memory<'d>,
    pub(crate) stream: Handle,
}

impl<'d> Worker<'d> {
    pub(crate) fn new(device: &'d Device, packing: Packing) -> Self {
        device.enter();
        let [memory, spare] = [(); 2].map(|()| Memory::new(device, packing));
        Self { device, memory, spare, stream: device.new_stream() }
    }

    /// Stage by stage and as a whole: the same bits, nothing written beside the outputs.
    pub(crate) fn run(&mut self, case: &Case, given: &Given) -> Result<Ran, Refusal> {
        let mut step = Step::new(self.device, &mut self.memory, case, given, self.stream)?;
        run(self.device, &mut step).map_err(Refusal::Fault)
    }

    /// Runs the case and judges every stage; what ran, for laws to build on.
    pub(crate) fn judged(&mut self, case: &Case, given: &Given) -> Result<Ran, Refusal> {
        let ran = self.run(case, given)?;
        judge(case, given, &ran, arithmetic(self.device, case)).map_err(Refusal::Fault)?;
        Ok(ran)
    }
}

/// What a device computes with.
pub(crate) fn arithmetic(device: &Device, case: &Case) -> Arithmetic {
    match device.cuda {
        Some(_) => Arithmetic::tensor_cores(case),
        None => Arithmetic::F32,
    }
}

impl Drop for Worker<'_> {
    fn drop(&mut self) {
        if let (Some(cuda), false) = (&self.device.cuda, std::thread::panicking()) {
            cuda.destroy_stream(self.stream);
        }
    }
}

/// Scores or masks for selector `external`.
pub(crate) fn given(case: &Case, rng: &mut Rng) -> Given {
    let scores = rng.once_in(2);
    given_as(case, rng, scores)
}

pub(crate) fn given_as(case: &Case, rng: &mut Rng, scores: bool) -> Given {
    if case.settings.selector != Selector::External {
        return Given::Nothing;
    }
    let layout = case.layout();
    if scores {
        return Given::Scores(judge::made_up_scores(rng, &layout));
    }
    let rows = layout.max_select_spans() * layout.shape.num_q_heads;
    Given::Masks(judge::sparse_bits(rng, rows * layout.mask_words()))
}

fn run(device: &Device, step: &mut Step) -> Result<Ran, String> {
    step.update_summaries()?;
    step.stages()?;
    step.exports(std::ptr::null_mut())?;
    device.sync();
    let before = step.plan.stats();
    step.forward()?;
    device.sync();
    let after = step.plan.stats();
    // A pass without queries does nothing, and may count as none.
    let counted = after.calls - before.calls;
    if counted != 1 && (counted != 0 || total_q(step.case) > 0) {
        return Err(format!("{counted} calls counted for one"));
    }
    step.memory.pull();
    memory_is_right(step, device.cuda.is_some())?;
    Ok(gather(step, &before, &after))
}

/// Inputs and canaries as they were; the stages' results are the whole pass's; both ways to lists agree.
fn memory_is_right(step: &Step, on_gpu: bool) -> Done {
    let (case, parts, memory) = (step.case, &step.parts, &*step.memory);
    for (name, part, was) in [
        ("q", parts.q, store_bytes(&case.q.store)),
        ("the KV pool", parts.kv, store_bytes(&case.pools.store)),
        ("k_scale", parts.scales[0], bytemuck::cast_slice(&case.pools.scales[0])),
        ("v_scale", parts.scales[1], bytemuck::cast_slice(&case.pools.scales[1])),
        ("cu_seqlens_q", parts.cu, bytemuck::cast_slice(&case.cu_seqlens_q)),
        ("seq_lens", parts.lens, bytemuck::cast_slice(&case.seq_lens)),
        ("block_table", parts.table, bytemuck::cast_slice(&case.table)),
    ] {
        if memory.bytes(part) != was {
            return Err(format!("{name} was written to"));
        }
    }
    if !memory.canaries_hold(step.plan.sizes.workspace_bytes as usize) {
        return Err("something beside a buffer was written to".into());
    }
    for (i, name) in ["out", "lse"].iter().enumerate() {
        let (staged, whole) = (memory.bytes(parts.staged[i]), memory.bytes(parts.whole[i]));
        if let Some(at) = (0..whole.len()).find(|&at| whole[at] != staged[at]) {
            return Err(format!("{name}: forward and the stages differ, first in byte {at}"));
        }
    }
    let lists: Vec<u32> = bytemuck::pod_collect_to_vec(memory.bytes(parts.lists));
    let exported = parts.exports.map(|part| bytemuck::pod_collect_to_vec(memory.bytes(part)));
    exports::compare(&exported, &exports::expected(case, &lists, &parts.exports, on_gpu)?)?;
    if step.keeps_rows() && memory.bytes(parts.lists) != memory.bytes(parts.lists_of_masks) {
        return Err("lists of scores and lists of their masks differ".into());
    }
    Ok(())
}

fn gather(step: &Step, before: &compactattn_stats, after: &compactattn_stats) -> Ran {
    let (parts, memory) = (&step.parts, &*step.memory);
    let delta = |of: fn(&compactattn_stats) -> i64| (of(after) - of(before)) as u64;
    let counts = Counts {
        lists: delta(|s| s.lists),
        candidates: delta(|s| s.candidates),
        selected: delta(|s| s.selected),
        forced: delta(|s| s.forced),
        guarded: delta(|s| s.guarded),
        dense: delta(|s| s.dense),
        refused: delta(|s| s.refused),
    };
    let selected = Selected {
        scores: bytemuck::pod_collect_to_vec(memory.bytes(parts.scores)),
        lists: bytemuck::pod_collect_to_vec(memory.bytes(parts.lists)),
        counts,
    };
    let k_mean = if step.needs_summaries() { memory.bytes(parts.k_mean) } else { &[] };
    let v_mean = if step.corrects() { memory.bytes(parts.v_mean) } else { &[] };
    let [k_mean, v_mean] = [k_mean, v_mean].map(bytemuck::pod_collect_to_vec);
    Ran { selected, attended: attended(step, parts.whole), k_mean, v_mean }
}

/// Tables and `results`, as they were pulled.
pub(crate) fn attended(step: &Step, results: [Part; 2]) -> Attended {
    let (case, parts, memory) = (step.case, &step.parts, &*step.memory);
    let out = Packed {
        store: store_of(case.shape.dtype, memory.bytes(results[0])),
        stride_token: case.q.stride_token,
        stride_head: case.q.stride_head,
    };
    Attended {
        rows: rows(case, &step.layout),
        counts: bytemuck::pod_collect_to_vec(memory.bytes(parts.counts)),
        stream_lens: bytemuck::pod_collect_to_vec(memory.bytes(parts.stream_lens)),
        boxes: bytemuck::pod_collect_to_vec(memory.bytes(parts.boxes)),
        out,
        lse: bytemuck::pod_collect_to_vec(memory.bytes(results[1])),
        lse_stride: lse_stride(case),
    }
}

fn rows(case: &Case, layout: &Layout) -> usize {
    layout.list_spans(&case.batch()).len() * layout.lists_per_span()
}

fn judge(case: &Case, given: &Given, ran: &Ran, arithmetic: Arithmetic) -> Done {
    let layout = case.layout();
    let requests = Request::gather_all(&case.batch());
    let lists = &ran.selected.lists;
    summaries(case, &layout, &requests, ran).map_err(|e| format!("summaries: {e}"))?;
    match given {
        Given::Nothing => {
            judge::selection(case, (&layout, &requests), &ran.selected, arithmetic)?;
        }
        Given::Gate(gate) => gate.judge(&layout, &requests, &ran.selected)?,
        Given::Scores(scores) => {
            let got = (&lists[..], ran.selected.counts.selected);
            judge::union_of(&layout, &requests, scores, got)?;
        }
        Given::Masks(masks) => judge::union_of_masks(&layout, &requests, masks, lists)?,
    }
    counts(&layout, &requests, ran)?;
    let bits = judge::list_bits(&layout, &requests, lists);
    judge::tables(case, &layout, &requests, (&bits, &ran.attended))?;
    judge::outputs_in(arithmetic, case, (&layout, &requests), (&bits, &ran.attended))
}

/// What the layer's statistics must say, whatever was selected.
fn counts(layout: &Layout, requests: &[Request], ran: &Ran) -> Done {
    let got = &ran.selected.counts;
    let candidates: usize = compactattn::reference::union::candidates(layout, requests).iter().sum();
    let spans = chunks(layout, requests, layout.settings.scope.query_span).len();
    let lists = spans * layout.lists_per_span();
    if (got.lists, got.candidates) != (lists as u64, candidates as u64) {
        return Err(format!("statistics: {got:?}, not {lists} lists and {candidates} candidates"));
    }
    if got.refused > 0 {
        return Err(format!("{} requests or lists of a good step refused", got.refused));
    }
    Ok(())
}

/// Means of whole blocks; slots of no block keep what they held.
fn summaries(case: &Case, layout: &Layout, requests: &[Request], ran: &Ran) -> Done {
    let mut want = Means::poisoned(case, layout);
    want.update(case, layout, Which::All);
    let elements = requests.iter().flat_map(|r| r.k.iter().chain(&r.v)).flatten().flatten();
    let largest = elements.fold(0.0_f64, |a, x| a.max(x.abs()));
    // A sum of block_size terms, in any order and in f32: a rounding each, of at most the running sum.
    let error = layout.settings.block_size as f64 * largest / f64::from(1_u32 << 24);
    for (name, want, got) in [("k_mean", &want.k, &ran.k_mean), ("v_mean", &want.v, &ran.v_mean)] {
        for (i, (&want, &got)) in want.iter().zip(got).enumerate() {
            if want.is_nan() != got.is_nan() || (want - got).abs() as f64 > error {
                return Err(format!("{name}[{i}] {got}, not {want} (+-{error:.1e})"));
            }
        }
    }
    Ok(())
}

/// Rows of lists that serve request `req`.
pub(crate) fn rows_of(case: &Case, layout: &Layout, req: usize) -> std::ops::Range<usize> {
    let spans = layout.list_spans(&case.batch());
    let before = |r: usize| spans.iter().filter(|span| span.req < r).count() * layout.lists_per_span();
    before(req)..before(req + 1)
}

/// Bits that a selection consists of, request by request: lists, and scores of its past blocks.
pub(crate) fn selection_bits(case: &Case, ran: &Ran, req: usize) -> (Vec<u32>, Vec<u32>) {
    let layout = case.layout();
    let words = layout.mask_words();
    let rows = rows_of(case, &layout, req);
    let lists = ran.selected.lists[rows.start * words..rows.end * words].to_vec();
    let batch = case.batch();
    let spans = layout.spans(&batch, select_step(&layout));
    let (heads, stride) = (case.shape.num_q_heads, layout.max_blocks());
    let past = layout.geometry.past_blocks(batch.past_len(req));
    let mine = spans.iter().enumerate().filter(|(_, span)| span.req == req && !span.dense);
    let scores = mine
        .flat_map(|(s, _)| (s * heads..(s + 1) * heads).flat_map(|row| row * stride..row * stride + past));
    (lists, scores.map(|i| ran.selected.scores[i].to_bits()).collect())
}

/// The case as a line to repeat it by.
pub(crate) fn repro(device: &Device, (seed, index): (u64, u64), case: &Case) -> String {
    let kind = if device.cuda.is_some() { "" } else { " --device cpu" };
    format!("gpu_suite differential --seed {seed} --case {index}{kind}   # {}", cases::describe(case))
}
