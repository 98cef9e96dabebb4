//! attend: softmax attention over the listed boxes only, in place, by online softmax; split over KV where asked.

use crate::batch::Batch;
use crate::parallel::Parallel;
use crate::plan::Layout;
use crate::summaries::Summaries;
use crate::table::Table;

/// Results of one or more KV splits before they are combined.
///
/// Rows of one span lie together: span `s`, query head `h`, token `t` of the span is row
/// `s.q_start * num_q_heads + h * s.len + t` of each split.
#[derive(Debug)]
pub struct Partials<'a> {
    /// KV splits of each row, at least 1.
    pub splits: usize,
    /// `[splits, total_q * num_q_heads, head_dim]`, each split normalised by its own sum.
    pub out: &'a mut [f32],
    /// `[splits, total_q * num_q_heads]`, natural log; −inf where the split holds nothing the row sees.
    pub lse: &'a mut [f32],
}

/// The zeroth-order stand-in for blocks that no list reads: each adds `len * exp(q . k_mean * sm_scale)` of weight
/// with value `v_mean` (FlashPrefill V2, arXiv 2608.19758).
#[derive(Clone, Copy, Debug)]
pub struct Correction<'a> {
    /// `[list spans, lists per span, mask_words]`: what the lists do read.
    pub lists: &'a [u32],
    /// Means of keys and values.
    pub summaries: Summaries<'a>,
}

/// Attends every query of the batch to its list in `table`.
pub fn attend(
    _layout: &Layout,
    _batch: &Batch,
    _table: &Table,
    _correction: Option<&Correction>,
    _partials: &mut Partials,
    _parallel: Parallel,
) {
}
