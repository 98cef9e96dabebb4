//! The library's stages over one prepared layer, one at a time, so that scores are shared and each part is timed.

use std::time::Instant;

use compactattn::attend::{self, Correction, Partials};
use compactattn::combine;
use compactattn::plan::Layout;
use compactattn::select::{self, Input};
use compactattn::table::{self, Table, TableMut};
use compactattn::tensor::{ElementsMut, TokensMut};
use compactattn::union::{self, Counts};
use compactattn::workspace::Sizes;
use compactattn::{Error, Result, Status};

use crate::prefill::Prefill;

/// A value and the milliseconds it took.
#[derive(Clone, Debug)]
pub(crate) struct Timed<T> {
    /// What was made.
    pub(crate) value: T,
    /// Wall-clock time.
    pub(crate) ms: f64,
}

/// Rows of bits, one per list, and what they hold.
#[derive(Clone, Debug)]
pub(crate) struct Lists {
    /// `[list spans, lists per span, mask_words]`.
    pub(crate) bits: Vec<u32>,
    /// Over all lists.
    pub(crate) counts: Counts,
}

/// Runs `work` and times it.
pub(crate) fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<Timed<T>> {
    let start = Instant::now();
    let value = work()?;
    Ok(Timed { value, ms: start.elapsed().as_secs_f64() * 1e3 })
}

/// select: `[select spans, num_q_heads, max_blocks]`.
///
/// # Errors
/// Those of [`Prefill::batch`] and [`Sizes::of`].
pub(crate) fn score(prefill: &Prefill, layout: &Layout) -> Result<Timed<Vec<f32>>> {
    let batch = prefill.batch()?;
    let mut scores = vec![0.0; Sizes::of(layout, 1)?.scores];
    let summaries = prefill.summaries(layout.settings.block_size);
    let needed = select::needs_summaries(layout.settings.selector);
    if needed && summaries.is_none() {
        return Err(Error::plain(Status::Internal, "no means were kept for this block size"));
    }
    let gate = prefill.gate();
    if gate.is_none() && select::needs_gate(layout.settings.selector) {
        return Err(Error::new(Status::Null, "--gate", "a weights file, for selector attn_gate", "none"));
    }
    timed(|| {
        let input = Input { layout, batch: &batch, summaries, gate };
        select::score(&input, &mut scores, prefill.parallel);
        Ok(scores)
    })
}

/// union, from scores.
///
/// # Errors
/// Those of [`Prefill::batch`] and [`Sizes::of`].
pub(crate) fn unite(prefill: &Prefill, layout: &Layout, scores: &[f32]) -> Result<Lists> {
    let (batch, sizes) = (prefill.batch()?, Sizes::of(layout, 1)?);
    let (mut masks, mut bits) = (vec![0; sizes.masks], vec![0; sizes.lists]);
    let counts = union::unite(layout, &batch, scores, &mut masks, &mut bits);
    Ok(Lists { bits, counts })
}

/// Rows of bits before any union: `[select spans, num_q_heads, mask_words]`.
///
/// # Errors
/// Those of [`Prefill::batch`] and [`Sizes::of`].
pub(crate) fn masks(prefill: &Prefill, layout: &Layout, scores: &[f32]) -> Result<Vec<u32>> {
    let mut masks = vec![0; Sizes::of(layout, 1)?.masks];
    union::masks_of_scores(layout, &prefill.batch()?, scores, &mut masks);
    Ok(masks)
}

/// union, from someone's masks.
///
/// # Errors
/// Those of [`Prefill::batch`] and [`Sizes::of`].
pub(crate) fn unite_masks(prefill: &Prefill, layout: &Layout, masks: &[u32]) -> Result<Lists> {
    let mut bits = vec![0; Sizes::of(layout, 1)?.lists];
    let counts = union::of_masks(layout, &prefill.batch()?, masks, &mut bits);
    Ok(Lists { bits, counts })
}

/// table, attend and combine: `[total_q, num_q_heads, head_dim]` in f32, so that comparisons see no rounding of ours.
///
/// # Errors
/// Those of [`Prefill::batch`] and [`Sizes::of`].
pub(crate) fn attend(prefill: &Prefill, layout: &Layout, lists: &[u32]) -> Result<Timed<Vec<f32>>> {
    let Attended { out, ms } = attend_apart(prefill, layout, lists)?;
    Ok(Timed { value: out, ms: ms.iter().sum() })
}

/// What [`attend`] makes.
#[derive(Clone, Debug)]
pub(crate) struct Attended {
    /// `[total_q, num_q_heads, head_dim]`.
    pub(crate) out: Vec<f32>,
    /// Of table, attend and combine.
    pub(crate) ms: [f64; 3],
}

/// [`attend`], with the time of each stage.
///
/// # Errors
/// As [`attend`].
pub(crate) fn attend_apart(prefill: &Prefill, layout: &Layout, lists: &[u32]) -> Result<Attended> {
    let (batch, sizes) = (prefill.batch()?, Sizes::of(layout, 1)?);
    let shape = layout.shape;
    let rows = batch.total_q() * shape.num_q_heads;
    let (mut counts, mut stream_lens) = (vec![0; sizes.rows], vec![0; sizes.rows]);
    let mut boxes = vec![0; sizes.boxes];
    let (mut partial, mut lse) = (vec![0.0; rows * shape.head_dim], vec![0.0; rows]);
    let mut out = vec![0.0; rows * shape.head_dim];
    let summaries = prefill.summaries(layout.settings.block_size);
    let corrected = summaries.filter(|_| layout.settings.mean_correction);
    let correction = corrected.map(|summaries| Correction::new(lists, summaries)).transpose()?;
    let tabled = timed(|| {
        let mut table = TableMut { counts: &mut counts, stream_lens: &mut stream_lens, boxes: &mut boxes };
        Ok(table::build(layout, &batch, lists, &mut table))
    })?;
    let mut partials = Partials { splits: 1, out: &mut partial, lse: &mut lse };
    let attended = timed(|| {
        let table = Table { counts: &counts, stream_lens: &stream_lens, boxes: &boxes };
        attend::attend(layout, &batch, &table, correction.as_ref(), &mut partials, prefill.parallel);
        Ok(())
    })?;
    let combined = timed(|| {
        let mut tokens = TokensMut {
            elements: ElementsMut::F32(&mut out),
            stride_token: shape.num_q_heads * shape.head_dim,
            stride_head: shape.head_dim,
        };
        combine::combine(layout, &batch, &partials, &mut tokens, None, prefill.parallel);
        Ok(())
    })?;
    Ok(Attended { out, ms: [tabled.ms, attended.ms, combined.ms] })
}
