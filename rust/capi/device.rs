//! Calls on a GPU: checked views as addresses. Nothing here reads device memory.

use std::ffi::c_void;

use super::api_attend::{Scratch, StepViews, scratch};
use super::batch::BatchViews;
use super::objects::PlanObject;
use super::table::Rows;
use super::tensor::View;
use super::views::{OutputViews, SelectionViews, SummaryViews, check_rows};
use crate::cuda::{
    Call, DeviceBatch, DeviceOutput, DevicePool, DeviceTable, DeviceTokens, External, MeansAt, Plan,
    check_mean_values, check_summaries,
};
use crate::error::{Error, Result, Status};
use crate::plan::Layout;
use crate::run::reads_summaries;
use crate::settings::Selector;
use crate::summaries::Which;

/// Where a call runs, and with what memory.
pub(super) struct Place<'a> {
    /// The layer.
    pub(super) layer: usize,
    /// Its layout, or that of the call's own settings.
    pub(super) layout: &'a Layout,
    /// The caller's.
    pub(super) stream: *mut c_void,
    /// None where there is nothing to compute.
    pub(super) scratch: Option<Scratch>,
}

impl<'a> Place<'a> {
    /// Where a stage called by itself runs: the batch says.
    pub(super) fn of_stage(
        plan: &PlanObject,
        layer: i32,
        layout: &'a Layout,
        batch: &BatchViews,
    ) -> Result<Self> {
        let (stream, data, bytes) = batch.place;
        let scratch =
            if batch.is_empty() { None } else { Some(scratch(plan, (layer, layout), data, bytes)?) };
        Ok(Self { layer: plan.layer(layer)?, layout, stream, scratch })
    }
}

/// forward, its views checked and known to lie apart.
pub(super) fn forward(plan: &Plan, place: &Place, step: &StepViews, results: &OutputViews) -> Result<()> {
    let selector = place.layout.settings.selector;
    check_summaries(place.layout, step.summaries.is_some())?;
    check_mean_values(place.layout, step.summaries.is_some_and(|summaries| summaries.v_mean.is_some()))?;
    let external = step.external.filter(|_| selector == Selector::External);
    let inputs = step.summaries.map_or(Vec::new(), |summaries| summaries.views());
    with_call(plan, place, &step.batch, &[inputs, results.views()].concat(), |mut call| {
        (call.k_mean, call.v_mean) = means(step.summaries.as_ref());
        call.external = external.map(|external| external_of(&call, &external)).transpose()?;
        // Writes: behind every refusal.
        if reads_summaries(&place.layout.settings) {
            refresh(plan, &call, step.summaries.as_ref())?;
        }
        // SAFETY: as in `update_summaries`.
        unsafe { plan.forward(&call, &output(results)) }
    })
}

/// attend over the caller's table, whose entries are bounds-checked where they are used; `corrected`: the lists it was
/// built from, and the means that stand for the rest.
pub(super) fn attend(
    plan: &Plan,
    place: &Place,
    batch: &BatchViews,
    (table, corrected): (&Rows, Option<(View, SummaryViews)>),
    results: &OutputViews,
) -> Result<()> {
    let (lists, summaries) = corrected.unzip();
    let read = summaries.map_or(Vec::new(), |summaries| summaries.views());
    let read: Vec<View> = read.into_iter().chain(lists).collect();
    with_call(plan, place, batch, &[&table.views[..], &results.views(), &read].concat(), |mut call| {
        check_list_rows(&call, &table.views)?;
        check_list_rows(&call, lists.as_slice())?;
        (call.k_mean, call.v_mean) = means(summaries.as_ref());
        let lists = lists.map_or(0, |lists| address(&lists));
        // SAFETY: as in `update_summaries`.
        unsafe { plan.attend(&call, (&device_table(table), lists), &output(results)) }
    })
}

