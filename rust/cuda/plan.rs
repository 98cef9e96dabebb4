//! A plan on a GPU: the stages of one step in order, on the caller's stream, without a host sync or an allocation.

use std::ffi::c_void;
use std::sync::Arc;

use super::attend::{self, DeviceOutput, Kernel};
use super::batch::{DeviceBatch, int32};
use super::checked;
use super::context::Context;
use super::gate::DeviceGate;
use super::kernels::{Arg, Grid};
use super::memory::{DeviceBuffer, MappedHost};
use super::params::{self, STATS_WORDS};
use super::refuse::{check_layer, check_mean_values, check_summaries};
use super::scratch::Scratch;
use super::select::{self, Scoring};
use super::shared::{self, GateShape};
use super::step;
use super::stream::Stream;
use super::summaries::{self, MeansAt};
use crate::error::{Error, Result, Status};
use crate::plan::Layout;
use crate::run;
use crate::stage::Stage;
use crate::stats::Stats;
use crate::summaries::Which;
use crate::types::Dtype;

/// What the device side of a plan owns: counters of what its layers selected.
#[derive(Debug)]
pub struct Plan {
    context: Arc<Context>,
    /// `[layers]` `Stats`, added to by every call.
    stats: DeviceBuffer,
    /// A copy that the host can read while the GPU works.
    mirror: MappedHost,
    /// Weights of selector `attn_gate`, by layer.
    gates: Vec<Option<DeviceGate>>,
    /// Cuts fall between items only.
    whole_items: bool,
    /// Lists are looked at once more before attend.
    pub(super) checked: bool,
}

/// The caller's verdict for selector `external`, in device memory.
#[derive(Clone, Copy, Debug)]
pub enum External {
    /// f32 `[select spans, num_q_heads, max_blocks]`.
    Scores(u64),
    /// u32 `[select spans, num_q_heads, mask_words]`.
    Masks(u64),
}

/// One call: what it works on and where.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// The layer, which picks statistics.
    pub layer: usize,
    /// The layer's layout, or that of the call's own settings.
    pub layout: &'a Layout,
    /// The step.
    pub batch: &'a DeviceBatch,
    /// Mean keys; 0 = none.
    pub k_mean: u64,
    /// Mean values; 0 = none.
    pub v_mean: u64,
    /// For selector `external`.
    pub external: Option<External>,
    /// [`Plan::workspace_bytes`] bytes, aligned.
    pub workspace: u64,
    /// Where everything runs, in order.
    pub stream: *mut c_void,
}

impl Plan {
    /// The device side of `plan`; `splits` is that of its description (0 = equal shares for all CTAs, 1 = whole items).
    ///
    /// # Errors
    /// [`Status::Unsupported`] naming what CUDA does not offer, [`Status::OutOfMemory`], or the driver's.
    pub fn new(context: Arc<Context>, plan: &run::Plan, splits: usize) -> Result<Self> {
        if splits > 1 {
            let wanted = "0 (equal shares) or 1 (lists are never split) on CUDA";
            return Err(Error::new(Status::Unsupported, "num_splits", wanted, splits));
        }
        let layers = plan.layouts();
        for (layer, layout) in layers.iter().enumerate() {
            let gate = plan.gate(layer, layout)?;
            let shape =
                gate.map(|gate| GateShape { gate_dim: gate.gate_dim(), by_group: gate.is_by_group() });
            check_layer(&context, layout, shape)?;
        }
        let gate = |(layer, layout)| {
            plan.gate(layer, layout)?.map(|gate| DeviceGate::new(&context, gate)).transpose()
        };
        let gates = layers.iter().enumerate().map(gate).collect::<Result<Vec<_>>>()?;
        let words = layers.len() * STATS_WORDS;
        let mut stats = DeviceBuffer::new(context.device(), words * 8)?;
        stats.upload(0, &vec![0_u64; words])?;
        let mirror = MappedHost::new(context.device(), words)?;
        Ok(Self { context, stats, mirror, gates, whole_items: splits == 1, checked: plan.is_checked() })
    }

    /// The context it lives on.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// What the largest step of layer `layer` under `layout`, its own or that of a call's settings, needs.
    ///
    /// # Errors
    /// [`Status::Overflow`], [`Status::Unsupported`].
    pub fn workspace_bytes(&self, layer: usize, layout: &Layout) -> Result<usize> {
        check_layer(&self.context, layout, self.gate(layer).map(DeviceGate::shape))?;
        self.scratch(0, layer, layout).map(|(_, scratch)| scratch.bytes)
    }

