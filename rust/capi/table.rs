//! `compactattn_table` and the tables for other kernels. A table that comes back from a caller is checked entry by
//! entry before anything follows it.

use super::check::check;
use super::objects::PlanObject;
use super::read::input;
use super::structs::compactattn_tensor;
use super::structs_step::{compactattn_csr, compactattn_padded, compactattn_table};
use super::tensor::{Dim, View, Wanted};
use super::views::check_rows;
use crate::batch::Batch;
use crate::error::{Error, Result, Status};
use crate::export::{CsrMut, PaddedMut};
use crate::plan::Layout;
use crate::table::{Table, TableMut};
use crate::types::Dtype;

/// Three tensors with a row per list: a table, or a form of it for other kernels.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    /// In the order of the C struct.
    pub(super) views: [View; 3],
}

impl Rows {
    /// Checks the tensors of a table.
    ///
    /// # Safety
    /// `from`: NULL, or readable for its `struct_size` bytes.
    pub(super) unsafe fn table(
        plan: &PlanObject,
        layout: &Layout,
        from: *const compactattn_table,
    ) -> Result<Self> {
        // SAFETY: this function's contract.
        let c = unsafe { input("table", from) }?;
        let boxes = vec![Dim::Any, Dim::Is(layout.max_boxes(), "max_boxes")];
        Self::check(
            plan,
            [
                ("table.counts", &c.counts, vec![Dim::Any]),
                ("table.stream_lens", &c.stream_lens, vec![Dim::Any]),
                ("table.boxes", &c.boxes, boxes),
            ],
        )
    }

    /// Checks the tensors of padded tables.
    ///
    /// # Safety
    /// As [`Rows::table`].
    pub(super) unsafe fn padded(plan: &PlanObject, from: *const compactattn_padded) -> Result<Self> {
        // SAFETY: this function's contract.
        let c = unsafe { input("padded", from) }?;
        Self::check(
            plan,
            [
                ("padded.counts", &c.counts, vec![Dim::Any]),
                ("padded.seq_lens", &c.seq_lens, vec![Dim::Any]),
                ("padded.pages", &c.pages, vec![Dim::Any, Dim::Any]),
            ],
        )
    }

    /// Checks the tensors of CSR tables.
    ///
    /// # Safety
    /// As [`Rows::table`].
    pub(super) unsafe fn csr(plan: &PlanObject, from: *const compactattn_csr) -> Result<Self> {
        // SAFETY: this function's contract.
        let c = unsafe { input("csr", from) }?;
        Self::check(
            plan,
            [
                ("csr.indptr", &c.indptr, vec![Dim::Any]),
                ("csr.indices", &c.indices, vec![Dim::Any]),
                ("csr.last_page_len", &c.last_page_len, vec![Dim::Any]),
            ],
        )
    }

    fn check(plan: &PlanObject, args: [(&'static str, &compactattn_tensor, Vec<Dim>); 3]) -> Result<Self> {
        let views = args.map(|(name, tensor, dims)| {
            check(tensor, &Wanted::dense(name, Dtype::I32, dims, plan.context.device))
        });
        let [a, b, c] = views;
        Ok(Self { views: [a?, b?, c?] })
    }

    /// Refuses what has fewer rows than the batch has lists.
    pub(super) fn check_rows(&self, rows: usize) -> Result<()> {
        self.views.iter().try_for_each(|view| check_rows(view, rows, "list rows of this batch"))
    }

    /// A table to write.
    ///
    /// # Safety
    /// As [`View::slice_mut`].
    pub(super) unsafe fn table_mut<'a>(&self) -> TableMut<'a> {
        // SAFETY: this function's contract; the dtype is i32.
        let [counts, stream_lens, boxes] = self.views.map(|view| unsafe { view.slice_mut() });
        TableMut { counts, stream_lens, boxes }
    }

    /// Padded tables to write.
    ///
    /// # Safety
    /// As [`View::slice_mut`].
    pub(super) unsafe fn padded_mut<'a>(&self) -> PaddedMut<'a> {
        // SAFETY: this function's contract; the dtype is i32.
        let [counts, seq_lens, pages] = self.views.map(|view| unsafe { view.slice_mut() });
        PaddedMut { counts, seq_lens, pages, width: self.views[2].shape[1] }
    }

    /// CSR tables to write.
    ///
    /// # Safety
    /// As [`View::slice_mut`].
    pub(super) unsafe fn csr_mut<'a>(&self) -> CsrMut<'a> {
        // SAFETY: this function's contract; the dtype is i32.
        let [indptr, indices, last_page_len] = self.views.map(|view| unsafe { view.slice_mut() });
        CsrMut { indptr, indices, last_page_len }
    }

    /// A table to read, checked.
    ///
    /// # Safety
    /// As [`View::slice`].
    pub(super) unsafe fn open<'a>(&self, layout: &Layout, batch: &Batch) -> Result<Table<'a>> {
        self.check_rows(list_rows(layout, batch))?;
        // SAFETY: this function's contract; the dtype is i32.
        let [counts, stream_lens, boxes] = self.views.map(|view| unsafe { view.slice() });
        let table = Table { counts, stream_lens, boxes };
        (0..list_rows(layout, batch)).try_for_each(|row| check_row(layout, batch, &table, row))?;
        Ok(table)
    }
}

/// Rows of lists, and so of a table, that this batch has.
pub(super) fn list_rows(layout: &Layout, batch: &Batch) -> usize {
    layout.list_spans(batch).len() * layout.lists_per_span()
}

fn check_row(layout: &Layout, batch: &Batch, table: &Table, row: usize) -> Result<()> {
    let (count, len) = (table.counts[row], table.stream_lens[row]);
    let boxes = usize::try_from(count).ok().filter(|&n| n <= layout.max_boxes()).ok_or_else(|| {
        let wanted = format!("0..={} (max_boxes)", layout.max_boxes());
        Error::new(Status::Table, format!("table.counts[{row}]"), wanted, count)
    })?;
    let most = boxes * layout.geometry.box_tokens();
    let least = most.saturating_sub(layout.geometry.box_tokens() - 1).min(most);
    if !usize::try_from(len).is_ok_and(|len| (least..=most).contains(&len)) {
        let wanted = format!("{least}..={most}, by its count of boxes");
        return Err(Error::new(Status::Table, format!("table.stream_lens[{row}]"), wanted, len));
    }
    let known = batch.k().num_pages * layout.geometry.boxes_per_page();
    let ids = &table.boxes[row * layout.max_boxes()..][..boxes];
    match ids.iter().position(|&id| usize::try_from(id).map_or(true, |id| id >= known)) {
        None => Ok(()),
        Some(i) => {
            let name = format!("table.boxes[{row}][{i}]");
            Err(Error::new(Status::Table, name, format!("0..{known} (boxes in the pool)"), ids[i]))
        }
    }
}
