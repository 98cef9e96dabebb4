//! Exported: the stages before attend, one call each.

use super::batch::BatchViews;
use super::check::check;
use super::compactattn_status;
use super::device::{self, Place};
use super::guard::guard;
use super::handle;
use super::objects::PlanObject;
use super::read::{check_pointer, tensor};
use super::structs::{compactattn_plan, compactattn_tensor, compactattn_which};
use super::structs_step::{
    compactattn_batch, compactattn_selection, compactattn_summaries, compactattn_table,
};
use super::table::{Rows, list_rows};
use super::tensor::{Dim, View, Wanted, check_apart};
use super::views::{SelectionViews, SummaryViews, check_rows};
use crate::batch::Batch;
use crate::error::{Error, Result, Status};
use crate::plan::Layout;
use crate::select;
use crate::settings::{KeepAt, Selector};
use crate::stage::Stage;
use crate::summaries::Which;
use crate::table;
use crate::types::Dtype;
use crate::union;

/// Writes block means of a compactattn_which into the caller's summaries; call it after the step's KV is written.
///
/// # Safety
/// batch, summaries: NULL, or readable for their struct_size bytes, with tensors as they say; nobody else writes to
/// those, or reads the summaries, during the call. The same goes for every function below.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn compactattn_summaries_update(
    plan: *const compactattn_plan,
    layer: i32,
    batch: *const compactattn_batch,
    which: i32,
    summaries: *const compactattn_summaries,
) -> compactattn_status {
    on_plan(plan, layer, |plan, layout| {
        let which = which_of(which)?;
        // SAFETY: this function's contract.
        let views = unsafe { BatchViews::read(plan, layout, batch) }?;
        // SAFETY: this function's contract.
        let summaries = unsafe { SummaryViews::read(plan, layout, views.num_pages, summaries) }?;
        check_apart(&summaries.views(), &views.tensors())?;
        if let Some(cuda) = &plan.cuda {
            let place = Place { layer: plan.layer(layer)?, layout, stream: views.place.0, scratch: None };
            return device::update_summaries(cuda, &place, &views, which, &summaries);
        }
        // SAFETY: this function's contract; the summaries lie apart.
        let batch = unsafe { views.open(plan, layer) }?;
        // SAFETY: as above; `check_apart` compares them with each other too.
        let mut out = unsafe { summaries.open_mut() };
        plan.plan.update_summaries(plan.layer(layer)?, &batch, which, &mut out)
    })
}

/// Scores every past block into out->scores; keeps blocks row by row into out->masks, if that is given.
///
/// summaries may be NULL for selectors that read no block means. Scores of blocks in the open region, and of spans
/// that are dense by policy, are left as they are.
///
/// # Safety
/// As compactattn_summaries_update.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn compactattn_select(
    plan: *const compactattn_plan,
    layer: i32,
    batch: *const compactattn_batch,
    summaries: *const compactattn_summaries,
    out: *const compactattn_selection,
) -> compactattn_status {
    on_plan(plan, layer, |plan, layout| {
        check_selector(layout, summaries.is_null())?;
        // SAFETY: this function's contract.
        let views = unsafe { BatchViews::read(plan, layout, batch) }?;
        let summaries = match summaries.is_null() {
            true => None,
            // SAFETY: this function's contract.
            false => Some(unsafe { SummaryViews::read(plan, layout, views.num_pages, summaries) }?),
        };
        // SAFETY: this function's contract.
        let out = unsafe { SelectionViews::read(plan, layout, ["out", "out.scores", "out.masks"], out) }?;
        let scores = out.scores.ok_or_else(|| Error::new(Status::Null, "out.scores", "a tensor", "none"))?;
        let means = summaries.map_or(Vec::new(), |summaries| summaries.views());
        check_apart(&out.views(), &[&views.tensors()[..], &means].concat())?;
        let refreshed = summaries.map_or(Vec::new(), |summaries| summaries.refreshed());
        check_apart(&refreshed, &views.tensors())?;
        if let Some(cuda) = &plan.cuda {
            let place = Place::of_stage(plan, layer, layout, &views)?;
            return device::select(cuda, &place, &views, (summaries.as_ref(), &out));
        }
        // SAFETY: this function's contract; outputs lie apart.
        let batch = unsafe { views.open(plan, layer) }?;
        out.check_rows(layout, &batch)?;
        // SAFETY: as above.
        summaries.iter().try_for_each(|own| unsafe { own.refresh(plan, plan.layer(layer)?, &batch) })?;
        // SAFETY: as above.
        let summaries = summaries.map(|summaries| unsafe { summaries.open() });
        // SAFETY: as above; the dtype is f32.
        let scores = unsafe { scores.slice_mut() };
        let gate = plan.plan.gate(plan.layer(layer)?, layout)?;
        let input = select::Input { layout, batch: &batch, summaries, gate };
        Stage::Select.run(|| select::score(&input, scores, plan.context.parallel));
        if let Some(masks) = out.masks {
            // SAFETY: as above; the dtype is u32.
            union::masks_of_scores(layout, &batch, scores, unsafe { masks.slice_mut() });
        }
        Ok(())
    })
}