/// select into the caller's scores and masks.
pub(super) fn select(
    plan: &Plan,
    place: &Place,
    batch: &BatchViews,
    (summaries, out): (Option<&SummaryViews>, &SelectionViews),
) -> Result<()> {
    check_summaries(place.layout, summaries.is_some())?;
    let inputs = summaries.map_or(Vec::new(), |summaries| summaries.views());
    with_call(plan, place, batch, &[inputs, out.views()].concat(), |mut call| {
        check_select_rows(&call, out)?;
        (call.k_mean, call.v_mean) = means(summaries);
        refresh(plan, &call, summaries)?;
        let at = |view: Option<View>| view.map_or(0, |view| address(&view));
        // SAFETY: as in `update_summaries`.
        unsafe { plan.select(&call, at(out.scores), at(out.masks)) }
    })
}

/// Scores or masks to lists; the most list rows that such a batch can have.
pub(super) fn unite(
    plan: &Plan,
    place: &Place,
    batch: &BatchViews,
    from: &SelectionViews,
    lists: &View,
) -> Result<usize> {
    let mut rows = 0;
    with_call(plan, place, batch, &[from.views(), vec![*lists]].concat(), |mut call| {
        rows = check_list_rows(&call, &[*lists])?;
        call.external = Some(external_of(&call, from)?);
        // SAFETY: as in `update_summaries`.
        unsafe { plan.unite(&call, address(lists)) }
    })?;
    Ok(rows)
}

/// Lists to boxes.
pub(super) fn table(plan: &Plan, place: &Place, batch: &BatchViews, lists: &View, out: &Rows) -> Result<()> {
    with_call(plan, place, batch, &[&out.views[..], &[*lists]].concat(), |call| {
        check_list_rows(&call, &out.views)?;
        check_list_rows(&call, &[*lists])?;
        // SAFETY: as in `update_summaries`.
        unsafe { plan.table(&call, address(lists), &device_table(out)) }
    })
}

/// Block means into the caller's summaries.
pub(super) fn update_summaries(
    plan: &Plan,
    place: &Place,
    batch: &BatchViews,
    which: Which,
    out: &SummaryViews,
) -> Result<()> {
    let device = device_batch(plan, place.layout, batch, &out.views())?;
    if batch.is_empty() {
        return Ok(());
    }
    let call = Call {
        layer: place.layer,
        layout: place.layout,
        batch: &device,
        k_mean: 0,
        v_mean: 0,
        external: None,
        workspace: 0,
        stream: place.stream,
    };
    // SAFETY: the caller of the C function vouches for every tensor and the stream; outputs lie apart (`check_apart`).
    unsafe { plan.update_summaries(&call, which, means_at(out)) }
}

/// With seals, makes anew on the device what is of other keys than lie there, before the stages that read it.
fn refresh(plan: &Plan, call: &Call, summaries: Option<&SummaryViews>) -> Result<()> {
    let Some(summaries) = summaries.filter(|summaries| summaries.seals.is_some()) else { return Ok(()) };
    // SAFETY: as in `update_summaries`.
    unsafe { plan.update_summaries(call, Which::Completed, means_at(summaries)) }
}

fn means_at(of: &SummaryViews) -> MeansAt {
    let at = |view: Option<View>| view.map_or(0, |view| address(&view));
    MeansAt { k: address(&of.k_mean), v: at(of.v_mean), seals: at(of.seals) }
}

/// Runs `body` unless there is nothing to compute; `others` are tensors beside the batch's.
pub(super) fn with_call(
    plan: &Plan,
    place: &Place,
    batch: &BatchViews,
    others: &[View],
    body: impl FnOnce(Call) -> Result<()>,
) -> Result<()> {
    let device = device_batch(plan, place.layout, batch, others)?;
    let Some(scratch) = place.scratch else { return Ok(()) };
    plan.context().check_memory("workspace", scratch.data.addr() as u64)?;
    body(Call {
        layer: place.layer,
        layout: place.layout,
        batch: &device,
        k_mean: 0,
        v_mean: 0,
        external: None,
        workspace: scratch.data.addr() as u64,
        stream: place.stream,
    })
}

