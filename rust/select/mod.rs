//! select: scores every past block for the chunk's queries.
//!
//! A score lies in [0, 1] and higher means keep sooner; what it measures is the selector's (its module says).
//! Only *past* blocks, those wholly below the chunk's first token, are candidates; the rest, the open region, is
//! always attended. Scores are laid out `[select spans, num_q_heads, max_blocks]`; entries at and after the
//! request's past blocks, and all of a dense span, are left as they are.

mod attn_gate;
mod cells;
mod flashprefill;
pub(crate) mod gate_weights;
pub(crate) mod keep;
mod oracle;
#[cfg(test)]
mod plain;
mod pooled_mass;
mod quoka;
mod rope;
mod rows;
mod sample;
mod sampled_exact;
#[cfg(test)]
mod scored;
mod two_level;
mod xattention;

pub use gate_weights::{Gate, GateLayer};
pub use rope::{Pairing, Rope};

use crate::batch::Batch;
use crate::parallel::Parallel;
use crate::plan::{Layout, Span};
use crate::settings::Selector;
use crate::summaries::Summaries;

/// What a selector may look at.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// How the batch is cut.
    pub layout: &'a Layout,
    /// Queries, pools and tables.
    pub batch: &'a Batch<'a>,
    /// Block means, for selectors that [`needs_summaries`].
    pub summaries: Option<Summaries<'a>>,
    /// The layer's gate, for selectors that [`needs_gate`].
    pub gate: Option<&'a GateLayer>,
}

/// Scores of one span for the query heads of one KV head: `[group_size, max_blocks]`.
#[derive(Debug)]
pub(crate) struct Unit<'a> {
    /// The queries.
    pub(crate) span: Span,
    /// The KV head.
    pub(crate) kv_head: usize,
    /// Candidates: blocks `0..past_blocks`.
    pub(crate) past_blocks: usize,
    /// Rows of scores, one a query head of the group.
    pub(crate) scores: &'a mut [f32],
    /// From a row of scores to the next.
    pub(crate) stride: usize,
}

/// How rows of one selector's scores combine into a list's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merge {
    /// Shares of attention mass: the mean over rows is the list's own share.
    Mean,
    /// Relative scores: a block is worth what its keenest row says, so a threshold on it equals the OR of thresholds.
    Max,
}

/// How this selector's rows combine.
#[must_use]
pub fn merge_of(selector: Selector) -> Merge {
    match selector {
        Selector::FlashPrefill | Selector::AttnGate | Selector::Quoka | Selector::External => Merge::Max,
        _ => Merge::Mean,
    }
}

/// Whether this selector reads block means.
#[must_use]
pub fn needs_summaries(selector: Selector) -> bool {
    matches!(selector, Selector::FlashPrefill | Selector::PooledMass | Selector::TwoLevel)
}

/// Whether this selector reads learned gate weights.
#[must_use]
pub fn needs_gate(selector: Selector) -> bool {
    selector == Selector::AttnGate
}

/// Scores the batch into `scores`, `[select spans, num_q_heads, max_blocks]`.
pub fn score(input: &Input, scores: &mut [f32], parallel: Parallel) {
    let layout = input.layout;
    let (heads, stride) = (layout.shape.num_kv_heads, layout.max_blocks());
    let spans = layout.select_spans(input.batch);
    let rows = scores.chunks_mut(layout.shape.group_size() * stride);
    let units = rows.enumerate().take(spans.len() * heads).map(|(i, scores)| {
        let span = spans[i / heads];
        let past_blocks = layout.geometry.past_blocks(span.past);
        Unit { span, kv_head: i % heads, past_blocks, scores, stride }
    });
    let sparse = units.filter(|unit| !unit.span.dense);
    if layout.settings.selector == Selector::AttnGate {
        let keys = attn_gate::GateKeys::new(input, parallel);
        return parallel.for_each(sparse, |mut unit| attn_gate::score(input, &keys, &mut unit));
    }
    let scorer = scorer(layout.settings.selector);
    parallel.for_each(sparse, |mut unit| scorer(input, &mut unit));
}

type Scorer = fn(&Input, &mut Unit);

/// The one table from a selector to its code.
fn scorer(selector: Selector) -> Scorer {
    match selector {
        Selector::Dense => |_, unit| unit.fill(1.0),
        // Only the forced sink and local blocks stay.
        Selector::Streaming => |_, unit| unit.fill(0.0),
        Selector::FlashPrefill => flashprefill::score,
        Selector::SampledExact => sampled_exact::score,
        Selector::Oracle => oracle::score,
        Selector::PooledMass => pooled_mass::score,
        Selector::TwoLevel => two_level::score,
        Selector::Quoka => quoka::score,
        Selector::XAttention => xattention::score,
        // Scored by the caller, or on a path of its own; NaN keeps every block, should one come here.
        Selector::External | Selector::AttnGate => |_, unit| unit.fill(f32::NAN),
    }
}

impl Unit<'_> {
    /// One score for every candidate of every head.
    fn fill(&mut self, score: f32) {
        for row in self.scores.chunks_mut(self.stride) {
            row[..self.past_blocks].fill(score);
        }
    }

    /// Gives the other heads of the group the first one's scores.
    fn share_first_row(&mut self) {
        let (first, others) = self.scores.split_at_mut(self.stride);
        for row in others.chunks_mut(self.stride) {
            row[..self.past_blocks].copy_from_slice(&first[..self.past_blocks]);
        }
    }
}

/// The larger of two numbers; NaN if either is one, so what cannot be judged stays visible as such.
fn max_or_nan(a: f32, b: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::NAN } else { a.max(b) }
}
