//! Exported: attention itself, from a table (attend) and as the whole pass (forward).

use std::ffi::c_void;

use super::api_stages::read_lists;
use super::batch::BatchViews;
use super::compactattn_status;
use super::device::{self, Place};
use super::guard::guard;
use super::handle;
use super::objects::PlanObject;
use super::read::{input, optional};
use super::settings;
use super::structs::compactattn_plan;
use super::structs_step::{compactattn_attend_args, compactattn_forward_args};
use super::table::{Rows, list_rows};
use super::tensor::{View, check_apart, workspace};
use super::views::{OutputViews, SelectionViews, SummaryViews, check_rows};
use crate::attend::{self, Correction, Partials};
use crate::batch::Batch;
use crate::combine;
use crate::cuda::check_mean_values;
use crate::error::{Error, Result, Status};
use crate::plan::Layout;
use crate::run::{External, Output, Step, check_summary_blocks, reads_summaries};
use crate::settings::{Selector, Settings};
use crate::stage::Stage;
use crate::workspace::{Carver, Sizes};

/// Attends every query of the batch to the boxes its list names, and combines: the last stages of a step.
///
/// # Safety
/// args: NULL, or readable for its struct_size bytes, with pointers and tensors as its fields say; nobody else writes
/// to those, or reads the outputs or the workspace, during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn compactattn_attend(
    plan: *const compactattn_plan,
    args: *const compactattn_attend_args,
) -> compactattn_status {
    guard(|| {
        handle::plan(plan.cast())?.run(|plan| {
            // SAFETY: this function's contract.
            let args = unsafe { input("args", args) }?;
            // SAFETY: this function's contract.
            unsafe { attend_args(plan, &args) }
        })
    })
}

/// One layer of one step: select, union, table, attend, combine; counts into the layer's statistics.
///
/// No requests, or no queries: COMPACTATTN_OK, and nothing is written. On any other status nothing was written
/// either. Threads may call it on one plan at once, each with a workspace of its own.
///
/// # Safety
/// As compactattn_attend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn compactattn_forward(
    plan: *const compactattn_plan,
    args: *const compactattn_forward_args,
) -> compactattn_status {
    guard(|| {
        handle::plan(plan.cast())?.run(|plan| {
            // SAFETY: this function's contract.
            let args = unsafe { input("args", args) }?;
            // SAFETY: this function's contract.
            unsafe { forward_args(plan, &args) }
        })
    })
}

/// # Safety
/// As [`compactattn_forward`], for what `args` points to.
unsafe fn forward_args(plan: &PlanObject, args: &compactattn_forward_args) -> Result<()> {
    plan.check_stream(args.stream)?;
    let planned = plan.layout(args.layer)?;
    // SAFETY: this function's contract.
    let own = unsafe { optional("args.settings", args.settings) }?;
    let own = own.map(|own| settings::from_c(&own)).transpose()?;
    let layout = own.map_or(Ok(*planned), |own| Layout::new(planned.shape, own, planned.limits))?;
    // SAFETY: this function's contract.
    let step = unsafe { StepViews::read(plan, &layout, args) }?;
    step.check_complete(&planned.settings, &layout)?;
    let results = OutputViews::check(plan, &layout.shape, step.batch.total_q, (&args.out, &args.lse))?;
    let scratch = if step.batch.is_empty() {
        None
    } else {
        Some(scratch(plan, (args.layer, &layout), args.workspace, args.workspace_bytes)?)
    };
    let outputs: Vec<View> = results.views().into_iter().chain(scratch.map(|scratch| scratch.view)).collect();
    check_apart(&outputs, &step.views())?;
    check_apart(&step.refreshed(&layout), &step.batch.tensors())?;
    if let Some(cuda) = &plan.cuda {
        let place = Place { layer: plan.layer(args.layer)?, layout: &layout, stream: args.stream, scratch };
        return device::forward(cuda, &place, &step, &results);
    }
    // SAFETY: this function's contract; outputs lie apart from it.
    let batch = unsafe { step.batch.open(plan, args.layer) }?;
    if let Some(external) = step.external {
        external.check_rows(&layout, &batch)?;
    }
    let Some(scratch) = scratch else { return Ok(()) };
    if let Some(summaries) = step.summaries.filter(|_| reads_summaries(&layout.settings)) {
        // SAFETY: as above; the summaries lie apart from the batch.
        unsafe { summaries.refresh(plan, plan.layer(args.layer)?, &batch) }?;
    }
    // SAFETY: as above.
    let (summaries, external) = unsafe { step.open() };
    let step = Step { layer: plan.layer(args.layer)?, summaries, external, settings: own };
    // SAFETY: this function's contract; outputs lie apart from each other and from inputs.
    let (out, lse) = unsafe { results.open() };
    // SAFETY: as above; `scratch` has checked pointer and length.
    let workspace = unsafe { workspace(scratch.data, scratch.bytes) };
    plan.plan.forward(&batch, &step, &mut Output { out, lse }, workspace)
}

