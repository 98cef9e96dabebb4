//! The stages in order: a [`Plan`] made once, and [`forward`](Plan::forward), one layer of one step.

use crate::attend::{self, Correction, Partials};
use crate::batch::Batch;
use crate::check;
use crate::combine;
use crate::error::{Error, Result, Status};
use crate::parallel::Parallel;
use crate::plan::{Layout, Limits};
use crate::seals;
use crate::select::{self, Gate, GateLayer, Input};
use crate::settings::{Selector, Settings};
use crate::stage::{self, Stage};
use crate::stats::{LayerStats, Stats};
use crate::summaries::{self, Summaries, SummariesMut, Which};
use crate::table::{self, Table, TableMut};
use crate::tensor::{LseMut, TokensMut};
use crate::types::Shape;
use crate::union;
use crate::workspace::{self, Carver, Sizes, Workspace};

/// What a plan is made from.
#[derive(Clone, Debug)]
pub struct PlanDesc {
    /// Heads, page size, dtype.
    pub shape: Shape,
    /// The largest step.
    pub limits: Limits,
    /// One per layer; at least one.
    pub layers: Vec<Settings>,
    /// KV splits of every list, at most 64, fixed by the plan so that a request's result does not depend on its neighbours
    /// by one bit. 0 = the backend's choice: 1 on the CPU; on a GPU equal shares for all its processors, at the price of
    /// last bits that depend on the batch (1 splits nothing there).
    pub splits: usize,
    /// Learned gates, one a layer, where a layer's selector is `attn_gate`.
    pub gate: Option<Gate>,
}

/// Shapes and settings of one model on one rank: immutable, shared between threads that bring their own workspaces.
#[derive(Debug)]
pub struct Plan {
    layouts: Vec<Layout>,
    splits: usize,
    parallel: Parallel,
    gate: Option<Gate>,
    stats: Vec<LayerStats>,
    checked: bool,
}

/// The caller's own verdict for selector `external`.
#[derive(Clone, Copy, Debug)]
pub enum External<'a> {
    /// `[select spans, num_q_heads, max_blocks]`, any finite numbers, higher = keep sooner.
    Scores(&'a [f32]),
    /// `[select spans, num_q_heads, mask_words]`, one bit a KV block. They are the decision: `keep`, `keep_at` and the
    /// density floor and cap have no say; sink, local and the density guard do.
    Masks(&'a [u32]),
}

/// One layer of one step.
#[derive(Clone, Copy, Debug, Default)]
pub struct Step<'a> {
    /// The layer: picks settings and statistics.
    pub layer: usize,
    /// Block means kept by the caller; `None` = recomputed in this call, into memory of its own.
    pub summaries: Option<Summaries<'a>>,
    /// For selector `external`.
    pub external: Option<External<'a>>,
    /// Settings of this call instead of the plan's.
    pub settings: Option<Settings>,
}

/// Where results go.
#[derive(Debug)]
pub struct Output<'a> {
    /// `[total_q, num_q_heads, head_dim]`.
    pub out: TokensMut<'a>,
    /// `[num_q_heads, total_q]`, optional.
    pub lse: Option<LseMut<'a>>,
}

impl Plan {
    /// Checks everything that can be checked before a batch is seen.
    ///
    /// # Errors
    /// Those of [`Layout::new`]; [`Status::Value`] for no layers or a wrong `splits`.
    pub fn new(desc: &PlanDesc, parallel: Parallel) -> Result<Self> {
        stage::watch()?;
        if desc.layers.is_empty() {
            return Err(Error::new(Status::Value, "num_layers", "at least 1", 0));
        }
        if desc.splits > 64 {
            return Err(Error::new(Status::Value, "num_splits", "0..=64", desc.splits));
        }
        let layout = |settings: &Settings| Layout::new(desc.shape, *settings, desc.limits);
        let layouts = desc.layers.iter().map(layout).collect::<Result<Vec<_>>>()?;
        let stats = layouts.iter().map(|_| LayerStats::default()).collect();
        let plan = Self {
            layouts,
            splits: desc.splits.max(1),
            parallel,
            gate: desc.gate.clone(),
            stats,
            checked: false,
        };
        for (layer, layout) in plan.layouts.iter().enumerate() {
            plan.gate(layer, layout)?;
        }
        tracing::debug!(layers = plan.layouts.len(), threads = parallel.threads(), "plan: CPU backend");
        Ok(plan)
    }

