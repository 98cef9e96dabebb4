//! Exported: lists as tables for other paged kernels.

use super::api_stages::{on_plan, open_lists, write_count};
use super::compactattn_status;
use super::structs::{compactattn_plan, compactattn_tensor};
use super::structs_step::{compactattn_batch, compactattn_csr, compactattn_padded};
use super::table::Rows;
use crate::export;

/// Turns lists into padded tables of whole engine pages; every page with a selected token, ascending, the chunk last.
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
        plan.check_cpu("table_export_padded")?;
        // SAFETY: this function's contract.
        let out = unsafe { Rows::padded(plan, padded) }?;
        // SAFETY: this function's contract.
        let (batch, lists) = unsafe { open_lists(plan, layer, batch, lists, &out) }?;
        // SAFETY: this function's contract; `open_lists` has shown that outputs lie apart.
        export::padded(layout, &batch, lists, &mut unsafe { out.padded_mut() }).map(drop)
    })
}

/// Turns lists into CSR tables of whole engine pages. out_entries, if not NULL, becomes the entries of indices.
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
        plan.check_cpu("table_export_csr")?;
        // SAFETY: this function's contract.
        let out = unsafe { Rows::csr(plan, csr) }?;
        // SAFETY: this function's contract.
        let (batch, lists) = unsafe { open_lists(plan, layer, batch, lists, &out) }?;
        // SAFETY: this function's contract; `open_lists` has shown that outputs lie apart.
        let (_, entries) = export::csr(layout, &batch, lists, &mut unsafe { out.csr_mut() })?;
        // SAFETY: this function's contract.
        unsafe { write_count(out_entries, entries) }
    })
}