/// What forward reads.
pub(super) struct StepViews {
    /// The step.
    pub(super) batch: BatchViews,
    /// Block means of the caller's.
    pub(super) summaries: Option<SummaryViews>,
    /// For selector external.
    pub(super) external: Option<SelectionViews>,
}

impl StepViews {
    /// # Safety
    /// As [`forward_args`].
    unsafe fn read(plan: &PlanObject, layout: &Layout, args: &compactattn_forward_args) -> Result<Self> {
        // SAFETY: this function's contract.
        let batch = unsafe { BatchViews::read(plan, layout, args.batch) }?;
        let summaries = match args.summaries.is_null() {
            true => None,
            // SAFETY: this function's contract.
            false => Some(unsafe { SummaryViews::read(plan, layout, batch.num_pages, args.summaries) }?),
        };
        let names = ["external", "external.scores", "external.masks"];
        let external = match args.external.is_null() {
            true => None,
            // SAFETY: this function's contract.
            false => Some(unsafe { SelectionViews::read(plan, layout, names, args.external) }?),
        };
        external.iter().try_for_each(|external| external.check_one("external"))?;
        Ok(Self { batch, summaries, external })
    }

    fn views(&self) -> Vec<View> {
        let summaries = self.summaries.map_or(Vec::new(), |summaries| summaries.views());
        let external = self.external.map_or(Vec::new(), |external| external.views());
        [&self.batch.tensors()[..], &summaries, &external].concat()
    }

    /// What the layer wants is there and of its blocks: known before summaries are made anew.
    fn check_complete(&self, planned: &Settings, layout: &Layout) -> Result<()> {
        let settings = &layout.settings;
        if self.batch.is_empty() {
            return Ok(());
        }
        check_summary_blocks(planned, settings, self.summaries.is_some())?;
        if let Some(summaries) = self.summaries {
            check_mean_values(layout, summaries.v_mean.is_some())?;
        }
        if settings.selector == Selector::External && self.external.is_none() {
            let wanted = "scores or masks, for selector external";
            return Err(Error::new(Status::Null, "external", wanted, "none"));
        }
        Ok(())
    }

    /// What this call writes of its summaries.
    fn refreshed(&self, layout: &Layout) -> Vec<View> {
        let own = self.summaries.filter(|_| reads_summaries(&layout.settings));
        own.map_or(Vec::new(), |summaries| summaries.refreshed())
    }

    /// # Safety
    /// As [`BatchViews::open`].
    unsafe fn open<'a>(&self) -> (Option<crate::summaries::Summaries<'a>>, Option<External<'a>>) {
        // SAFETY: this function's contract.
        let summaries = self.summaries.map(|summaries| unsafe { summaries.open() });
        let external = self.external.and_then(|external| match (external.scores, external.masks) {
            // SAFETY: this function's contract; the dtype is f32.
            (Some(scores), _) => Some(External::Scores(unsafe { scores.slice() })),
            // SAFETY: this function's contract; the dtype is u32.
            (_, Some(masks)) => Some(External::Masks(unsafe { masks.slice() })),
            _ => None,
        });
        (summaries, external)
    }
}

/// # Safety
/// As [`compactattn_attend`], for what `args` points to.
unsafe fn attend_args(plan: &PlanObject, args: &compactattn_attend_args) -> Result<()> {
    plan.check_stream(args.stream)?;
    let layout = plan.layout(args.layer)?;
    // SAFETY: this function's contract.
    let views = unsafe { BatchViews::read(plan, layout, args.batch) }?;
    // SAFETY: this function's contract.
    let table = unsafe { Rows::table(plan, layout, args.table) }?;
    // SAFETY: this function's contract.
    let correction = unsafe { CorrectionViews::read(plan, layout, views.num_pages, args) }?;
    let results = OutputViews::check(plan, &layout.shape, views.total_q, (&args.out, &args.lse))?;
    let scratch = if views.is_empty() {
        None
    } else {
        Some(scratch(plan, (args.layer, layout), args.workspace, args.workspace_bytes)?)
    };
    let outputs: Vec<View> = results.views().into_iter().chain(scratch.map(|scratch| scratch.view)).collect();
    let read = correction.as_ref().map_or(Vec::new(), CorrectionViews::views);
    check_apart(&outputs, &[&views.tensors()[..], &table.views, &read].concat())?;
    if let Some(cuda) = &plan.cuda {
        let place = Place { layer: plan.layer(args.layer)?, layout, stream: args.stream, scratch };
        let corrected = correction.map(|correction| (correction.lists, correction.summaries));
        return device::attend(cuda, &place, &views, (&table, corrected), &results);
    }
    // SAFETY: this function's contract; outputs lie apart from it.
    let batch = unsafe { views.open(plan, args.layer) }?;
    // SAFETY: as above.
    let table = unsafe { table.open(layout, &batch) }?;
    // SAFETY: as above.
    let correction = correction.map(|correction| unsafe { correction.open(layout, &batch) }).transpose()?;
    let Some(scratch) = scratch else { return Ok(()) };
    // SAFETY: as above; `scratch` has checked pointer and length.
    let mut partials = partials(plan, layout, &batch, unsafe { workspace(scratch.data, scratch.bytes) })?;
    let parallel = plan.context.parallel;
    Stage::Attend.run(|| {
        attend::attend(layout, &batch, &table, correction.as_ref(), &mut partials, parallel);
    });
    // SAFETY: this function's contract; outputs lie apart from each other and from inputs.
    let (mut out, mut lse) = unsafe { results.open() };
    Stage::Combine.run(|| combine::combine(layout, &batch, &partials, &mut out, lse.as_mut(), parallel));
    Ok(())
}