    /// The plan in checked mode ([`crate::check`]) or, as it is made, out of it.
    #[must_use]
    pub fn checked(self, checked: bool) -> Self {
        Self { checked, ..self }
    }

    /// Whether it is in checked mode.
    #[must_use]
    pub fn is_checked(&self) -> bool {
        self.checked
    }

    /// The layer's layout.
    ///
    /// # Errors
    /// [`Status::Value`] for a layer the plan does not have.
    pub fn layout(&self, layer: usize) -> Result<&Layout> {
        let wanted = || format!("0..{}, the plan's layers", self.layouts.len());
        self.layouts.get(layer).ok_or_else(|| Error::new(Status::Value, "layer", wanted(), layer))
    }

    /// The layouts of all layers.
    #[must_use]
    pub fn layouts(&self) -> &[Layout] {
        &self.layouts
    }

    /// Layers planned for.
    #[must_use]
    pub fn num_layers(&self) -> usize {
        self.layouts.len()
    }

    /// KV splits of every list.
    #[must_use]
    pub fn splits(&self) -> usize {
        self.splits
    }

    /// Threads the plan's calls use.
    #[must_use]
    pub fn parallel(&self) -> Parallel {
        self.parallel
    }

    /// The layer's gate where its selector needs one.
    ///
    /// # Errors
    /// [`Status::Null`] without one, [`Status::Shape`] for a gate of another model.
    pub fn gate(&self, layer: usize, layout: &Layout) -> Result<Option<&GateLayer>> {
        if !select::needs_gate(layout.settings.selector) {
            return Ok(None);
        }
        let missing = || Error::new(Status::Null, "gate", "the layer's gate, for selector attn_gate", "none");
        let gate = self.gate.as_ref().and_then(|gate| gate.layer(layer)).ok_or_else(missing)?;
        gate.check(&layout.shape)?;
        Ok(Some(gate))
    }

    /// What the largest step of any layer needs.
    ///
    /// # Errors
    /// [`Status::Overflow`].
    pub fn workspace_bytes(&self) -> Result<usize> {
        let each = self
            .layouts
            .iter()
            .map(|layout| Sizes::of(layout, self.splits).map(|sizes| sizes.workspace_bytes));
        each.collect::<Result<Vec<_>>>().map(|bytes| bytes.into_iter().max().unwrap_or(0))
    }

    /// Owned memory for the largest step of any layer.
    ///
    /// # Errors
    /// [`Status::Overflow`] or [`Status::OutOfMemory`].
    pub fn workspace(&self) -> Result<Workspace> {
        self.workspace_bytes().and_then(Workspace::new)
    }

    /// What the layer has selected so far.
    ///
    /// # Errors
    /// [`Status::Value`] for a layer the plan does not have.
    pub fn stats(&self, layer: usize) -> Result<Stats> {
        self.layout(layer)?;
        Ok(self.stats[layer].read())
    }

    /// Summaries of the blocks that this step's tokens complete (or of all), and with seals of all that are of other
    /// keys: call it after the step's KV is written and before [`Plan::forward`] reads them.
    ///
    /// # Errors
    /// [`Status::Value`] for an unknown layer or a batch beyond the limits, [`Status::Shape`] for short buffers.
    pub fn update_summaries(
        &self,
        layer: usize,
        batch: &Batch,
        which: Which,
        out: &mut SummariesMut,
    ) -> Result<()> {
        let layout = self.admit(layer, batch)?;
        let needed = summaries::len(layout, batch.k().num_pages);
        check_len("summaries.k_mean", out.k_mean.len(), needed)?;
        if let Some(v_mean) = &out.v_mean {
            check_len("summaries.v_mean", v_mean.len(), needed)?;
        }
        if let Some(seals) = &out.seals {
            check_len("summaries.seals", seals.len(), seals::len(layout, batch.k().num_pages))?;
        }
        Stage::Summaries.run(|| summaries::update(layout, batch, which, out, self.parallel));
        Ok(())
    }

