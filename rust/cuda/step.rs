//! From a layer's layout and settings to what kernels take.

use super::batch::{DeviceBatch, int32};
use super::clusters::samples;
use super::params;
use super::scratch::Scratch;
use crate::plan::Layout;
use crate::select::keep::counts_open_region;
use crate::select::{Merge, merge_of};
use crate::settings::{Keep, KeepAt, Selector};

/// The argument of every stage from batch to plan.
pub(crate) fn step(layout: &Layout, batch: &DeviceBatch, scratch: &Scratch) -> params::Step {
    let mut stages = scratch.stages;
    // What this step can need at most: grids are sized by it.
    let (spans, selects) = layout.most_spans(batch.num_reqs, batch.total_q);
    stages.max_list_spans = int32(spans).min(stages.max_list_spans);
    stages.max_select_spans = int32(selects).min(stages.max_select_spans);
    params::Step {
        batch: batch.params(),
        layout: layout_params(layout),
        settings: settings_params(layout),
        stages,
    }
}

fn layout_params(layout: &Layout) -> params::Layout {
    let (shape, geometry) = (&layout.shape, &layout.geometry);
    params::Layout {
        num_q_heads: int32(shape.num_q_heads),
        num_kv_heads: int32(shape.num_kv_heads),
        group_size: int32(shape.group_size()),
        head_dim: int32(shape.head_dim),
        log2_page_tokens: log2(geometry.page_size),
        log2_block_tokens: log2(geometry.block_size),
        log2_box_tokens: log2(geometry.box_tokens()),
        heads_per_list: int32(layout.heads_per_list()),
        lists_per_kv_head: int32(layout.lists_per_kv_head()),
        list_span: int32(layout.settings.scope.query_span),
        select_span: int32(layout.select_span()),
        max_kv_len: int32(layout.limits.max_kv_len),
        max_blocks: int32(layout.max_blocks()),
        mask_words: int32(layout.mask_words()),
        max_boxes: int32(layout.max_boxes()),
        sm_scale: shape.sm_scale,
    }
}

fn settings_params(layout: &Layout) -> params::Settings {
    let settings = &layout.settings;
    let flashprefill = settings.selector == Selector::FlashPrefill;
    let (keep, keep_value) = match settings.keep {
        Keep::Threshold(x) => (0, x),
        Keep::Mass(x) => (1, x),
        Keep::Density(x) => (2, x),
    };
    let budget = if let Keep::Density(share) = settings.keep { share } else { settings.max_density };
    let only = |on: bool, x: usize| if on { int32(x) } else { 0 };
    params::Settings {
        all_dense: i32::from(settings.selector == Selector::Dense),
        dense_below_kv_len: int32(settings.dense.below_kv_len),
        dense_max_q_len: int32(settings.dense.max_q_len),
        dense_prefix_tokens: int32(settings.dense.prefix_tokens),
        keep,
        keep_value,
        min_density: settings.min_density,
        max_density: settings.max_density,
        keep_at_rows: i32::from(settings.keep_at == KeepAt::Row),
        merge_max: i32::from(merge_of(settings.selector) == Merge::Max),
        sink_blocks: int32(settings.sink_blocks),
        local_blocks: int32(settings.local_blocks),
        density_guard: settings.density_guard,
        mass_counts_open: i32::from(counts_open_region(settings.selector)),
        min_budget: only(flashprefill, settings.flashprefill.min_budget),
        non_voting_spans: only(flashprefill, settings.flashprefill.non_voting_spans),
        // More than 0 where a kernel chooses samples: those after it tell by this what they may read early.
        sample_rows: only(samples(layout), settings.sample_rows),
        relative_to_past: i32::from(settings.flashprefill.relative_to_past),
        xattention_stride: int32(settings.xattention_stride),
        candidate_share: (budget * settings.two_level_factor).min(1.0),
    }
}

/// Of a power of two, as pages, blocks and boxes are.
pub(crate) fn log2(x: usize) -> i32 {
    x.trailing_zeros().cast_signed()
}
