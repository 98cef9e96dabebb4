//! What a GPU is not asked to do: refused before anything is launched, with the reason.

use super::context::Context;
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
    shared::check(context, layout, gate)
}

/// What `compactattn_plan_spans` can take.
const MAX_REQS: usize = 1024;
