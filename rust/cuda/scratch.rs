//! A call's workspace on the device, cut into the stage buffers.

use super::batch::int32;
use super::clusters::samples;
use super::params::{
    ARRIVALS, COUNTERS_BYTES, ITEM_BYTES, PIECE_BYTES, REQUEST_BYTES, SPAN_BYTES, Stages, TILE_ROWS,
    TILE_TOKENS,
};
use crate::error::{Error, Result, Status};
use crate::plan::Layout;
use crate::settings::{KeepAt, Selector};
use crate::workspace::Sizes;

/// Where attend leaves the pieces of cut items.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Partials {
    /// `[2 * num_ctas, TILE_ROWS, head_dim]` f32.
    pub(crate) out: u64,
    /// `[2 * num_ctas, TILE_ROWS]` f32.
    pub(crate) lse: u64,
}

/// Where mean correction keeps the means of every request, in the pool's type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MeanRows {
    /// `[max_num_reqs, num_kv_heads, len, head_dim]`.
    pub(crate) k: u64,
    /// As `k`.
    pub(crate) v: u64,
    /// `[list rows, len]` bytes: blocks of each mean that a list leaves out.
    pub(crate) skipped: u64,
    /// Means of a row: those of the longest request, up to whole tiles; 0 without correction.
    pub(crate) len: usize,
}

/// Buffers of the largest step of one layer, from one address up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scratch {
    /// Addresses and capacities.
    pub(crate) stages: Stages,
    /// See [`Partials`].
    pub(crate) partials: Partials,
    /// See [`MeanRows`].
    pub(crate) means: MeanRows,
    /// All of it.
    pub(crate) bytes: usize,
}

impl Scratch {
    /// Cuts the memory at `address`; with address 0 only the sizes mean anything. `cells`: [`super::select::scratch_len`].
    ///
    /// # Errors
    /// [`Status::Overflow`].
    pub(crate) fn at(address: u64, layout: &Layout, num_ctas: usize, cells: usize) -> Result<Self> {
        let mut cursor = Cursor { address, bytes: 0 };
        let heads = layout.shape.num_q_heads;
        let (spans, selects) = (layout.max_list_rows() / layout.lists_per_span(), layout.max_select_spans());
        let rows = layout.max_list_rows();
        let by_rows = layout.settings.keep_at == KeepAt::Row;
        let items = max_items(layout);
        check_costs(layout, items)?;
        let mut stages = Stages {
            counters: cursor.take(&[COUNTERS_BYTES])?,
            requests: cursor.take(&[layout.limits.max_num_reqs, REQUEST_BYTES])?,
            list_spans: cursor.take(&[spans, SPAN_BYTES])?,
            select_spans: cursor.take(&[selects, SPAN_BYTES])?,
            ..Stages::default()
        };
        if scores(layout.settings.selector) {
            stages.scores = cursor.take(&[selects, heads, layout.max_blocks(), 4])?;
        }
        stages.cells = cursor.take(&[cells, 4])?;
        if samples(layout) {
            let (kv_heads, each) = (layout.shape.num_kv_heads, layout.settings.sample_rows);
            stages.samples = cursor.take(&[selects, kv_heads, each, 4])?;
        }
        if by_rows {
            stages.masks = cursor.take(&[selects, heads, layout.mask_words(), 4])?;
        }
        stages.lists = cursor.take(&[rows, layout.mask_words(), 4])?;
        stages.counts = cursor.take(&[rows, 4])?;
        stages.stream_lens = cursor.take(&[rows, 4])?;
        stages.boxes = cursor.take(&[rows, layout.max_boxes(), 4])?;
        stages.items = cursor.take(&[items, ITEM_BYTES])?;
        stages.arrivals = cursor.take(&[num_ctas + 1, ARRIVALS, 4])?;
        stages.pieces = cursor.take(&[items + num_ctas, PIECE_BYTES])?;
        stages.piece_starts = cursor.take(&[num_ctas + 1, 4])?;
        stages.costs = cursor.take(&[items + 1, 4])?;
        let partials = Partials {
            out: cursor.take(&[2 * num_ctas, TILE_ROWS, layout.shape.head_dim, 4])?,
            lse: cursor.take(&[2 * num_ctas, TILE_ROWS, 4])?,
        };
        let means = mean_rows(layout, &mut cursor)?;
        (stages.max_list_spans, stages.max_select_spans) = (int32(spans), int32(selects));
        (stages.max_items, stages.num_ctas) = (int32(items), int32(num_ctas));
        Ok(Self { stages, partials, means, bytes: cursor.bytes })
    }
}