    fn scratch(&self, address: u64, layer: usize, layout: &Layout) -> Result<(Kernel, Scratch)> {
        let kernel = Kernel::choose(&self.context, layout)?;
        let gate_len = self.gate(layer).map_or(0, DeviceGate::len);
        let cells = select::scratch_len(layout, gate_len)?;
        Ok((kernel, Scratch::at(address, layout, kernel.num_ctas(&self.context), cells)?))
    }

    fn gate(&self, layer: usize) -> Option<&DeviceGate> {
        self.gates.get(layer).and_then(Option::as_ref)
    }

    /// What a layer has selected in the calls that the GPU has finished.
    pub fn stats(&self, layer: usize) -> Stats {
        Stats::of(&self.mirror.words().as_chunks::<STATS_WORDS>().0[layer])
    }

    /// batch → plan → select → union → table → plan → attend and combine.
    ///
    /// # Errors
    /// [`Status::Null`] for summaries that the selector needs, or the driver's.
    ///
    /// # Safety
    /// Each address in `call` and `output` is memory of this GPU with the extent its field says, results apart from
    /// one another and from what is read; `call.stream` is one of this GPU's. All of it stays alive until the stream
    /// has passed the call.
    pub unsafe fn forward(&self, call: &Call, output: &DeviceOutput) -> Result<()> {
        check_summaries(call.layout, call.k_mean != 0)?;
        check_mean_values(call.layout, call.v_mean != 0)?;
        // SAFETY: this function's contract.
        let mut run = unsafe { self.begin(call) }?;
        run.correct(call.layout.settings.mean_correction, false)?;
        Stage::Plan.run(|| run.plan_spans())?;
        let mut has_lists = false;
        if !matches!(call.external, Some(External::Masks(_))) && !run.only_dense() {
            has_lists = Stage::Select.run(|| run.select(true))?;
            if !has_lists {
                let relates = select::relates_rows(call.layout, &run.step);
                Stage::Union.run(|| run.keep_rows(relates))?;
            }
        }
        if !has_lists {
            Stage::Union.run(|| run.union_table())?;
        }
        Stage::Attend.run(|| run.attend(output))
    }

    /// Scores (and masks, unless their address is 0) into the caller's buffers.
    ///
    /// # Errors
    /// As [`Plan::forward`].
    ///
    /// # Safety
    /// As [`Plan::forward`].
    pub unsafe fn select(&self, call: &Call, scores: u64, masks: u64) -> Result<()> {
        check_summaries(call.layout, call.k_mean != 0)?;
        // SAFETY: this function's contract.
        let mut run = unsafe { self.begin(call) }?;
        run.step.stages.scores = scores;
        Stage::Plan.run(|| run.plan_spans())?;
        Stage::Select.run(|| run.select(false))?;
        if masks != 0 {
            run.step.stages.masks = masks;
            run.step.settings.keep_at_rows = 1;
            Stage::Select.run(|| run.keep_rows(false))?;
        }
        Ok(())
    }

    /// The external scores or masks of `call` to lists.
    ///
    /// # Errors
    /// As [`Plan::forward`].
    ///
    /// # Safety
    /// As [`Plan::forward`].
    pub unsafe fn unite(&self, call: &Call, lists: u64) -> Result<()> {
        // SAFETY: this function's contract.
        let mut run = unsafe { self.begin(call) }?;
        run.step.stages.lists = lists;
        Stage::Plan.run(|| run.plan_spans())?;
        if matches!(call.external, Some(External::Scores(_))) {
            Stage::Union.run(|| run.keep_rows(false))?;
        }
        Stage::Union.run(|| run.union_table())
    }

    /// Lists to boxes.
    ///
    /// # Errors
    /// As [`Plan::forward`].
    ///
    /// # Safety
    /// As [`Plan::forward`].
    pub unsafe fn table(&self, call: &Call, lists: u64, table: &DeviceTable) -> Result<()> {
        // SAFETY: this function's contract.
        let mut run = unsafe { self.begin(call) }?;
        run.step.stages.lists = lists;
        run.give(table);
        Stage::Plan.run(|| run.plan_spans())?;
        Stage::Table.run(|| run.table())
    }

    /// attend and combine over the caller's table; with the `lists` it was built from (0 = none), what they leave out is
    /// corrected by the call's means.
    ///
    /// # Errors
    /// [`Status::Unsupported`] for lists under a layer without room for means, those of [`Plan::forward`].
    ///
    /// # Safety
    /// As [`Plan::forward`].
    pub unsafe fn attend(
        &self,
        call: &Call,
        (table, lists): (&DeviceTable, u64),
        output: &DeviceOutput,
    ) -> Result<()> {
        // SAFETY: this function's contract.
        let mut run = unsafe { self.begin(call) }?;
        run.give(table);
        run.step.stages.lists = lists;
        run.correct(lists != 0, true)?;
        Stage::Plan.run(|| run.plan_spans())?;
        Stage::Attend.run(|| run.attend(output))
    }

