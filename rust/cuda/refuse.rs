//! What a GPU is not asked to do: refused before anything is launched, with the reason.

use super::context::Context;
use super::params::TILE_TOKENS;
use super::scratch::max_items;
use super::shared::{self, GateShape};
use crate::error::{Error, Result, Status};
use crate::plan::Layout;
use crate::select::needs_summaries;
use crate::settings::Selector;
use crate::types::Dtype;

/// A GPU call may not allocate, so it cannot make summaries of its own.
///
/// # Errors
/// [`Status::Null`].
pub(crate) fn check_summaries(layout: &Layout, given: bool) -> Result<()> {
    let selector = layout.settings.selector;
    if given || !needs_summaries(selector) {
        return Ok(());
    }
    let wanted = format!("block means, for selector {} on CUDA", selector.name());
    Err(Error::new(Status::Null, "summaries", wanted, "NULL"))
}

/// Means of values, for mean correction.
///
/// # Errors
/// [`Status::Null`].
pub(crate) fn check_mean_values(layout: &Layout, given: bool) -> Result<()> {
    if given || !layout.settings.mean_correction {
        return Ok(());
    }
    Err(Error::new(Status::Null, "summaries.v_mean", "mean values, for mean_correction", "none"))
}

/// What CUDA does not offer, by name.
///
/// # Errors
/// [`Status::Unsupported`].
pub(super) fn check_layer(context: &Context, layout: &Layout, gate: Option<GateShape>) -> Result<()> {
    let settings = &layout.settings;
    if layout.limits.max_num_reqs > MAX_REQS {
        let got = layout.limits.max_num_reqs;
        return Err(Error::new(
            Status::Unsupported,
            "max_num_reqs",
            format!("at most {MAX_REQS} on CUDA"),
            got,
        ));
    }
    if settings.selector == Selector::Quoka {
        let wanted = "another selector on CUDA";
        return Err(Error::new(Status::Unsupported, "selector", wanted, settings.selector.name()));
    }
    let reads_stored_keys = matches!(settings.selector, Selector::XAttention | Selector::AttnGate);
    if layout.shape.kv_dtype == Dtype::E4m3 && reads_stored_keys {
        let wanted = "another selector on CUDA, for a cache of e4m3";
        return Err(Error::new(Status::Unsupported, "selector", wanted, settings.selector.name()));
    }
    if costs_overflow(layout) {
        let (tokens, len) = (layout.limits.max_total_q, layout.limits.max_kv_len);
        let wanted = "chunks: fewer query tokens a step over contexts so long";
        return Err(Error::new(Status::Unsupported, "max_total_q", wanted, format!("{tokens} over {len}")));
    }
    shared::check(context, layout, gate)
}

/// Whether the tiles of the largest step may pass 2^32, by which `plan_work` counts them (cuda/plan/work.cu).
fn costs_overflow(layout: &Layout) -> bool {
    let tiles = layout.limits.max_kv_len.div_ceil(TILE_TOKENS).saturating_add(1);
    let cost = tiles.saturating_mul(2).saturating_add(3);
    max_items(layout).saturating_mul(cost) > u32::MAX as usize
}

/// What `compactattn_plan_spans` can take.
const MAX_REQS: usize = 1024;