/// Unites scores or masks (one of them, not both) into lists [list rows or more, mask_words] u32, contiguous.
///
/// out_rows, if not NULL, becomes the list rows of this batch; on CUDA, where lengths are on the device, the most that
/// such a batch can have, and rows after its own are left as they are.
///
/// # Safety
/// As compactattn_summaries_update. lists: NULL, or readable. out_rows: NULL, or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn compactattn_union(
    plan: *const compactattn_plan,
    layer: i32,
    batch: *const compactattn_batch,
    selection: *const compactattn_selection,
    lists: *const compactattn_tensor,
    out_rows: *mut i64,
) -> compactattn_status {
    on_plan(plan, layer, |plan, layout| {
        // SAFETY: this function's contract.
        let views = unsafe { BatchViews::read(plan, layout, batch) }?;
        check_count("out_rows", out_rows)?;
        let names = ["selection", "selection.scores", "selection.masks"];
        // SAFETY: this function's contract.
        let from = unsafe { SelectionViews::read(plan, layout, names, selection) }?;
        from.check_one("selection")?;
        // SAFETY: this function's contract.
        let lists = unsafe { read_lists(plan, layout, lists) }?;
        check_apart(&[lists], &[&views.tensors()[..], &from.views()].concat())?;
        if let Some(cuda) = &plan.cuda {
            let place = Place::of_stage(plan, layer, layout, &views)?;
            let rows = device::unite(cuda, &place, &views, &from, &lists)?;
            // SAFETY: this function's contract.
            return unsafe { write_count(out_rows, rows) };
        }
        // SAFETY: this function's contract; the lists lie apart.
        let batch = unsafe { views.open(plan, layer) }?;
        from.check_rows(layout, &batch)?;
        let rows = list_rows(layout, &batch);
        check_rows(&lists, rows, "list rows of this batch")?;
        // SAFETY: as above; the dtype is u32.
        let lists = unsafe { lists.slice_mut() };
        // SAFETY: this function's contract.
        Stage::Union.run(|| unsafe { unite(layout, &batch, &from, lists) });
        // SAFETY: this function's contract.
        unsafe { write_count(out_rows, rows) }
    })
}

/// Turns lists into rows of physical boxes, through the engine's block table.
///
/// # Safety
/// As compactattn_union.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn compactattn_table_build(
    plan: *const compactattn_plan,
    layer: i32,
    batch: *const compactattn_batch,
    lists: *const compactattn_tensor,
    table: *const compactattn_table,
) -> compactattn_status {
    on_plan(plan, layer, |plan, layout| {
        // SAFETY: this function's contract.
        let out = unsafe { Rows::table(plan, layout, table) }?;
        if let Some(cuda) = &plan.cuda {
            // SAFETY: this function's contract.
            let views = unsafe { BatchViews::read(plan, layout, batch) }?;
            // SAFETY: this function's contract.
            let lists = unsafe { read_lists(plan, layout, lists) }?;
            check_apart(&out.views, &[&views.tensors()[..], &[lists]].concat())?;
            let place = Place::of_stage(plan, layer, layout, &views)?;
            return device::table(cuda, &place, &views, &lists, &out);
        }
        // SAFETY: this function's contract.
        let (batch, lists) = unsafe { open_lists(plan, layer, batch, lists, &out) }?;
        out.check_rows(list_rows(layout, &batch))?;
        // SAFETY: this function's contract; `open_lists` has shown that outputs lie apart.
        let mut table = unsafe { out.table_mut() };
        Stage::Table.run(|| table::build(layout, &batch, lists, &mut table));
        Ok(())
    })
}