    /// The layer's layout, for a batch of the plan's shape and within its limits.
    ///
    /// # Errors
    /// [`Status::Shape`] or those of [`Layout::admit`].
    pub fn admit(&self, layer: usize, batch: &Batch) -> Result<&Layout> {
        let layout = self.layout(layer)?;
        if *batch.shape() != layout.shape {
            return Err(Error::new(Status::Shape, "batch", "the shape the plan was made for", "another"));
        }
        layout.admit(batch)?;
        Ok(layout)
    }

    /// select → union → table → attend → combine for one layer; writes `output`, counts into the layer's statistics.
    ///
    /// `workspace` needs [`Plan::workspace_bytes`] (or, under `step.settings`, what [`Sizes::of`] says), aligned to
    /// [`Sizes::ALIGNMENT`]; its contents before and after mean nothing.
    ///
    /// # Errors
    /// [`Status::Value`], [`Status::Shape`], [`Status::Null`], [`Status::Workspace`], or [`Status::OutOfMemory`] where a
    /// step without summaries needs its own; then nothing was written.
    pub fn forward(
        &self,
        batch: &Batch,
        step: &Step,
        output: &mut Output,
        workspace: &mut [u8],
    ) -> Result<()> {
        let layout = self.check_step(batch, step)?;
        check_output(batch, output)?;
        let gate = self.gate(step.layer, &layout)?;
        if let Some(given) = step.summaries {
            check_summaries(&layout, batch, given)?;
        }
        let mut buffers = Buffers::carve(&layout, self.splits, workspace)?;
        if batch.total_q() == 0 {
            return Ok(());
        }
        let mut own = OwnSummaries::default();
        let summaries = own.or_given(&layout, batch, step.summaries, self.parallel)?;
        let input = Input { layout: &layout, batch, summaries, gate };
        let mut counts = select_lists(&input, step.external, &mut buffers, self.parallel);
        let Buffers { lists, counts: boxes, stream_lens, boxes: ids, .. } = &mut buffers;
        let mut table = TableMut { counts: boxes, stream_lens, boxes: ids };
        Stage::Table.run(|| table::build(&layout, batch, lists, &mut table));
        if self.checked {
            counts.refused += check::lists(&layout, batch, lists, &mut table);
        }
        self.stats[step.layer].add(&counts);
        self.attend_lists(&input, &mut buffers, output)
    }

    /// The layout of one call, whose batch and external verdict it has checked.
    pub(crate) fn check_step(&self, batch: &Batch, step: &Step) -> Result<Layout> {
        let layout = self.layout_of(step, batch)?;
        check_external(&layout, batch, step)?;
        Ok(layout)
    }

    /// The layout of one call: the layer's, or that of the call's own settings.
    fn layout_of(&self, step: &Step, batch: &Batch) -> Result<Layout> {
        let planned = self.admit(step.layer, batch)?;
        let Some(settings) = step.settings else { return Ok(*planned) };
        let layout = Layout::new(*batch.shape(), settings, planned.limits)?;
        layout.admit(batch)?;
        check_summary_blocks(&planned.settings, &settings, step.summaries.is_some())?;
        Ok(layout)
    }

