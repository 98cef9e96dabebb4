//! What a step takes and gives besides its batch: summaries, selections, results.

use super::check::check;
use super::objects::PlanObject;
use super::read::input;
use super::structs::compactattn_tensor;
use super::structs_step::{compactattn_selection, compactattn_summaries};
use super::tensor::{Device, Dim, View, Wanted};
use crate::batch::Batch;
use crate::error::{Error, Result, Status};
use crate::plan::Layout;
use crate::summaries::{Summaries, SummariesMut, Which};
use crate::tensor::{LseMut, TokensMut};
use crate::types::{Dtype, Shape};

/// Summaries that fit the pool, not yet read.
#[derive(Clone, Copy, Debug)]
pub(super) struct SummaryViews {
    /// Mean keys.
    pub(super) k_mean: View,
    /// Mean values.
    pub(super) v_mean: Option<View>,
    /// Seals.
    pub(super) seals: Option<View>,
}

impl SummaryViews {
    /// Checks all tensors.
    ///
    /// # Safety
    /// `from`: NULL, or readable for its `struct_size` bytes.
    pub(super) unsafe fn read(
        plan: &PlanObject,
        layout: &Layout,
        num_pages: usize,
        from: *const compactattn_summaries,
    ) -> Result<Self> {
        // SAFETY: this function's contract.
        let c = unsafe { input("summaries", from) }?;
        let wanted = |name, dtype, last| {
            let dims = vec![
                Dim::Is(num_pages, "num_pages"),
                Dim::Is(layout.geometry.summary_slots_per_page(), "summary_slots_per_page"),
                Dim::Is(layout.shape.num_kv_heads, "num_kv_heads"),
                last,
            ];
            Wanted::dense(name, dtype, dims, plan.context.device)
        };
        let vector = Dim::Is(layout.shape.head_dim, "head_dim");
        let k_mean = check(&c.k_mean, &wanted("summaries.k_mean", Dtype::F32, vector))?;
        let v_mean = wanted("summaries.v_mean", Dtype::F32, vector).optional(&c.v_mean)?;
        let words = Dim::Is(2, "words of a seal");
        let seals = wanted("summaries.seals", Dtype::U32, words).optional(&c.seals)?;
        Ok(Self { k_mean, v_mean, seals })
    }

    /// All, for overlap checks.
    pub(super) fn views(&self) -> Vec<View> {
        [self.k_mean].into_iter().chain(self.v_mean).chain(self.seals).collect()
    }

    /// What a call writes that reads these summaries: with seals all of them, without none.
    pub(super) fn refreshed(&self) -> Vec<View> {
        self.seals.map_or(Vec::new(), |_| self.views())
    }

    /// The memory to write.
    ///
    /// # Safety
    /// As [`View::slice_mut`]; the tensors lie apart.
    pub(super) unsafe fn open_mut<'a>(&self) -> SummariesMut<'a> {
        // SAFETY: this function's contract; the dtype is f32.
        let k_mean = unsafe { self.k_mean.slice_mut() };
        // SAFETY: as above.
        let v_mean = self.v_mean.map(|v_mean| unsafe { v_mean.slice_mut() });
        // SAFETY: as above; the dtype is u32.
        let seals = self.seals.map(|seals| unsafe { seals.slice_mut() });
        SummariesMut { k_mean, v_mean, seals }
    }

    /// With seals, makes anew what is of other keys than lie there, before anybody reads it.
    ///
    /// # Errors
    /// Those of [`crate::Plan::update_summaries`].
    ///
    /// # Safety
    /// As [`SummaryViews::open_mut`].
    pub(super) unsafe fn refresh(&self, plan: &PlanObject, layer: usize, batch: &Batch) -> Result<()> {
        if self.seals.is_none() {
            return Ok(());
        }
        // SAFETY: this function's contract.
        let mut out = unsafe { self.open_mut() };
        plan.plan.update_summaries(layer, batch, Which::Completed, &mut out)
    }

    /// The means to read.
    ///
    /// # Safety
    /// As [`super::batch::BatchViews::open`].
    pub(super) unsafe fn open<'a>(&self) -> Summaries<'a> {
        // SAFETY: this function's contract; the dtype is f32.
        let k_mean = unsafe { self.k_mean.slice() };
        // SAFETY: as above.
        let v_mean = self.v_mean.map(|v_mean| unsafe { v_mean.slice() });
        Summaries { k_mean, v_mean }
    }
}

/// Scores and masks; at least one of them for most uses.
#[derive(Clone, Copy, Debug)]
pub(super) struct SelectionViews {
    /// Scores.
    pub(super) scores: Option<View>,
    /// Masks.
    pub(super) masks: Option<View>,
}