fn mean_rows(layout: &Layout, cursor: &mut Cursor) -> Result<MeanRows> {
    if !layout.settings.mean_correction {
        return Ok(MeanRows::default());
    }
    let means = layout.max_blocks().div_ceil(layout.geometry.blocks_per_mean());
    let (shape, len) = (&layout.shape, means.next_multiple_of(TILE_TOKENS));
    let bytes =
        [layout.limits.max_num_reqs, shape.num_kv_heads, len, shape.head_dim, shape.dtype.size_bytes()];
    let (k, v) = (cursor.take(&bytes)?, cursor.take(&bytes)?);
    Ok(MeanRows { k, v, skipped: cursor.take(&[layout.max_list_rows(), len])?, len })
}

/// Whether the selector fills scores of ours.
fn scores(selector: Selector) -> bool {
    !matches!(selector, Selector::Dense | Selector::External)
}

/// Query tiles of the largest step, over all lists.
fn max_items(layout: &Layout) -> usize {
    let tokens = TILE_ROWS / layout.heads_per_list();
    let spans = layout.max_list_rows() / layout.lists_per_span();
    (layout.limits.max_total_q / tokens + spans) * layout.lists_per_span()
}

/// Refuses a step whose tiles plan_work cannot add up: it counts half tiles in 32 bits (cuda/plan/share.cuh).
fn check_costs(layout: &Layout, items: usize) -> Result<()> {
    let tokens = layout.max_boxes() * layout.geometry.box_tokens();
    let tiles = tokens.div_ceil(TILE_TOKENS) * if layout.settings.mean_correction { 2 } else { 1 };
    let all = items.saturating_mul(ITEM_COST + TILE_COST * tiles);
    if u32::try_from(all).is_ok() {
        return Ok(());
    }
    let wanted = "max_total_q, num_q_heads and max_kv_len whose tiles of queries and KV are fewer than 2^31";
    Err(Error::new(Status::Overflow, "limits", wanted, all / TILE_COST))
}

/// In half tiles, as kItemCost and kTileCost of cuda/plan/share.cuh.
const ITEM_COST: usize = 3;
const TILE_COST: usize = 2;

struct Cursor {
    address: u64,
    bytes: usize,
}

impl Cursor {
    /// The address of the next buffer, aligned; `factors` multiply to its bytes.
    fn take(&mut self, factors: &[usize]) -> Result<u64> {
        let overflow = || Error::new(Status::Overflow, "limits", "buffers within 63 bits", "more");
        let bytes = factors.iter().try_fold(1_usize, |all, &x| all.checked_mul(x)).ok_or_else(overflow)?;
        let start = self.bytes;
        let end = start.checked_add(bytes).and_then(|end| end.checked_next_multiple_of(Sizes::ALIGNMENT));
        self.bytes = end.filter(|&end| i64::try_from(end).is_ok()).ok_or_else(overflow)?;
        Ok(self.address.wrapping_add(start as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Limits;
    use crate::settings::Settings;
    use crate::types::{Dtype, Shape};

    fn layout(selector: Selector, limits: Limits) -> Layout {
        let shape = Shape {
            num_q_heads: 32,
            num_kv_heads: 8,
            head_dim: 128,
            page_size: 16,
            dtype: Dtype::Bf16,
            kv_dtype: Dtype::Bf16,
            sm_scale: 0.088,
        };
        Layout::new(shape, Settings::of(selector), limits).unwrap()
    }

    #[test]
    fn buffers_are_aligned_apart_and_grow_with_every_limit() {
        let limits = Limits { max_num_reqs: 4, max_total_q: 1024, max_kv_len: 8192 };
        for selector in [Selector::Dense, Selector::FlashPrefill, Selector::SampledExact] {
            let small = Scratch::at(0, &layout(selector, limits), 132, 1000).unwrap();
            let s = small.stages;
            let ends =
                [s.requests, s.list_spans, s.select_spans, s.lists, s.counts, s.boxes, s.items, s.arrivals];
            assert!(ends.windows(2).all(|w| w[0] < w[1] && w[1] % 256 == 0), "{ends:?}");
            assert!(small.partials.lse + 2 * 132 * 128 * 4 <= small.bytes as u64);
            for more in [
                Limits { max_num_reqs: 64, ..limits },
                Limits { max_total_q: 2048, ..limits },
                Limits { max_kv_len: 16384, ..limits },
            ] {
                assert!(small.bytes < Scratch::at(0, &layout(selector, more), 132, 1000).unwrap().bytes);
            }
        }
    }

    #[test]
    fn a_step_whose_tiles_do_not_add_up_is_refused() {
        let limits = Limits { max_num_reqs: 1, max_total_q: 1 << 19, max_kv_len: 1 << 20 };
        assert!(Scratch::at(0, &layout(Selector::Dense, limits), 132, 0).is_ok());
        let more = Limits { max_total_q: 1 << 21, max_kv_len: 1 << 21, ..limits };
        let refused = Scratch::at(0, &layout(Selector::Dense, more), 132, 0).unwrap_err();
        assert_eq!(refused.status(), Status::Overflow);
    }
}