    /// attend → combine over the table of `buffers.lists`.
    fn attend_lists(&self, input: &Input, buffers: &mut Buffers, output: &mut Output) -> Result<()> {
        let Input { layout, batch, summaries, .. } = *input;
        let Buffers { lists, counts, stream_lens, boxes, .. } = buffers;
        let table = Table { counts, stream_lens, boxes };
        let corrected = summaries.filter(|_| layout.settings.mean_correction);
        let correction = corrected.map(|summaries| Correction::new(lists, summaries)).transpose()?;
        let rows = batch.total_q() * layout.shape.num_q_heads;
        let mut partials = Partials {
            splits: self.splits,
            out: &mut buffers.partial_out[..self.splits * rows * layout.shape.head_dim],
            lse: &mut buffers.partial_lse[..self.splits * rows],
        };
        Stage::Attend.run(|| {
            attend::attend(layout, batch, &table, correction.as_ref(), &mut partials, self.parallel);
        });
        Stage::Combine.run(|| {
            combine::combine(layout, batch, &partials, &mut output.out, output.lse.as_mut(), self.parallel);
        });
        Ok(())
    }
}

/// select → union.
fn select_lists(
    input: &Input,
    external: Option<External>,
    buffers: &mut Buffers,
    parallel: Parallel,
) -> union::Counts {
    let Input { layout, batch, .. } = *input;
    let Buffers { scores, masks, lists, .. } = buffers;
    let external = external.filter(|_| layout.settings.selector == Selector::External);
    match external {
        Some(External::Masks(masks)) => Stage::Union.run(|| union::of_masks(layout, batch, masks, lists)),
        Some(External::Scores(scores)) => {
            Stage::Union.run(|| union::unite(layout, batch, scores, masks, lists))
        }
        None => {
            Stage::Select.run(|| select::score(input, scores, parallel));
            Stage::Union.run(|| union::unite(layout, batch, scores, masks, lists))
        }
    }
}

/// Summaries made for one call.
#[derive(Default)]
struct OwnSummaries {
    k_mean: Box<[f32]>,
    v_mean: Box<[f32]>,
}

impl OwnSummaries {
    /// The caller's summaries, or, where the layer needs some and none came, the batch's own.
    fn or_given<'a>(
        &'a mut self,
        layout: &Layout,
        batch: &Batch,
        given: Option<Summaries<'a>>,
        parallel: Parallel,
    ) -> Result<Option<Summaries<'a>>> {
        if given.is_some() || !reads_summaries(&layout.settings) {
            return Ok(given);
        }
        // As long as the pool's, and of that only the blocks that are written take memory.
        let len = summaries::len(layout, batch.k().num_pages);
        self.k_mean = workspace::zeros("summaries.k_mean", len)?;
        if layout.settings.mean_correction {
            self.v_mean = workspace::zeros("summaries.v_mean", len)?;
        }
        let v_mean = layout.settings.mean_correction.then_some(&mut self.v_mean[..]);
        let mut out = SummariesMut { k_mean: &mut self.k_mean, v_mean, seals: None };
        Stage::Summaries.run(|| summaries::update(layout, batch, Which::All, &mut out, parallel));
        let v_mean = layout.settings.mean_correction.then_some(&self.v_mean[..]);
        Ok(Some(Summaries { k_mean: &self.k_mean, v_mean }))
    }
}

/// The stage buffers of one call, in the caller's workspace.
struct Buffers<'a> {
    scores: &'a mut [f32],
    masks: &'a mut [u32],
    lists: &'a mut [u32],
    counts: &'a mut [i32],
    stream_lens: &'a mut [i32],
    boxes: &'a mut [i32],
    partial_out: &'a mut [f32],
    partial_lse: &'a mut [f32],
}

impl<'a> Buffers<'a> {
    fn carve(layout: &Layout, splits: usize, workspace: &'a mut [u8]) -> Result<Self> {
        let sizes = Sizes::of(layout, splits)?;
        let mut carver = Carver::new(workspace, sizes.workspace_bytes)?;
        Ok(Self {
            scores: carver.take(sizes.scores)?,
            masks: carver.take(sizes.masks)?,
            lists: carver.take(sizes.lists)?,
            counts: carver.take(sizes.rows)?,
            stream_lens: carver.take(sizes.rows)?,
            boxes: carver.take(sizes.boxes)?,
            partial_out: carver.take(sizes.partial_out)?,
            partial_lse: carver.take(sizes.partial_lse)?,
        })
    }
}

