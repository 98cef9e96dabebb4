//! Lists as tables of whole engine pages, on the GPU: nothing is read back, so every row that such a step can have is
//! written.

use std::ffi::c_void;

use super::batch::int32;
use super::kernels::{Arg, Grid};
use super::plan::{Call, Plan, Run};
use crate::error::Result;

/// Padded tables in device memory, laid out as [`crate::export::PaddedMut`].
#[derive(Clone, Copy, Debug)]
pub struct DevicePadded {
    /// `[rows]` i32.
    pub counts: u64,
    /// `[rows]` i32.
    pub seq_lens: u64,
    /// `[rows, width]` i32.
    pub pages: u64,
    /// Entries of a row: at least [`most_pages`] of the step.
    pub width: usize,
}

/// CSR tables in device memory, laid out as [`crate::export::CsrMut`].
#[derive(Clone, Copy, Debug)]
pub struct DeviceCsr {
    /// `[rows + 1]` i32.
    pub indptr: u64,
    /// `[rows * most_pages]` i32.
    pub indices: u64,
    /// `[rows]` i32.
    pub last_page_len: u64,
}

/// List rows that a step of the call's extents can have: what the tables have room for.
#[must_use]
pub fn most_rows(call: &Call) -> usize {
    let (spans, _) = call.layout.most_spans(call.batch.num_reqs, call.batch.total_q);
    spans * call.layout.lists_per_span()
}

/// Pages that a row of such a step can have: a longer request is refused on the device, or has no table.
#[must_use]
pub fn most_pages(call: &Call) -> usize {
    call.batch.table_width.min(call.layout.limits.max_kv_len.div_ceil(call.layout.shape.page_size))
}

impl Plan {
    /// Lists to padded tables; rows after the step's own, of [`most_rows`], become empty.
    ///
    /// # Errors
    /// As [`Plan::forward`].
    ///
    /// # Safety
    /// As [`Plan::forward`].
    pub unsafe fn export_padded(&self, call: &Call, lists: u64, out: &DevicePadded) -> Result<()> {
        let rows = int32(most_rows(call));
        let DevicePadded { counts, seq_lens, pages, width } = *out;
        let tables = PaddedTables { counts, seq_lens, pages, rows, width: int32(width) };
        // SAFETY: this function's contract.
        let run = unsafe { self.begin_at(call, lists) }?;
        launch(&run, "compactattn_export_padded", rows, &[Arg::of(&run.step), Arg::of(&tables)])
    }

    /// Lists to CSR tables; rows after the step's own, of [`most_rows`], become empty.
    ///
    /// # Errors
    /// As [`Plan::forward`].
    ///
    /// # Safety
    /// As [`Plan::forward`].
    pub unsafe fn export_csr(&self, call: &Call, lists: u64, out: &DeviceCsr) -> Result<()> {
        let rows = int32(most_rows(call));
        let DeviceCsr { indptr, indices, last_page_len } = *out;
        let tables = CsrTables { indptr, indices, last_page_len, rows, reserved: 0 };
        // SAFETY: this function's contract.
        let run = unsafe { self.begin_at(call, lists) }?;
        let both = [Arg::of(&run.step), Arg::of(&tables)];
        launch(&run, "compactattn_export_counts", rows, &both)?;
        launch(&run, "compactattn_export_starts", 1, &[Arg::of(&tables)])?;
        launch(&run, "compactattn_export_csr", rows, &both)
    }

    /// CSR tables of a step without queries: where no row starts.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// As [`Plan::forward`], for `out.indptr`, which has an entry, and `stream`.
    pub unsafe fn export_no_rows(&self, out: &DeviceCsr, stream: *mut c_void) -> Result<()> {
        let tables = CsrTables { indptr: out.indptr, indices: 0, last_page_len: 0, rows: 0, reserved: 0 };
        let context = self.context();
        // SAFETY: this function's contract.
        let stream = unsafe { context.stream(stream) }?;
        let entered = context.enter()?;
        context.kernels().launch(stream, "compactattn_export_starts", ctas(1), &[Arg::of(&tables)])?;
        drop(entered);
        Ok(())
    }

    /// Spans planned, lists in place.
    unsafe fn begin_at<'a>(&'a self, call: &'a Call<'a>, lists: u64) -> Result<Run<'a>> {
        // SAFETY: the caller's promise.
        let mut run = unsafe { self.begin(call) }?;
        run.step.stages.lists = lists;
        run.plan_spans()?;
        Ok(run)
    }
}

fn launch(run: &Run, name: &'static str, count: i32, args: &[Arg]) -> Result<()> {
    run.plan.context().kernels().launch(run.stream, name, ctas(count), args)
}

fn ctas(count: i32) -> Grid {
    Grid { blocks: [count.cast_unsigned(), 1, 1], threads: 256, shared_bytes: 0 }
}

/// As cuda/table/export.h.
#[derive(Clone, Copy)]
#[repr(C)]
struct PaddedTables {
    counts: u64,
    seq_lens: u64,
    pages: u64,
    rows: i32,
    width: i32,
}

/// As cuda/table/export.h.
#[derive(Clone, Copy)]
#[repr(C)]
struct CsrTables {
    indptr: u64,
    indices: u64,
    last_page_len: u64,
    rows: i32,
    reserved: i32,
}

const _: () = assert!(size_of::<PaddedTables>() == 32 && size_of::<CsrTables>() == 32);
