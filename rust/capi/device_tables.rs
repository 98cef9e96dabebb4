//! Calls on a GPU, continued: tables for other kernels, and merging two results.

use std::ffi::c_void;

use super::batch::BatchViews;
use super::device::{Place, address, check_list_rows, output, with_call};
use super::table::Rows;
use super::tensor::View;
use super::views::{OutputViews, check_rows};
use crate::cuda::{Call, DeviceCsr, DevicePadded, DeviceSide, DeviceTokens, Plan, most_pages, most_rows};
use crate::error::{Error, Result, Status};
use crate::types::Shape;

/// Lists to padded tables, with room for the most rows and pages that such a step can have.
pub(super) fn export_padded(
    plan: &Plan,
    place: &Place,
    batch: &BatchViews,
    lists: &View,
    out: &Rows,
) -> Result<()> {
    let [counts, seq_lens, pages] = &out.views;
    with_call(plan, place, batch, &[&out.views[..], &[*lists]].concat(), |call| {
        check_list_rows(&call, &out.views)?;
        check_list_rows(&call, &[*lists])?;
        let (width, widest) = (pages.shape[1], most_pages(&call));
        if width < widest {
            let wanted = format!("at least {widest} (most pages of such a batch's requests)");
            return Err(Error::new(Status::Shape, "padded.pages.shape[1]", wanted, width));
        }
        let out = DevicePadded {
            counts: address(counts),
            seq_lens: address(seq_lens),
            pages: address(pages),
            width,
        };
        // SAFETY: the caller of the C function vouches for every tensor and the stream; outputs lie apart.
        unsafe { plan.export_padded(&call, address(lists), &out) }
    })
}

/// Lists to CSR tables, likewise; entries of `indices` that such a step can have.
pub(super) fn export_csr(
    plan: &Plan,
    place: &Place,
    batch: &BatchViews,
    lists: &View,
    out: &Rows,
) -> Result<usize> {
    let [indptr, indices, last_page_len] = &out.views;
    check_rows(indptr, 1, "rows + 1")?;
    let into = DeviceCsr {
        indptr: address(indptr),
        indices: address(indices),
        last_page_len: address(last_page_len),
    };
    let mut entries = 0;
    with_call(plan, place, batch, &[&out.views[..], &[*lists]].concat(), |call| {
        check_list_rows(&call, &[*lists, *last_page_len])?;
        check_rows(indptr, most_rows(&call) + 1, "most list rows of such a batch, and one")?;
        entries = most_entries(&call)?;
        check_rows(indices, entries, "most pages of such a batch's lists")?;
        // SAFETY: as in `export_padded`.
        unsafe { plan.export_csr(&call, address(lists), &into) }
    })?;
    if place.scratch.is_none() {
        plan.context().check_memory(indptr.name, address(indptr))?;
        // SAFETY: as in `export_padded`; one entry, by the check above.
        unsafe { plan.export_no_rows(&into, place.stream) }?;
    }
    Ok(entries)
}

fn most_entries(call: &Call) -> Result<usize> {
    let most = most_rows(call).saturating_mul(most_pages(call));
    if i32::try_from(most).is_ok() {
        return Ok(most);
    }
    let wanted = "pages of all lists below 2^31";
    Err(Error::new(Status::Overflow, "csr.indices", wanted, most))
}

/// Merges two results, each `(out, lse)`, checked and apart from `results`.
pub(super) fn combine(
    plan: &Plan,
    (shape, stream): (&Shape, *mut c_void),
    sides: [(View, View); 2],
    results: &OutputViews,
) -> Result<()> {
    let inputs = sides.map(|(out, lse)| [out, lse]).concat();
    for view in results.views().iter().chain(&inputs).filter(|view| view.len > 0) {
        plan.context().check_memory(view.name, address(view))?;
    }
    let [a, b] = sides.map(|(out, lse)| DeviceSide {
        out: DeviceTokens { address: address(&out), stride_token: out.stride[0], stride_head: out.stride[1] },
        lse: address(&lse),
        lse_stride_head: lse.stride[0],
    });
    let total_q = results.out.shape[0];
    // SAFETY: as in `export_padded`.
    unsafe { plan.merge((shape, total_q), (&a, &b), &output(results), stream) }
}
