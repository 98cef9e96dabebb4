//! One case in the memory of a device, and the library's calls on it.

use compactattn::capi::*;
use compactattn::plan::Layout;
use compactattn::types::Dtype;
use half::{bf16, f16};

use super::abi::{NONE, Plan, Refusal};
use super::device::{Device, last_error, struct_size};
use super::driver::Handle;
use super::exports;
use super::gate::GateFile;
use super::memory::{Memory, Part};
use crate::common::case::Case;
use crate::common::pool::Store;

/// What a selector is given beside the batch.
pub(crate) enum Given {
    Nothing,
    Gate(Box<GateFile>),
    Scores(Vec<f32>),
    Masks(Vec<u32>),
}

/// Where everything lies.
#[derive(Clone, Copy, Default)]
pub(crate) struct Parts {
    pub(crate) q: Part,
    pub(crate) kv: Part,
    /// Of K and of V; empty: none.
    pub(crate) scales: [Part; 2],
    pub(crate) cu: Part,
    pub(crate) lens: Part,
    pub(crate) table: Part,
    pub(crate) given: Part,
    pub(crate) k_mean: Part,
    pub(crate) v_mean: Part,
    pub(crate) seals: Part,
    pub(crate) scores: Part,
    pub(crate) masks: Part,
    pub(crate) lists: Part,
    /// Lists united from masks, where scores are kept by row.
    pub(crate) lists_of_masks: Part,
    pub(crate) counts: Part,
    pub(crate) stream_lens: Part,
    pub(crate) boxes: Part,
    /// Tables for other kernels.
    pub(crate) exports: exports::Parts,
    /// Of the stages, one by one.
    pub(crate) staged: [Part; 2],
    /// out and lse of the whole pass.
    pub(crate) whole: [Part; 2],
}

pub(crate) struct Step<'a, 'd> {
    pub(crate) case: &'a Case,
    pub(crate) layout: Layout,
    pub(crate) plan: Plan,
    pub(crate) given: &'a Given,
    pub(crate) memory: &'a mut Memory<'d>,
    pub(crate) parts: Parts,
    pub(crate) workspace: *mut u8,
    pub(crate) stream: Handle,
    /// Whether summaries are given with their seals.
    pub(crate) sealed: bool,
}

/// A status with its message.
pub(crate) type Done = Result<(), String>;

impl<'a, 'd> Step<'a, 'd> {
    /// Puts the case into `memory`; every byte that calls should write starts out as poison.
    pub(crate) fn new(
        device: &Device,
        memory: &'a mut Memory<'d>,
        case: &'a Case,
        given: &'a Given,
        stream: Handle,
    ) -> Result<Self, Refusal> {
        let plan = Plan::new(device, case, given)?;
        let parts = place(memory, case, given, &plan.sizes);
        memory.push();
        let workspace = memory.workspace(plan.sizes.workspace_bytes as usize);
        let layout = case.layout();
        Ok(Self { case, layout, plan, given, memory, parts, workspace, stream, sealed: false })
    }

    /// select, union, table and attend, one call each, on the default stream.
    pub(crate) fn stages(&self) -> Done {
        let (plan, batch, summaries) = (self.plan.handle, self.batch(), self.summaries());
        let summaries = if self.needs_summaries() { &raw const summaries } else { std::ptr::null() };
        let made = self.selection(self.parts.scores, self.parts.masks);
        let by_scores = compactattn_selection { masks: NONE, ..made };
        let by_masks = compactattn_selection { scores: NONE, ..made };
        let external = self.external();
        if external.is_none() {
            let out = if self.keeps_rows() { made } else { by_scores };
            // SAFETY: the structs describe parts of the memory, for this call and those below.
            ok("select", unsafe {
                compactattn_select(plan, 0, &raw const batch, summaries, &raw const out)
            })?;
        }
        let from = external.unwrap_or(by_scores);
        self.unite(&batch, &from, self.parts.lists)?;
        if external.is_none() && self.keeps_rows() {
            self.unite(&batch, &by_masks, self.parts.lists_of_masks)?;
        }
        self.attend_lists()
    }

