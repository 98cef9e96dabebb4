//! Tables for other kernels: what the device writes is what the crate's own export makes of the same lists, word for
//! word, and nothing else is written.

use compactattn::capi::*;
use compactattn::export::{self, CsrMut, PaddedMut};

use super::abi::I32;
use super::device::struct_size;
use super::driver::Handle;
use super::memory::{Memory, POISON, Part};
use super::step::{Done, Step, ok, total_q};
use crate::common::case::Case;

/// counts, seq_lens, pages; indptr, indices, last_page_len.
pub(crate) type Parts = [Part; 6];

/// Room for the largest step, and for what such a batch can have at most.
pub(crate) fn place(memory: &mut Memory, case: &Case, sizes: &compactattn_sizes) -> Parts {
    let rows = sizes.list_rows as usize;
    let entries = most_rows(case) * most_pages(case);
    let words = [rows, rows, rows * width(case), rows + 1, entries + 5, rows];
    words.map(|count| memory.add_poison(count * 4))
}

impl Step<'_, '_> {
    /// Both exports of the lists, on `stream`.
    pub(crate) fn exports(&self, stream: Handle) -> Done {
        let rows = self.plan.sizes.list_rows as usize;
        let parts = self.parts.exports;
        let ints = |i: usize, shape: &[usize]| self.tensor(parts[i], I32, shape);
        let padded = compactattn_padded {
            struct_size: struct_size::<compactattn_padded>(),
            reserved: 0,
            counts: ints(0, &[rows]),
            seq_lens: ints(1, &[rows]),
            pages: ints(2, &[rows, width(self.case)]),
        };
        let csr = compactattn_csr {
            struct_size: struct_size::<compactattn_csr>(),
            reserved: 0,
            indptr: ints(3, &[rows + 1]),
            indices: ints(4, &[parts[4].len / 4]),
            last_page_len: ints(5, &[rows]),
        };
        let batch = compactattn_batch { stream, ..self.batch() };
        let lists = self.lists(self.parts.lists);
        let (plan, batch, lists) = (self.plan.handle, &raw const batch, &raw const lists);
        // SAFETY: the structs describe parts of the memory.
        ok("table_export_padded", unsafe {
            compactattn_table_export_padded(plan, 0, batch, lists, &raw const padded)
        })?;
        let mut entries = -1;
        // SAFETY: as above.
        ok("table_export_csr", unsafe {
            compactattn_table_export_csr(plan, 0, batch, lists, &raw const csr, &raw mut entries)
        })?;
        let room = (parts[4].len / 4) as i64;
        if (0..=room).contains(&entries) {
            Ok(())
        } else {
            Err(format!("{entries} entries in room for {room}"))
        }
    }

    pub(crate) fn poison_exports(&self) {
        self.parts.exports.iter().for_each(|&part| self.memory.poison(part));
    }
}

/// The six tables that `lists` should give, poison where nothing is to be written.
///
/// A device that cannot say how many rows a batch has leaves those that it could have had empty.
pub(crate) fn expected(
    case: &Case,
    lists: &[u32],
    parts: &Parts,
    on_gpu: bool,
) -> Result<[Vec<i32>; 6], String> {
    let mut tables = parts.map(|part| vec![i32::from_ne_bytes([POISON; 4]); part.len / 4]);
    let [counts, seq_lens, pages, indptr, indices, last_page_len] = &mut tables;
    let (layout, batch, width) = (case.layout(), case.batch(), width(case));
    let rows = export::padded(&layout, &batch, lists, &mut PaddedMut { counts, seq_lens, pages, width })
        .map_err(|e| e.to_string())?;
    let (_, entries) = export::csr(&layout, &batch, lists, &mut CsrMut { indptr, indices, last_page_len })
        .map_err(|e| e.to_string())?;
    if on_gpu {
        let surplus = rows..most_rows(case);
        counts[surplus.clone()].fill(0);
        seq_lens[surplus.clone()].fill(0);
        pages[surplus.start * width..surplus.end * width].fill(0);
        indptr[surplus.start + 1..=surplus.end].fill(entries as i32);
        last_page_len[surplus].fill(0);
    }
    Ok(tables)
}

/// Names the first table that differs.
pub(crate) fn compare(got: &[Vec<i32>; 6], want: &[Vec<i32>; 6]) -> Done {
    const NAMES: [&str; 6] = ["counts", "seq_lens", "pages", "indptr", "indices", "last_page_len"];
    for (name, (got, want)) in NAMES.iter().zip(got.iter().zip(want)) {
        if let Some(at) = (0..want.len()).find(|&at| got[at] != want[at]) {
            return Err(format!("exported {name}[{at}] is {}, not {}", got[at], want[at]));
        }
    }
    Ok(())
}

fn most_rows(case: &Case) -> usize {
    let layout = case.layout();
    layout.most_spans(case.seq_lens.len(), total_q(case)).0 * layout.lists_per_span()
}

fn most_pages(case: &Case) -> usize {
    case.table_width.min(case.limits.max_kv_len.div_ceil(case.shape.page_size))
}

/// One entry more than any row needs.
fn width(case: &Case) -> usize {
    most_pages(case) + 1
}
