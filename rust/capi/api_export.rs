//! Exported: lists as tables for other paged kernels.

use super::api_stages::{check_count, on_plan, open_lists, read_lists, write_count};
use super::batch::BatchViews;
use super::compactattn_status;
use super::device::Place;
use super::device_tables;
use super::objects::PlanObject;
use super::structs::{compactattn_plan, compactattn_tensor};
use super::structs_step::{compactattn_batch, compactattn_csr, compactattn_padded};
use super::table::Rows;
use super::tensor::{View, check_apart};
use crate::error::Result;
use crate::export;
use crate::plan::Layout;

/// Turns lists into padded tables of whole engine pages; every page with a selected token, ascending, the chunk last.
///
/// On CUDA, where lengths are on the device, the tables need room for the most rows that such a batch can have, and for
/// as many pages as its block table is wide (or max_kv_len holds); rows after its own become empty.
///
/// # Safety
/// As compactattn_union.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn compactattn_table_export_padded(
    plan: *const compactattn_plan,
    layer: i32,
    batch: *const compactattn_batch,
    lists: *const compactattn_tensor,
    padded: *const compactattn_padded,
) -> compactattn_status {
    on_plan(plan, layer, |plan, layout| {
        // SAFETY: this function's contract.
        let out = unsafe { Rows::padded(plan, padded) }?;
        if let Some(cuda) = &plan.cuda {
            // SAFETY: this function's contract.
            let (views, lists) = unsafe { on_device(plan, layout, (batch, lists), &out) }?;
            let place = Place::of_stage(plan, layer, layout, &views)?;
            return device_tables::export_padded(cuda, &place, &views, &lists, &out);
        }
        // SAFETY: this function's contract.
        let (batch, lists) = unsafe { open_lists(plan, layer, batch, lists, &out) }?;
        // SAFETY: this function's contract; `open_lists` has shown that outputs lie apart.
        export::padded(layout, &batch, lists, &mut unsafe { out.padded_mut() }).map(drop)
    })
}

/// Turns lists into CSR tables of whole engine pages. out_entries, if not NULL, becomes the entries of indices.
///
/// On CUDA as compactattn_table_export_padded, and out_entries becomes the most entries that such a batch can have.
///
/// # Safety
/// As compactattn_union. out_entries: NULL, or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn compactattn_table_export_csr(
    plan: *const compactattn_plan,
    layer: i32,
    batch: *const compactattn_batch,
    lists: *const compactattn_tensor,
    csr: *const compactattn_csr,
    out_entries: *mut i64,
) -> compactattn_status {
    on_plan(plan, layer, |plan, layout| {
        check_count("out_entries", out_entries)?;
        // SAFETY: this function's contract.
        let out = unsafe { Rows::csr(plan, csr) }?;
        if let Some(cuda) = &plan.cuda {
            // SAFETY: this function's contract.
            let (views, lists) = unsafe { on_device(plan, layout, (batch, lists), &out) }?;
            let place = Place::of_stage(plan, layer, layout, &views)?;
            let entries = device_tables::export_csr(cuda, &place, &views, &lists, &out)?;
            // SAFETY: this function's contract.
            return unsafe { write_count(out_entries, entries) };
        }
        // SAFETY: this function's contract.
        let (batch, lists) = unsafe { open_lists(plan, layer, batch, lists, &out) }?;
        // SAFETY: this function's contract; `open_lists` has shown that outputs lie apart.
        let (_, entries) = export::csr(layout, &batch, lists, &mut unsafe { out.csr_mut() })?;
        // SAFETY: this function's contract.
        unsafe { write_count(out_entries, entries) }
    })
}

/// The batch's and the lists' views, apart from `out`.
///
/// # Safety
/// As [`compactattn_table_export_padded`].
unsafe fn on_device(
    plan: &PlanObject,
    layout: &Layout,
    (batch, lists): (*const compactattn_batch, *const compactattn_tensor),
    out: &Rows,
) -> Result<(BatchViews, View)> {
    // SAFETY: this function's contract.
    let views = unsafe { BatchViews::read(plan, layout, batch) }?;
    // SAFETY: this function's contract.
    let lists = unsafe { read_lists(plan, layout, lists) }?;
    check_apart(&out.views, &[&views.tensors()[..], &[lists]].concat())?;
    Ok((views, lists))
}
