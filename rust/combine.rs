//! combine: one output row from its KV splits, weighted by their log-sum-exps.

use crate::attend::Partials;
use crate::batch::Batch;
use crate::parallel::Parallel;
use crate::plan::Layout;
use crate::tensor::{LseMut, TokensMut};

/// Writes `out` and, where given, `lse`. A row that saw nothing gets 0 and −inf.
pub fn combine(
    _layout: &Layout,
    _batch: &Batch,
    _partials: &Partials,
    _out: &mut TokensMut,
    _lse: Option<&mut LseMut>,
    _parallel: Parallel,
) {
}