/// What mean correction reads.
struct CorrectionViews {
    lists: View,
    summaries: SummaryViews,
}

impl CorrectionViews {
    /// # Safety
    /// As [`attend_args`].
    unsafe fn read(
        plan: &PlanObject,
        layout: &Layout,
        num_pages: usize,
        args: &compactattn_attend_args,
    ) -> Result<Option<Self>> {
        if args.lists.is_null() && args.summaries.is_null() {
            return Ok(None);
        }
        // SAFETY: this function's contract.
        let lists = unsafe { read_lists(plan, layout, args.lists) }?;
        // SAFETY: this function's contract.
        let summaries = unsafe { SummaryViews::read(plan, layout, num_pages, args.summaries) }?;
        if summaries.v_mean.is_none() {
            let wanted = "mean values, for mean correction";
            return Err(Error::new(Status::Null, "summaries.v_mean", wanted, "none"));
        }
        Ok(Some(Self { lists, summaries }))
    }

    fn views(&self) -> Vec<View> {
        [self.lists].into_iter().chain(self.summaries.views()).collect()
    }

    /// # Safety
    /// As [`BatchViews::open`].
    unsafe fn open<'a>(&self, layout: &Layout, batch: &Batch) -> Result<Correction<'a>> {
        check_rows(&self.lists, list_rows(layout, batch), "list rows of this batch")?;
        // SAFETY: this function's contract; the dtype is u32.
        let lists = unsafe { self.lists.slice() };
        // SAFETY: this function's contract.
        Correction::new(lists, unsafe { self.summaries.open() })
    }
}

/// A checked workspace, not yet touched.
#[derive(Clone, Copy)]
pub(super) struct Scratch {
    /// Where it starts.
    pub(super) data: *mut u8,
    bytes: usize,
    /// All of it, for overlap checks.
    pub(super) view: View,
}

/// A caller's workspace, if it will do.
pub(super) fn scratch(
    plan: &PlanObject,
    (layer, layout): (i32, &Layout),
    data: *mut c_void,
    bytes: i64,
) -> Result<Scratch> {
    let needed = plan.workspace_bytes(plan.layer(layer)?, layout)?;
    let refuse = |got: String| {
        let wanted = format!("{needed} bytes aligned to {}", Sizes::ALIGNMENT);
        Err(Error::new(Status::Workspace, "args.workspace", wanted, got))
    };
    if data.is_null() {
        return refuse("NULL".into());
    }
    if !data.addr().is_multiple_of(Sizes::ALIGNMENT) {
        return refuse("a misaligned address".into());
    }
    match usize::try_from(bytes) {
        // What lies beyond the need is never touched, so its length does not matter.
        Ok(given) if given >= needed => {
            let view = View::of_bytes("args.workspace", data.cast(), needed);
            Ok(Scratch { data: data.cast(), bytes: needed, view })
        }
        _ => refuse(format!("{bytes} bytes")),
    }
}

/// The attend stage's part of a workspace, cut to this batch.
fn partials<'a>(
    plan: &PlanObject,
    layout: &Layout,
    batch: &Batch,
    workspace: &'a mut [u8],
) -> Result<Partials<'a>> {
    let splits = plan.plan.splits();
    let sizes = Sizes::of(layout, splits)?;
    let mut carver = Carver::new(workspace, sizes.workspace_bytes)?;
    let (out, lse) = (carver.take(sizes.partial_out)?, carver.take(sizes.partial_lse)?);
    let rows = splits * batch.total_q() * layout.shape.num_q_heads;
    Ok(Partials { splits, out: &mut out[..rows * layout.shape.head_dim], lse: &mut lse[..rows] })
}
