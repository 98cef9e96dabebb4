//! Exported: plans, what they support, how much memory they need, what they have done.

use std::ffi::c_char;
use std::sync::Arc;

use super::compactattn_status;
use super::guard::{copy_out, guard, last_error};
use super::handle::{self, Object};
use super::objects::{Context, PlanObject};
use super::read::{check_pointer, input, optional, output, room};
use super::settings;
use super::structs::{compactattn_context, compactattn_plan, compactattn_plan_desc, compactattn_settings};
use super::structs_step::{compactattn_sizes, compactattn_stats};
use crate::error::{Error, Result, Status};
use crate::plan::Layout;
use crate::stats::Stats;
use crate::summaries;
use crate::workspace::Sizes;

/// Makes a plan: checks shapes and settings once for all steps. out_plan is set only on COMPACTATTN_OK.
///
/// # Safety
/// desc: NULL, or readable for its struct_size bytes, with pointers as its fields say. out_plan: NULL, or writable.
/// NULL is refused, not followed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn compactattn_plan_create(
    context: *const compactattn_context,
    desc: *const compactattn_plan_desc,
    out_plan: *mut *mut compactattn_plan,
) -> compactattn_status {
    guard(|| {
        let context = handle::context(context.cast())?;
        check_pointer("out_plan", out_plan)?;
        // SAFETY: this function's contract.
        let plan = unsafe { make(context, desc) }?;
        let plan = handle::insert(Object::Plan(Arc::new(plan)))?;
        // SAFETY: not NULL, aligned, writable by this function's contract.
        unsafe { out_plan.write(plan.cast()) };
        Ok(())
    })
}

/// Destroys a plan; calls that are running on it end as if it were alive. NULL is fine. COMPACTATTN_E_HANDLE for one
/// that is not alive. On CUDA a graph captured with the plan must not be replayed after, and no stream of the process
/// may be capturing in global mode meanwhile, nor while contexts and plans are made: the driver forbids both.
#[unsafe(no_mangle)]
pub extern "C" fn compactattn_plan_destroy(plan: *mut compactattn_plan) -> compactattn_status {
    guard(|| if plan.is_null() { Ok(()) } else { handle::remove_plan(plan.cast()) })
}

/// The status compactattn_plan_create would end in, with the reason in words (empty on COMPACTATTN_OK), so that an
/// engine can fall back before anything runs.
///
/// reason is cut to cap bytes and ended by NUL; NULL is fine.
///
/// # Safety
/// desc as for compactattn_plan_create. reason: NULL, or writable for cap bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn compactattn_supports(
    context: *const compactattn_context,
    desc: *const compactattn_plan_desc,
    reason: *mut c_char,
    cap: usize,
) -> compactattn_status {
    let status = guard(|| {
        let context = handle::context(context.cast())?;
        // SAFETY: this function's contract.
        unsafe { make(context, desc) }.map(drop)
    });
    let text = if status == compactattn_status::COMPACTATTN_OK { String::new() } else { last_error() };
    // SAFETY: this function's contract.
    unsafe { copy_out(&text, reason, cap) };
    status
}

/// How large the buffers of one layer are, under the plan's settings or (settings not NULL) those of a single call.
///
/// Set out->struct_size before the call. Sizes grow with each limit of the plan, so asking once is enough.
///
/// # Safety
/// settings: NULL, or readable for its struct_size bytes. out: NULL, or readable and writable for its own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn compactattn_plan_sizes(
    plan: *const compactattn_plan,
    layer: i32,
    settings: *const compactattn_settings,
    out: *mut compactattn_sizes,
) -> compactattn_status {
    guard(|| {
        let plan = handle::plan(plan.cast())?;
        // SAFETY: this function's contract.
        let settings = unsafe { optional("settings", settings) }?;
        // SAFETY: this function's contract.
        let room = unsafe { room("out", out) }?;
        let sizes = sizes(&plan, layer, settings.as_ref())?;
        // SAFETY: this function's contract; `room` comes from it.
        unsafe { output(out, room, &sizes) };
        Ok(())
    })
}

/// Bytes of k_mean (and as many of v_mean) that one layer's summaries need for a pool of num_pages.
///
/// # Safety
/// out_bytes: NULL, or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn compactattn_summary_bytes(
    plan: *const compactattn_plan,
    layer: i32,
    num_pages: i64,
    out_bytes: *mut i64,
) -> compactattn_status {
    guard(|| {
        let plan = handle::plan(plan.cast())?;
        check_pointer("out_bytes", out_bytes)?;
        let bytes = summary_bytes(plan.layout(layer)?, num_pages)?;
        // SAFETY: not NULL, aligned, writable by this function's contract.
        unsafe { out_bytes.write(bytes) };
        Ok(())
    })
}