    /// table and attend, over the lists as they are now.
    pub(crate) fn attend_lists(&self) -> Done {
        let (batch, lists, table) = (self.batch(), self.lists(self.parts.lists), self.table());
        // SAFETY: the structs describe parts of the memory, for this call and the one below.
        ok("table_build", unsafe {
            compactattn_table_build(self.plan.handle, 0, &raw const batch, &raw const lists, &raw const table)
        })?;
        self.attend_again()
    }

    /// attend alone, over the table as it is now.
    pub(crate) fn attend_again(&self) -> Done {
        let (lists, summaries) = (self.lists(self.parts.lists), self.summaries());
        let corrected = self.corrects().then_some((&lists, &raw const summaries));
        self.attend(&self.batch(), &self.table(), corrected)
    }

    /// Means of every whole block, if the selector reads them.
    pub(crate) fn update_summaries(&self) -> Done {
        self.update(compactattn_which::COMPACTATTN_WHICH_ALL)
    }

    /// Means of the blocks that the step completes, if the selector reads them.
    pub(crate) fn update_completed(&self) -> Done {
        self.update(compactattn_which::COMPACTATTN_WHICH_COMPLETED)
    }

    fn update(&self, which: compactattn_which) -> Done {
        if !self.needs_summaries() {
            return Ok(());
        }
        let (batch, summaries) = (self.batch(), self.summaries());
        let (plan, which) = (self.plan.handle, which as i32);
        let status =
            // SAFETY: the structs describe parts of the memory.
            unsafe { compactattn_summaries_update(plan, 0, &raw const batch, which, &raw const summaries) };
        ok("summaries_update", status)
    }

    /// The whole pass, on the step's stream.
    pub(crate) fn forward(&self) -> Done {
        ok("forward", self.forward_with(|_, _| {}))
    }

    /// The whole pass with arguments that `spoil` has changed.
    pub(crate) fn forward_with(
        &self,
        spoil: impl FnOnce(&mut compactattn_batch, &mut compactattn_forward_args),
    ) -> compactattn_status {
        let (mut batch, summaries, external) = (self.batch(), self.summaries(), self.external());
        let [out, lse] = self.results(self.parts.whole);
        let mut args = compactattn_forward_args {
            struct_size: struct_size::<compactattn_forward_args>(),
            layer: 0,
            batch: std::ptr::null(),
            summaries: if self.needs_summaries() { &raw const summaries } else { std::ptr::null() },
            external: external.as_ref().map_or(std::ptr::null(), |x| &raw const *x),
            settings: std::ptr::null(),
            out,
            lse,
            workspace: self.workspace.cast(),
            workspace_bytes: self.plan.sizes.workspace_bytes,
            stream: self.stream,
        };
        spoil(&mut batch, &mut args);
        args.batch = &raw const batch;
        // SAFETY: the structs describe parts of the memory, or what a test of refusals has put there instead.
        unsafe { compactattn_forward(self.plan.handle, &raw const args) }
    }

    /// Poison where results go, so that what a call leaves out shows.
    pub(crate) fn poison_results(&self) {
        for part in [self.parts.staged, self.parts.whole].concat() {
            self.memory.poison(part);
        }
    }

    fn unite(&self, batch: &compactattn_batch, from: &compactattn_selection, to: Part) -> Done {
        let lists = self.lists(to);
        // SAFETY: the structs describe parts of the memory; no count is asked for.
        ok("union", unsafe {
            compactattn_union(self.plan.handle, 0, batch, from, &raw const lists, std::ptr::null_mut())
        })
    }

