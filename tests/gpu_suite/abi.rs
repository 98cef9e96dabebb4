//! Structs of the C ABI, filled from a case.

use std::ffi::c_void;

use compactattn::capi::*;
use compactattn::settings::{Keep, Settings};

use super::device::{Device, last_error, struct_size};
use super::step::Given;
use crate::common::case::Case;

pub(crate) const I32: i32 = compactattn_dtype::COMPACTATTN_DTYPE_I32 as i32;
pub(crate) const U32: i32 = compactattn_dtype::COMPACTATTN_DTYPE_U32 as i32;
pub(crate) const F32: i32 = compactattn_dtype::COMPACTATTN_DTYPE_F32 as i32;

/// The tensor that means "none".
pub(crate) const NONE: compactattn_tensor = compactattn_tensor {
    data: std::ptr::null_mut(),
    shape: [0; 4],
    stride: [0; 4],
    storage_bytes: 0,
    dtype: 0,
    ndim: 0,
    device_kind: 0,
    device_ordinal: 0,
};

/// A plan for one case; destroyed with it.
pub(crate) struct Plan {
    pub(crate) handle: *mut compactattn_plan,
    pub(crate) sizes: compactattn_sizes,
}

/// Why there is no plan.
pub(crate) enum Refusal {
    /// The library offers no such thing here, and says so.
    Unsupported(String),
    /// It broke.
    Fault(String),
}

impl Plan {
    pub(crate) fn new(device: &Device, case: &Case, given: &Given) -> Result<Self, Refusal> {
        let settings = settings_of(&case.settings);
        let mut desc = desc_of(case, &settings);
        if let Given::Gate(file) = given {
            desc.gate_weights_path = file.path.as_ptr();
            desc.rope_inv_freq = file.inv_freq.as_ptr();
            desc.rope_inv_freq_len = file.inv_freq.len() as i32;
            desc.rope_interleaved = file.interleaved.into();
        }
        let mut handle = std::ptr::null_mut();
        // SAFETY: `desc` and what it points to live through the call.
        match unsafe { compactattn_plan_create(device.context, &raw const desc, &raw mut handle) } {
            compactattn_status::COMPACTATTN_OK => Ok(Self { handle, sizes: sizes_of(handle) }),
            compactattn_status::COMPACTATTN_E_UNSUPPORTED => Err(Refusal::Unsupported(last_error())),
            _ => Err(Refusal::Fault(last_error())),
        }
    }

    /// What was selected since the plan was made; the device has been waited for.
    pub(crate) fn stats(&self) -> compactattn_stats {
        let mut stats = compactattn_stats {
            struct_size: struct_size::<compactattn_stats>(),
            reserved: 0,
            calls: 0,
            lists: 0,
            candidates: 0,
            selected: 0,
            forced: 0,
            guarded: 0,
            dense: 0,
            refused: 0,
        };
        // SAFETY: `stats` is as long as it says.
        let status = unsafe { compactattn_plan_stats(self.handle, 0, &raw mut stats) };
        assert_eq!(status, compactattn_status::COMPACTATTN_OK, "{}", last_error());
        stats
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        let status = compactattn_plan_destroy(self.handle);
        assert!(status == compactattn_status::COMPACTATTN_OK || std::thread::panicking(), "{}", last_error());
    }
}

/// `data` as a tensor of that shape; strides of a contiguous one unless given.
pub(crate) fn tensor(
    data: *mut u8,
    bytes: usize,
    dtype: i32,
    shape: &[usize],
    strides: Option<&[usize]>,
) -> compactattn_tensor {
    let mut tensor = compactattn_tensor {
        data: data.cast::<c_void>(),
        storage_bytes: bytes as i64,
        dtype,
        ndim: shape.len() as i32,
        ..NONE
    };
    for i in 0..shape.len() {
        let contiguous = || shape[i + 1..].iter().map(|&x| x.max(1)).product();
        tensor.shape[i] = shape[i] as i64;
        tensor.stride[i] = strides.map_or_else(contiguous, |strides| strides[i]) as i64;
    }
    tensor
}