/// Whether a step under `settings` reads block means.
pub(crate) fn reads_summaries(settings: &Settings) -> bool {
    select::needs_summaries(settings.selector) || settings.mean_correction
}

fn check_len(name: &str, len: usize, needed: usize) -> Result<()> {
    if len >= needed {
        Ok(())
    } else {
        Err(Error::new(Status::Shape, name, format!("{needed} elements"), len))
    }
}

fn check_summaries(layout: &Layout, batch: &Batch, given: Summaries) -> Result<()> {
    let needed = summaries::len(layout, batch.k().num_pages);
    check_len("summaries.k_mean", given.k_mean.len(), needed)?;
    match given.v_mean {
        Some(v_mean) => check_len("summaries.v_mean", v_mean.len(), needed),
        None if layout.settings.mean_correction => {
            Err(Error::new(Status::Null, "summaries.v_mean", "mean values, for mean_correction", "none"))
        }
        None => Ok(()),
    }
}

/// Summaries are of the plan's blocks, whatever a call asks for.
pub(crate) fn check_summary_blocks(planned: &Settings, asked: &Settings, given: bool) -> Result<()> {
    let (block_size, asked_size) = (planned.block_size, asked.block_size);
    if given && reads_summaries(asked) && asked_size != block_size {
        let wanted = format!("{block_size}, the plan's, whose blocks the summaries are of");
        return Err(Error::new(Status::Value, "settings.block_size", wanted, asked_size));
    }
    Ok(())
}

fn check_external(layout: &Layout, batch: &Batch, step: &Step) -> Result<()> {
    let rows = layout.select_spans(batch).len() * layout.shape.num_q_heads;
    match step.external {
        _ if layout.settings.selector != Selector::External => Ok(()),
        None => Err(Error::new(Status::Null, "external", "scores or masks, for selector external", "none")),
        Some(External::Scores(x)) => check_len("external.scores", x.len(), rows * layout.max_blocks()),
        Some(External::Masks(x)) => check_len("external.masks", x.len(), rows * layout.mask_words()),
    }
}

/// Refuses strides that make vectors of `len` elements overlap: the outer dimension must step over the whole inner one.
fn check_apart(name: &str, dims: [(usize, usize); 2], len: usize) -> Result<()> {
    let [inner, outer] = if dims[0].1 < dims[1].1 { dims } else { [dims[1], dims[0]] };
    let mut needed = len;
    for (count, stride) in [inner, outer].into_iter().filter(|&(count, _)| count > 1) {
        if stride < needed {
            return Err(Error::new(Status::Stride, name, format!("a stride >= {needed}"), stride));
        }
        needed = crate::batch::extent(name, &[(count, stride)], needed)?;
    }
    Ok(())
}

fn check_output(batch: &Batch, output: &Output) -> Result<()> {
    let shape = batch.shape();
    let out = &output.out;
    if out.elements.dtype() != shape.dtype {
        return Err(Error::new(Status::Dtype, "out", shape.dtype.name(), out.elements.dtype().name()));
    }
    let dims = [(batch.total_q(), out.stride_token), (shape.num_q_heads, out.stride_head)];
    check_apart("out", dims, shape.head_dim)?;
    check_len("out", out.elements.len(), crate::batch::extent("out", &dims, shape.head_dim)?)?;
    if let Some(lse) = &output.lse {
        if shape.num_q_heads > 1 && lse.stride_head < batch.total_q() {
            let wanted = format!(">= total_q ({})", batch.total_q());
            return Err(Error::new(Status::Stride, "lse head stride", wanted, lse.stride_head));
        }
        let dims = [(shape.num_q_heads, lse.stride_head)];
        check_len("lse", lse.elements.len(), crate::batch::extent("lse", &dims, batch.total_q())?)?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "run_smoke.rs"]
mod smoke;
#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