/// The batch's addresses, all of them in this device's memory, its extents within the plan's limits.
fn device_batch(plan: &Plan, layout: &Layout, batch: &BatchViews, others: &[View]) -> Result<DeviceBatch> {
    for view in batch.tensors().iter().chain(others).filter(|view| view.len > 0) {
        plan.context().check_memory(view.name, address(view))?;
    }
    let [q, k, v, cu_seqlens_q, seq_lens, block_table] = &batch.views;
    let (num_reqs, width) = (seq_lens.shape[0], block_table.shape[1]);
    let limits = layout.limits;
    for (name, limit, got) in
        [("num_reqs", limits.max_num_reqs, num_reqs), ("total_q", limits.max_total_q, batch.total_q)]
    {
        if got > limit {
            let wanted = format!("at most {limit}, the plan's limit");
            return Err(Error::new(Status::Value, name, wanted, got));
        }
    }
    Ok(DeviceBatch {
        q: DeviceTokens { address: address(q), stride_token: q.stride[0], stride_head: q.stride[1] },
        k: pool(k, batch.scales[0]),
        v: pool(v, batch.scales[1]),
        cu_seqlens_q: address(cu_seqlens_q),
        seq_lens: address(seq_lens),
        block_table: address(block_table),
        table_stride: if num_reqs > 1 { block_table.stride[0] } else { width },
        table_width: width,
        num_reqs,
        total_q: batch.total_q,
        num_pages: batch.num_pages,
    })
}

/// Mean keys and mean values; 0 = none.
fn means(from: Option<&SummaryViews>) -> (u64, u64) {
    let v_mean = from.and_then(|summaries| summaries.v_mean);
    (from.map_or(0, |summaries| address(&summaries.k_mean)), v_mean.map_or(0, |v_mean| address(&v_mean)))
}

fn pool(view: &View, scales: Option<View>) -> DevicePool {
    let [stride_page, stride_token, stride_head, _] = view.stride;
    let scale = scales.map_or(0, |scales| address(&scales));
    let stride_scale = usize::from(scales.is_some_and(|scales| scales.shape[0] > 1));
    DevicePool { address: address(view), stride_page, stride_token, stride_head, scale, stride_scale }
}

pub(super) fn output(results: &OutputViews) -> DeviceOutput {
    let out = &results.out;
    DeviceOutput {
        out: DeviceTokens { address: address(out), stride_token: out.stride[0], stride_head: out.stride[1] },
        lse: results.lse.map_or(0, |lse| address(&lse)),
        lse_stride_head: results.lse.map_or(0, |lse| lse.stride[0]),
        lse_stride_token: results.lse.map_or(0, |lse| lse.stride[1]),
    }
}

fn device_table(table: &Rows) -> DeviceTable {
    let [counts, stream_lens, boxes] = table.views.each_ref().map(address);
    DeviceTable { counts, stream_lens, boxes }
}

fn external_of(call: &Call, from: &SelectionViews) -> Result<External> {
    check_select_rows(call, from)?;
    match (from.scores, from.masks) {
        (Some(scores), _) => Ok(External::Scores(address(&scores))),
        (_, Some(masks)) => Ok(External::Masks(address(&masks))),
        _ => Err(Error::new(Status::Null, "external", "scores or masks", "neither")),
    }
}

/// Lengths are on the device, so buffers must hold the most rows that these extents allow.
fn check_select_rows(call: &Call, views: &SelectionViews) -> Result<()> {
    let (_, rows) = call.layout.most_spans(call.batch.num_reqs, call.batch.total_q);
    let what = "most select spans of such a batch";
    views.views().iter().try_for_each(|view| check_rows(view, rows, what))
}

pub(super) fn check_list_rows(call: &Call, views: &[View]) -> Result<usize> {
    let (spans, _) = call.layout.most_spans(call.batch.num_reqs, call.batch.total_q);
    let rows = spans * call.layout.lists_per_span();
    views.iter().try_for_each(|view| check_rows(view, rows, "most list rows of such a batch"))?;
    Ok(rows)
}

pub(super) fn address(view: &View) -> u64 {
    view.data.addr() as u64
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