    /// Block means of the blocks that the step completes, or of all; with seals also of those of other keys.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// As [`Plan::forward`].
    pub unsafe fn update_summaries(&self, call: &Call, which: Which, means: MeansAt) -> Result<()> {
        // SAFETY: this function's contract.
        let stream = unsafe { self.context.stream(call.stream) }?;
        let entered = self.context.enter()?;
        let step = step::step(call.layout, call.batch, &Scratch::at(0, call.layout, 1, 0)?);
        let (context, dtype) = (&self.context, call.layout.shape.kv_dtype);
        Stage::Summaries.run(|| summaries::update(context, stream, &step, (which, means), dtype))?;
        drop(entered);
        Ok(())
    }

    /// The stages of `call`, none of them launched; the device is entered.
    ///
    /// # Safety
    /// As [`Plan::forward`].
    pub(super) unsafe fn begin<'a>(&'a self, call: &'a Call<'a>) -> Result<Run<'a>> {
        let (kernel, scratch) = self.scratch(call.workspace, call.layer, call.layout)?;
        let mut step = step::step(call.layout, call.batch, &scratch);
        let stats = (call.layer * STATS_WORDS * 8) as u64;
        step.stages.k_mean = call.k_mean;
        step.stages.stats = self.stats.address() + stats;
        step.stages.stats_mirror = self.mirror.address() + stats;
        step.stages.whole_items = i32::from(self.whole_items);
        match call.external {
            Some(External::Scores(scores)) => step.stages.scores = scores,
            Some(External::Masks(masks)) => step.stages.masks = masks,
            None => {}
        }
        // SAFETY: the caller's promise (`Plan::forward`).
        let stream = unsafe { self.context.stream(call.stream) }?;
        let entered = self.context.enter()?;
        Ok(Run { plan: self, call, kernel, scratch, step, means: None, stream, _entered: entered })
    }
}

/// Lists of boxes in device memory, laid out as [`crate::table::Table`].
#[derive(Clone, Copy, Debug)]
pub struct DeviceTable {
    /// `[rows]` i32.
    pub counts: u64,
    /// `[rows]` i32.
    pub stream_lens: u64,
    /// `[rows, max_boxes]` i32.
    pub boxes: u64,
}

/// The stages of one call.
pub(super) struct Run<'a> {
    pub(super) plan: &'a Plan,
    call: &'a Call<'a>,
    kernel: Kernel,
    pub(super) scratch: Scratch,
    pub(super) step: params::Step,
    /// With mean correction.
    means: Option<params::Means>,
    pub(super) stream: Stream,
    _entered: super::device::Entered<'a>,
}

