//! Where C++ types cross: an engine built by cargo whose scheduler keeps its block map in C++ containers.
//!
//! The C ABI would have such an engine flatten them by hand. Here its scheduler implements `compactattn::BlockMap`
//! (`cpp_shim/include/compactattn/block_map.hpp`: `std::string` ids, a `std::vector` of pages each), and
//! [`BlockTableBuf::gather`] makes a step's `block_table` and `seq_lens` from it; a C++ exception becomes an [`Error`].
//! A dependent's own bridge names the type by `type BlockMap = compactattn::bridge::ffi::BlockMap;`.
#![expect(clippy::multiple_unsafe_ops_per_block, clippy::missing_errors_doc, reason = "the macro's own code")]

use crate::batch::BlockTable;
use crate::error::{Error, Result, Status};
use cxx::let_cxx_string;

/// The C++ side; its header has the details.
#[cxx::bridge(namespace = "compactattn")]
pub mod ffi {
    unsafe extern "C++" {
        include!("compactattn/block_map.hpp");
        /// Which KV pages each request owns.
        type BlockMap;
        /// Physical pages of the request, in logical order.
        fn pages(self: &BlockMap, request: &CxxString) -> Result<&CxxVector<i32>>;
        /// KV tokens of the request, this step's chunk included.
        fn seq_len(self: &BlockMap, request: &CxxString) -> Result<i32>;
        /// A map of its own memory, for schedulers that have none yet.
        type HashBlockMap;
        /// An empty map.
        fn make_hash_block_map() -> UniquePtr<HashBlockMap>;
        /// Adds the request, or replaces what is known of it.
        fn set(self: Pin<&mut HashBlockMap>, request: &CxxString, pages: &CxxVector<i32>, seq_len: i32);
        /// Forgets the request; an error if it is not there.
        fn erase(self: Pin<&mut HashBlockMap>, request: &CxxString) -> Result<()>;
        /// The map as what [`gather`](super::BlockTableBuf::gather) reads.
        fn as_block_map(map: &HashBlockMap) -> &BlockMap;
    }
}

/// A step's `block_table` and `seq_lens`; its memory is reused from step to step.
#[derive(Clone, Debug, Default)]
pub struct BlockTableBuf {
    entries: Vec<i32>,
    width: usize,
    seq_lens: Vec<i32>,
}

impl BlockTableBuf {
    /// Reads the step's requests, in batch order, out of the scheduler's map. Rows are padded with -1, a page no pool
    /// has, to the longest.
    ///
    /// # Errors
    /// [`Status::Table`] with the exception's text if the map throws; then the table is empty.
    pub fn gather(&mut self, map: &ffi::BlockMap, requests: &[&str]) -> Result<()> {
        self.clear();
        self.read(map, requests).inspect_err(|_| self.clear())
    }

    /// `[requests, width]` page ids, for [`BatchParts`](crate::batch::BatchParts).
    #[must_use]
    pub fn block_table(&self) -> BlockTable<'_> {
        BlockTable { entries: &self.entries, stride_row: self.width, width: self.width }
    }

    /// `[requests]` KV tokens.
    #[must_use]
    pub fn seq_lens(&self) -> &[i32] {
        &self.seq_lens
    }

    fn clear(&mut self) {
        self.entries.clear();
        self.seq_lens.clear();
        self.width = 0;
    }

    fn read(&mut self, map: &ffi::BlockMap, requests: &[&str]) -> Result<()> {
        for request in requests {
            let_cxx_string!(id = request);
            self.width = self.width.max(map.pages(&id).map_err(|e| thrown(&e))?.len());
            self.seq_lens.push(map.seq_len(&id).map_err(|e| thrown(&e))?);
        }
        for (row, request) in requests.iter().enumerate() {
            let_cxx_string!(id = request);
            self.entries.extend_from_slice(map.pages(&id).map_err(|e| thrown(&e))?.as_slice());
            self.entries.resize((row + 1) * self.width, -1);
        }
        Ok(())
    }
}

fn thrown(exception: &cxx::Exception) -> Error {
    Error::plain(Status::Table, format!("block_map: {exception}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(map: &mut cxx::UniquePtr<ffi::HashBlockMap>, request: &str, pages: &[i32], seq_len: i32) {
        let_cxx_string!(id = request);
        let mut vector = cxx::CxxVector::new();
        pages.iter().for_each(|&page| vector.pin_mut().push(page));
        map.pin_mut().set(&id, &vector, seq_len);
    }

    #[test]
    fn a_step_reads_its_requests_in_batch_order_and_unknown_ones_are_errors() {
        let (mut map, mut step) = (ffi::make_hash_block_map(), BlockTableBuf::default());
        set(&mut map, "a", &[7, 3, 9], 40);
        set(&mut map, "b", &[4], 16);
        step.gather(ffi::as_block_map(&map), &["b", "a"]).unwrap();
        assert_eq!(step.block_table().entries, [4, -1, -1, 7, 3, 9]);
        assert_eq!((step.block_table().width, step.seq_lens()), (3, &[16, 40][..]));
        let_cxx_string!(gone = "a");
        map.pin_mut().erase(&gone).unwrap();
        assert!(map.pin_mut().erase(&gone).is_err());
        let error = step.gather(ffi::as_block_map(&map), &["b", "a"]).unwrap_err();
        assert_eq!(error.to_string(), "E_TABLE: block_map: request \"a\" is not in the block map");
        assert!(step.block_table().entries.is_empty() && step.seq_lens().is_empty());
    }
}