/// What one layer (-1 = all layers together) has selected since the plan was made.
///
/// Set out->struct_size before the call. Calls on other threads may be half counted.
///
/// # Safety
/// out: NULL, or readable and writable for its struct_size bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn compactattn_plan_stats(
    plan: *const compactattn_plan,
    layer: i32,
    out: *mut compactattn_stats,
) -> compactattn_status {
    guard(|| {
        let plan = handle::plan(plan.cast())?;
        // SAFETY: this function's contract.
        let room = unsafe { room("out", out) }?;
        let layers = match layer {
            -1 => 0..plan.plan.num_layers(),
            _ => plan.layer(layer).map(|layer| layer..layer + 1)?,
        };
        let each = layers.map(|layer| plan.stats(layer)).collect::<Result<Vec<_>>>()?;
        // SAFETY: this function's contract; `room` comes from it.
        unsafe { output(out, room, &stats(&each)) };
        Ok(())
    })
}

/// # Safety
/// As `compactattn_plan_create`.
unsafe fn make(context: Arc<Context>, desc: *const compactattn_plan_desc) -> Result<PlanObject> {
    // SAFETY: this function's contract.
    let desc = unsafe { input("desc", desc) }?;
    // SAFETY: this function's contract.
    let desc = unsafe { settings::plan_desc(&desc) }?;
    let plan = PlanObject::new(context, &desc)?;
    to_i64(plan.most_workspace_bytes()?)?;
    Ok(plan)
}

fn sizes(plan: &PlanObject, layer: i32, own: Option<&compactattn_settings>) -> Result<compactattn_sizes> {
    let planned = plan.layout(layer)?;
    let (layout, bytes) = match own {
        None => (*planned, plan.most_workspace_bytes()?),
        Some(own) => {
            let layout = Layout::new(planned.shape, settings::from_c(own)?, planned.limits)?;
            (layout, plan.workspace_bytes(plan.layer(layer)?, &layout)?)
        }
    };
    Ok(compactattn_sizes {
        struct_size: 0,
        workspace_alignment: ALIGNMENT,
        workspace_bytes: to_i64(bytes)?,
        select_rows: to_i64(layout.max_select_spans())?,
        max_blocks: to_i64(layout.max_blocks())?,
        mask_words: to_i64(layout.mask_words())?,
        list_rows: to_i64(layout.max_list_rows())?,
        max_boxes: to_i64(layout.max_boxes())?,
        summary_slots_per_page: to_i64(layout.geometry.summary_slots_per_page())?,
        select_span: to_i64(layout.select_span())?,
        list_span: to_i64(layout.settings.scope.query_span)?,
        lists_per_span: to_i64(layout.lists_per_span())?,
        block_size: to_i64(layout.geometry.block_size)?,
        box_tokens: to_i64(layout.geometry.box_tokens())?,
    })
}

fn summary_bytes(layout: &Layout, num_pages: i64) -> Result<i64> {
    let pages = usize::try_from(num_pages)
        .map_err(|_| Error::new(Status::Shape, "num_pages", "at least 0", num_pages))?;
    let bytes = pages.checked_mul(summaries::len(layout, 1) * size_of::<f32>());
    bytes.and_then(|bytes| i64::try_from(bytes).ok()).ok_or_else(|| {
        Error::new(Status::Overflow, "num_pages", "a summary buffer within 63 bits", num_pages)
    })
}

fn stats(each: &[Stats]) -> compactattn_stats {
    let sum = |of: fn(&Stats) -> u64| {
        i64::try_from(each.iter().fold(0_u64, |sum, stats| sum.saturating_add(of(stats)))).unwrap_or(i64::MAX)
    };
    compactattn_stats {
        struct_size: 0,
        reserved: 0,
        calls: sum(|s| s.calls),
        lists: sum(|s| s.counts.lists),
        candidates: sum(|s| s.counts.candidates),
        selected: sum(|s| s.counts.selected),
        forced: sum(|s| s.counts.forced),
        guarded: sum(|s| s.counts.guarded),
        dense: sum(|s| s.counts.dense),
        refused: sum(|s| s.counts.refused),
    }
}

fn to_i64(x: usize) -> Result<i64> {
    i64::try_from(x).map_err(|_| Error::new(Status::Overflow, "limits", "sizes within 63 bits", "more"))
}

#[expect(clippy::cast_possible_truncation, reason = "a small constant")]
const ALIGNMENT: u32 = Sizes::ALIGNMENT as u32;