/// Runs `body` on a live plan and layer, guarded.
pub(super) fn on_plan(
    plan: *const compactattn_plan,
    layer: i32,
    body: impl FnOnce(&PlanObject, &Layout) -> Result<()>,
) -> compactattn_status {
    guard(|| handle::plan(plan.cast())?.run(|plan| body(plan, plan.layout(layer)?)))
}

/// The tensor of lists, checked.
///
/// # Safety
/// `from`: NULL, or readable for one tensor.
pub(super) unsafe fn read_lists(
    plan: &PlanObject,
    layout: &Layout,
    from: *const compactattn_tensor,
) -> Result<View> {
    // SAFETY: this function's contract.
    let lists = unsafe { tensor("lists", from) }?;
    let dims = vec![Dim::Any, Dim::Is(layout.mask_words(), "mask_words")];
    check(&lists, &Wanted::dense("lists", Dtype::U32, dims, plan.context.device))
}

/// The batch and the lists to read, apart from `out` and with a row per list.
///
/// # Safety
/// As `compactattn_union`.
pub(super) unsafe fn open_lists<'a>(
    plan: &PlanObject,
    layer: i32,
    batch: *const compactattn_batch,
    lists: *const compactattn_tensor,
    out: &Rows,
) -> Result<(Batch<'a>, &'a [u32])> {
    let layout = plan.layout(layer)?;
    // SAFETY: this function's contract.
    let views = unsafe { BatchViews::read(plan, layout, batch) }?;
    // SAFETY: this function's contract.
    let lists = unsafe { read_lists(plan, layout, lists) }?;
    check_apart(&out.views, &[&views.tensors()[..], &[lists]].concat())?;
    // SAFETY: this function's contract; outputs lie apart.
    let batch = unsafe { views.open(plan, layer) }?;
    check_rows(&lists, list_rows(layout, &batch), "list rows of this batch")?;
    // SAFETY: as above; the dtype is u32.
    Ok((batch, unsafe { lists.slice() }))
}

/// Scores or masks to lists.
///
/// # Safety
/// As [`View::slice`], for `from`.
unsafe fn unite(layout: &Layout, batch: &Batch, from: &SelectionViews, lists: &mut [u32]) {
    if let Some(masks) = from.masks {
        // SAFETY: this function's contract; the dtype is u32.
        union::of_masks(layout, batch, unsafe { masks.slice() }, lists);
    }
    if let Some(scores) = from.scores {
        let by_row = layout.settings.keep_at == KeepAt::Row;
        let rows = if by_row { layout.select_spans(batch).len() * layout.shape.num_q_heads } else { 0 };
        let mut masks = vec![0; rows * layout.mask_words()];
        // SAFETY: this function's contract; the dtype is f32.
        union::unite(layout, batch, unsafe { scores.slice() }, &mut masks, lists);
    }
}

/// Before anything is written.
pub(super) fn check_count(name: &str, to: *mut i64) -> Result<()> {
    if to.is_null() { Ok(()) } else { check_pointer(name, to) }
}

/// # Safety
/// `to`: NULL, or writable; [`check_count`] has seen it.
pub(super) unsafe fn write_count(to: *mut i64, count: usize) -> Result<()> {
    if !to.is_null() {
        // SAFETY: not NULL; aligned and writable by this function's contract.
        unsafe { to.write(i64::try_from(count).unwrap_or(i64::MAX)) };
    }
    Ok(())
}

fn check_selector(layout: &Layout, without_summaries: bool) -> Result<()> {
    let selector = layout.settings.selector;
    if selector == Selector::External {
        let wanted = "a selector that scores; external brings its own";
        return Err(Error::new(Status::Unsupported, "settings.selector", wanted, selector.name()));
    }
    if without_summaries && select::needs_summaries(selector) {
        let wanted = format!("block means, for selector {}", selector.name());
        return Err(Error::new(Status::Null, "summaries", wanted, "NULL"));
    }
    Ok(())
}

fn which_of(which: i32) -> Result<Which> {
    if which == compactattn_which::COMPACTATTN_WHICH_COMPLETED as i32 {
        return Ok(Which::Completed);
    }
    if which == compactattn_which::COMPACTATTN_WHICH_ALL as i32 {
        return Ok(Which::All);
    }
    Err(Error::new(Status::Value, "which", "0 (completed) or 1 (all)", which))
}