impl SelectionViews {
    /// Checks both tensors; `names` are their paths.
    ///
    /// # Safety
    /// `from`: NULL, or readable for its `struct_size` bytes.
    pub(super) unsafe fn read(
        plan: &PlanObject,
        layout: &Layout,
        names: [&'static str; 3],
        from: *const compactattn_selection,
    ) -> Result<Self> {
        // SAFETY: this function's contract.
        let c = unsafe { input(names[0], from) }?;
        let device = plan.context.device;
        let heads = Dim::Is(layout.shape.num_q_heads, "num_q_heads");
        let dims = vec![Dim::Any, heads, Dim::Is(layout.max_blocks(), "max_blocks")];
        let scores = Wanted::dense(names[1], Dtype::F32, dims, device).optional(&c.scores)?;
        let dims = vec![Dim::Any, heads, Dim::Is(layout.mask_words(), "mask_words")];
        let masks = Wanted::dense(names[2], Dtype::U32, dims, device).optional(&c.masks)?;
        Ok(Self { scores, masks })
    }

    /// Both, for overlap checks.
    pub(super) fn views(&self) -> Vec<View> {
        self.scores.into_iter().chain(self.masks).collect()
    }

    /// Refuses both and neither.
    pub(super) fn check_one(&self, name: &str) -> Result<()> {
        match (self.scores, self.masks) {
            (None, None) => Err(Error::new(Status::Null, name, "scores or masks", "neither")),
            (Some(_), Some(_)) => Err(Error::new(Status::Value, name, "scores or masks", "both")),
            _ => Ok(()),
        }
    }

    /// Refuses what has fewer rows than the batch has select spans.
    pub(super) fn check_rows(&self, layout: &Layout, batch: &Batch) -> Result<()> {
        let rows = layout.select_spans(batch).len();
        self.views().iter().try_for_each(|view| check_rows(view, rows, "select spans of this batch"))
    }
}

/// The result tensors of attend, combine and forward.
#[derive(Clone, Copy, Debug)]
pub(super) struct OutputViews {
    /// `[total_q, num_q_heads, head_dim]`.
    pub(super) out: View,
    /// `[num_q_heads, total_q]`.
    pub(super) lse: Option<View>,
}

impl OutputViews {
    /// Checks both tensors.
    pub(super) fn check(
        plan: &PlanObject,
        shape: &Shape,
        total_q: usize,
        (out, lse): (&compactattn_tensor, &compactattn_tensor),
    ) -> Result<Self> {
        let device = plan.context.device;
        let tokens = Dim::Is(total_q, "total_q");
        let out = check(out, &q_like("args.out", shape, tokens, device))?;
        let dims = vec![Dim::Is(shape.num_q_heads, "num_q_heads"), tokens];
        let lse = Wanted::rows("args.lse", Dtype::F32, dims, device).optional(lse)?;
        Ok(Self { out, lse })
    }

    /// Both, for overlap checks.
    pub(super) fn views(&self) -> Vec<View> {
        [self.out].into_iter().chain(self.lse).collect()
    }

    /// The memory to write.
    ///
    /// # Safety
    /// As [`View::slice_mut`].
    pub(super) unsafe fn open<'a>(&self) -> (TokensMut<'a>, Option<LseMut<'a>>) {
        let out = TokensMut {
            // SAFETY: this function's contract; the dtype is a floating-point one.
            elements: unsafe { self.out.elements_mut() },
            stride_token: self.out.stride[0],
            stride_head: self.out.stride[1],
        };
        let lse = self.lse.map(|lse| LseMut {
            // SAFETY: this function's contract; the dtype is f32.
            elements: unsafe { lse.slice_mut() },
            stride_head: lse.stride[0],
        });
        (out, lse)
    }
}

/// q and what is shaped like it.
pub(super) fn q_like(name: &'static str, shape: &Shape, tokens: Dim, device: Device) -> Wanted {
    let dims = vec![tokens, Dim::Is(shape.num_q_heads, "num_q_heads"), Dim::Is(shape.head_dim, "head_dim")];
    Wanted::vectors(name, shape.dtype, dims, device)
}

/// Refuses a buffer with fewer rows than the step has.
pub(super) fn check_rows(view: &View, rows: usize, what: &str) -> Result<()> {
    if view.shape[0] >= rows {
        return Ok(());
    }
    let wanted = format!("at least {rows} ({what})");
    Err(Error::new(Status::Shape, format!("{}.shape[0]", view.name), wanted, view.shape[0]))
}