impl Run<'_> {
    fn give(&mut self, table: &DeviceTable) {
        let stages = &mut self.step.stages;
        (stages.counts, stages.stream_lens, stages.boxes) = (table.counts, table.stream_lens, table.boxes);
    }

    /// Lists are where they will be; those of a caller may leave out what they like of requests that are dense.
    fn correct(&mut self, is_on: bool, are_a_callers: bool) -> Result<()> {
        let rows = self.scratch.means;
        if is_on && rows.len == 0 {
            let wanted = "none, or a layer with mean_correction on CUDA, whose workspace has room for means";
            return Err(Error::new(Status::Unsupported, "args.lists", wanted, "lists"));
        }
        let (stages, layout) = (&self.step.stages, &self.step.layout);
        self.means = is_on.then(|| params::Means {
            k: rows.k,
            v: rows.v,
            skipped: rows.skipped,
            k_mean: self.call.k_mean,
            v_mean: self.call.v_mean,
            spans: stages.list_spans,
            lists: stages.lists,
            rows: int32(rows.len),
            num_kv_heads: layout.num_kv_heads,
            head_dim: layout.head_dim,
            lists_per_span: layout.num_kv_heads * layout.lists_per_kv_head,
            mask_words: layout.mask_words,
            log2_block_tokens: layout.log2_block_tokens,
            log2_blocks: self.call.layout.geometry.blocks_per_mean().ilog2().cast_signed(),
            every_span: are_a_callers.into(),
        });
        Ok(())
    }

    fn launch(&self, name: &'static str, grid: Grid) -> Result<()> {
        self.plan.context.kernels().launch(self.stream, name, grid, &[Arg::of(&self.step)])
    }

    pub(super) fn plan_spans(&self) -> Result<()> {
        let clusters = self.plan.context.device().properties().has_clusters();
        let ctas = if clusters { SPANS_CLUSTER } else { 1 };
        self.launch("compactattn_plan_spans", grid(ctas, 1024, 0))
    }

    /// Whether no step with these extents can have a span that needs scores; lengths on the device may change.
    fn only_dense(&self) -> bool {
        let Call { layout, batch, .. } = *self.call;
        layout.only_dense(batch.total_q, batch.table_width * layout.geometry.page_size)
    }

    /// Scores; whether the lists are made too, where they are wanted.
    fn select(&self, wants_lists: bool) -> Result<bool> {
        if self.only_dense() {
            return Ok(false);
        }
        let Call { layout, layer, batch, .. } = *self.call;
        let (context, gate) = (&*self.plan.context, self.plan.gate(layer));
        Scoring { context, stream: self.stream, layout, batch, step: &self.step, gate, wants_lists }.run()
    }

    /// `relates`: scores are flashprefill's before they are related.
    fn keep_rows(&self, relates: bool) -> Result<()> {
        if self.step.settings.keep_at_rows == 0 {
            return Ok(());
        }
        let blocks = self.step.stages.max_select_spans * self.step.layout.num_q_heads;
        let (grid, relates) = (grid_i(blocks, 256, self.keep_bytes()), i32::from(relates));
        let args = [Arg::of(&self.step), Arg::of(&relates)];
        self.plan.context.kernels().launch(self.stream, "compactattn_keep_rows", grid, &args)
    }

    fn union_table(&self) -> Result<()> {
        let blocks = self.list_rows();
        let masks = i32::from(matches!(self.call.external, Some(External::Masks(_))));
        let is_wide =
            self.step.layout.max_blocks >= WIDE_BLOCKS && blocks <= int32(self.plan.context.num_sms());
        let (name, threads) =
            if is_wide { ("compactattn_union_table_wide", 1024) } else { ("compactattn_union_table", 256) };
        let grid = grid_i(blocks, threads, self.keep_bytes());
        let args = [Arg::of(&self.step), Arg::of(&masks)];
        self.plan.context.kernels().launch(self.stream, name, grid, &args)
    }

    fn table(&self) -> Result<()> {
        self.launch("compactattn_table", grid_i(self.list_rows(), 256, 0))
    }

    /// The most that a step of these extents can have.
    pub(super) fn list_rows(&self) -> i32 {
        let lists = self.step.layout.num_kv_heads * self.step.layout.lists_per_kv_head;
        self.step.stages.max_list_spans * lists
    }

    fn keep_bytes(&self) -> u32 {
        let layout = &self.step.layout;
        shared::keep(layout.max_blocks.cast_unsigned(), layout.mask_words.cast_unsigned())
    }

    /// One CTA plans; with mean correction as many beside it as there are other SMs write means and counts.
    fn plan_work(&self) -> Result<()> {
        let Some(means) = &self.means else {
            return self.launch("compactattn_plan_work", grid(1, 1024, 0));
        };
        let context = &self.plan.context;
        let is_bf16 = self.call.layout.shape.dtype == Dtype::Bf16;
        let names = ["compactattn_plan_work_means_fp16", "compactattn_plan_work_means_bf16"];
        let args = [Arg::of(&self.step), Arg::of(means)];
        let ctas = context.num_sms().max(2);
        context.kernels().launch(self.stream, names[usize::from(is_bf16)], grid(ctas, 1024, 0), &args)
    }

    fn attend(&mut self, output: &DeviceOutput) -> Result<()> {
        // No query, no map of queries.
        if self.call.batch.total_q == 0 {
            return Ok(());
        }
        checked::check_lists(self)?;
        self.plan_work()?;
        let scratch = Scratch { stages: self.step.stages, ..self.scratch };
        let means = self.means.as_ref();
        let (layout, batch) = (self.call.layout, self.call.batch);
        let call = attend::Call { layout, batch, scratch: &scratch, output, means };
        self.kernel.launch(&self.plan.context, self.stream, &call)
    }
}

fn grid(blocks: usize, threads: u32, shared_bytes: u32) -> Grid {
    grid_i(int32(blocks), threads, shared_bytes)
}

fn grid_i(blocks: i32, threads: u32, shared_bytes: u32) -> Grid {
    Grid { blocks: [blocks.cast_unsigned(), 1, 1], threads, shared_bytes }
}

/// Rows from here on are ranked by four times the threads where no SM gets two: lists are the same either way.
const WIDE_BLOCKS: i32 = 2048;
/// The one cluster of its grid, where the GPU has them.
const SPANS_CLUSTER: usize = 8;

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
