//! A list's boxes as one stream of tokens, read in place.

use std::ops::Range;

use super::tile::{KvTile, STREAM_TILE};
use crate::batch::Batch;
use crate::plan::Layout;
use crate::table::Table;
use crate::tensor::Pool;

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stream<'a> {
    layout: &'a Layout,
    batch: &'a Batch<'a>,
    /// Physical boxes, in order.
    boxes: &'a [i32],
    /// Tokens the boxes hold.
    pub(super) len: usize,
    kv_head: usize,
}

impl<'a> Stream<'a> {
    pub(super) fn new(layout: &'a Layout, batch: &'a Batch<'a>, table: &Table<'a>, row: usize) -> Self {
        let start = row * layout.max_boxes();
        let boxes = &table.boxes[start..start + index(table.counts[row])];
        let (kv_head, _) = layout.list_heads(row % layout.lists_per_span());
        Self { layout, batch, boxes, len: index(table.stream_lens[row]), kv_head }
    }

    /// Stream tokens of one of `splits` nearly equal runs of boxes.
    pub(super) fn split(&self, split: usize, splits: usize) -> Range<usize> {
        let token = |i: usize| {
            let first_box = self.boxes.len() * i / splits;
            (first_box * self.layout.geometry.box_tokens()).min(self.len)
        };
        token(split)..token(split + 1)
    }

    /// Loads tokens `range`, at most [`STREAM_TILE`]; slots of the last box after the stream's end stay unread.
    pub(super) fn load(&self, range: Range<usize>, into: &mut KvTile) {
        debug_assert!(range.len() <= STREAM_TILE && range.end <= self.len, "a tile within the stream");
        into.len = range.len();
        self.load_rows(self.batch.k(), range.clone(), &mut into.k);
        self.load_rows(self.batch.v(), range, &mut into.v);
    }

    fn load_rows(&self, pool: &Pool, range: Range<usize>, into: &mut [f32]) {
        let (geometry, head_dim) = (self.layout.geometry, self.layout.shape.head_dim);
        let (box_tokens, parts) = (geometry.box_tokens(), geometry.boxes_per_page());
        let mut token = range.start;
        while token < range.end {
            let entry = index(self.boxes[token / box_tokens]);
            let within = token % box_tokens;
            let rows = (box_tokens - within).min(range.end - token);
            let slot = entry % parts * box_tokens + within;
            let at = (token - range.start) * head_dim;
            pool.load_rows(entry / parts, slot, self.kv_head, head_dim, &mut into[at..at + rows * head_dim]);
            token += rows;
        }
    }
}

/// Counts and boxes are never negative: `table` wrote them.
fn index(x: i32) -> usize {
    usize::try_from(x).unwrap_or(0)
}