pub(crate) fn desc_of(case: &Case, settings: &compactattn_settings) -> compactattn_plan_desc {
    compactattn_plan_desc {
        struct_size: struct_size::<compactattn_plan_desc>(),
        num_q_heads: case.shape.num_q_heads as i32,
        num_kv_heads: case.shape.num_kv_heads as i32,
        head_dim: case.shape.head_dim as i32,
        page_size: case.shape.page_size as i32,
        dtype: case.shape.dtype as i32,
        kv_dtype: case.shape.kv_dtype as i32,
        sm_scale: case.shape.sm_scale,
        max_num_reqs: case.limits.max_num_reqs as i32,
        num_layers: 1,
        max_total_q: case.limits.max_total_q as i64,
        max_kv_len: case.limits.max_kv_len as i64,
        settings,
        layer_settings: std::ptr::null(),
        gate_weights_path: std::ptr::null(),
        rope_inv_freq: std::ptr::null(),
        rope_inv_freq_len: 0,
        rope_interleaved: 0,
        // Equal shares for all processors where the case asks for several splits, whole lists otherwise.
        num_splits: i32::from(case.splits == 1),
        sliding_window: 0,
        logits_soft_cap: 0.0,
        attention_sinks: 0,
        alibi: 0,
        reserved: 0,
    }
}

pub(crate) fn settings_of(s: &Settings) -> compactattn_settings {
    use compactattn_keep as keep;
    let (keep, keep_value) = match s.keep {
        Keep::Threshold(x) => (keep::COMPACTATTN_KEEP_THRESHOLD, x),
        Keep::Mass(x) => (keep::COMPACTATTN_KEEP_MASS, x),
        Keep::Density(x) => (keep::COMPACTATTN_KEEP_DENSITY, x),
    };
    compactattn_settings {
        struct_size: struct_size::<compactattn_settings>(),
        selector: s.selector as i32,
        block_size: s.block_size as i32,
        query_span: s.scope.query_span as i32,
        heads_per_list: s.scope.heads_per_list as i32,
        keep: keep as i32,
        keep_value,
        keep_at: s.keep_at as i32,
        min_density: s.min_density,
        max_density: s.max_density,
        sink_blocks: s.sink_blocks as i32,
        local_blocks: s.local_blocks as i32,
        density_guard: s.density_guard,
        mean_correction: s.mean_correction.into(),
        dense_below_kv_len: s.dense.below_kv_len as i32,
        dense_max_q_len: s.dense.max_q_len as i32,
        dense_prefix_tokens: s.dense.prefix_tokens as i32,
        sample_rows: s.sample_rows as i32,
        flashprefill_non_voting_spans: s.flashprefill.non_voting_spans as i32,
        flashprefill_min_budget: s.flashprefill.min_budget as i32,
        flashprefill_relative_to_past: s.flashprefill.relative_to_past.into(),
        quoka_query_ratio: s.quoka_query_ratio,
        xattention_stride: s.xattention_stride as i32,
        two_level_factor: s.two_level_factor,
    }
}

fn sizes_of(plan: *const compactattn_plan) -> compactattn_sizes {
    let mut sizes = compactattn_sizes {
        struct_size: struct_size::<compactattn_sizes>(),
        workspace_alignment: 0,
        workspace_bytes: 0,
        select_rows: 0,
        max_blocks: 0,
        mask_words: 0,
        list_rows: 0,
        max_boxes: 0,
        summary_slots_per_page: 0,
        select_span: 0,
        list_span: 0,
        lists_per_span: 0,
        block_size: 0,
        box_tokens: 0,
    };
    // SAFETY: `sizes` is as long as it says.
    let status = unsafe { compactattn_plan_sizes(plan, 0, std::ptr::null(), &raw mut sizes) };
    assert_eq!(status, compactattn_status::COMPACTATTN_OK, "{}", last_error());
    sizes
}