    /// `corrected`: the lists that `table` was built from, and means for what they leave out.
    fn attend(
        &self,
        batch: &compactattn_batch,
        table: &compactattn_table,
        corrected: Option<(&compactattn_tensor, *const compactattn_summaries)>,
    ) -> Done {
        let [out, lse] = self.results(self.parts.staged);
        let args = compactattn_attend_args {
            struct_size: struct_size::<compactattn_attend_args>(),
            layer: 0,
            batch,
            table,
            lists: corrected.map_or(std::ptr::null(), |(lists, _)| lists),
            summaries: corrected.map_or(std::ptr::null(), |(_, summaries)| summaries),
            out,
            lse,
            workspace: self.workspace.cast(),
            workspace_bytes: self.plan.sizes.workspace_bytes,
            stream: std::ptr::null_mut(),
        };
        // SAFETY: the structs describe parts of the memory.
        ok("attend", unsafe { compactattn_attend(self.plan.handle, &raw const args) })
    }
}

/// Inputs first, then all that calls write.
pub(crate) fn place(memory: &mut Memory, case: &Case, given: &Given, sizes: &compactattn_sizes) -> Parts {
    let heads = case.shape.num_q_heads;
    memory.clear();
    let mut parts = Parts {
        q: memory.add(store_bytes(&case.q.store)),
        kv: memory.add(store_bytes(&case.pools.store)),
        scales: case.pools.scales.each_ref().map(|scales| memory.add(bytemuck::cast_slice(scales))),
        cu: memory.add(bytemuck::cast_slice(&case.cu_seqlens_q)),
        lens: memory.add(bytemuck::cast_slice(&case.seq_lens)),
        table: memory.add(bytemuck::cast_slice(&case.table)),
        given: memory.add(match given {
            Given::Nothing | Given::Gate(_) => &[],
            Given::Scores(scores) => bytemuck::cast_slice(scores),
            Given::Masks(masks) => bytemuck::cast_slice(masks),
        }),
        ..Parts::default()
    };
    let mut words = |count: i64| memory.add_poison(count as usize * 4);
    let rows = sizes.select_rows * heads as i64;
    let slots = case.pools.num_pages as i64 * sizes.summary_slots_per_page;
    let vectors = case.shape.num_kv_heads * case.shape.head_dim;
    parts.k_mean = words(slots * vectors as i64);
    parts.v_mean = words(slots * vectors as i64);
    parts.seals = words(slots * case.shape.num_kv_heads as i64 * 2);
    parts.scores = words(rows * sizes.max_blocks);
    parts.masks = words(rows * sizes.mask_words);
    parts.lists = words(sizes.list_rows * sizes.mask_words);
    parts.lists_of_masks = words(sizes.list_rows * sizes.mask_words);
    parts.counts = words(sizes.list_rows);
    parts.stream_lens = words(sizes.list_rows);
    parts.boxes = words(sizes.list_rows * sizes.max_boxes);
    parts.exports = exports::place(memory, case, sizes);
    let lse = lse_stride(case) * heads * 4;
    for results in [&mut parts.staged, &mut parts.whole] {
        *results = [memory.add_poison(parts.q.len), memory.add_poison(lse)];
    }
    parts
}

pub(crate) fn total_q(case: &Case) -> usize {
    case.cu_seqlens_q.last().map_or(0, |&x| x as usize)
}

/// Padded, so that a row of lse and the next do not touch.
pub(crate) fn lse_stride(case: &Case) -> usize {
    total_q(case) + 3
}

pub(crate) fn store_bytes(store: &Store) -> &[u8] {
    match store {
        Store::Bf16(x) => bytemuck::cast_slice(x),
        Store::F16(x) => bytemuck::cast_slice(x),
        Store::F32(x) => bytemuck::cast_slice(x),
        Store::E4m3(x) => x,
    }
}

/// Elements of `dtype` from their bytes.
pub(crate) fn store_of(dtype: Dtype, bytes: &[u8]) -> Store {
    match dtype {
        Dtype::Bf16 => Store::Bf16(bytemuck::pod_collect_to_vec::<u8, bf16>(bytes)),
        Dtype::F16 => Store::F16(bytemuck::pod_collect_to_vec::<u8, f16>(bytes)),
        _ => Store::F32(bytemuck::pod_collect_to_vec(bytes)),
    }
}

pub(crate) fn ok(call: &str, status: compactattn_status) -> Done {
    match status {
        compactattn_status::COMPACTATTN_OK => Ok(()),
        _ => Err(format!("{call}: {}", last_error())),
    }
}
