//! The library's own forward pass over one prepared layer, with memory of ours.

use compactattn::Result;
use compactattn::run::{Output, Plan, PlanDesc, Step};
use compactattn::settings::Settings;
use compactattn::stats::Stats;
use compactattn::tensor::{LseMut, TokensMut};
use compactattn::workspace::Sizes;

use crate::prefill::Prefill;
use crate::stages::{Timed, timed};
use crate::trace::{Data, Tensor};

/// What a forward pass leaves.
#[derive(Debug)]
pub(crate) struct Forward {
    /// `[total_q, num_q_heads, head_dim]` in q's type.
    pub(crate) out: Tensor,
    /// `[num_q_heads, total_q]`, natural log.
    pub(crate) lse: Vec<f32>,
    /// What was selected.
    pub(crate) stats: Stats,
}

/// A plan for the layer under `settings`, and the layer's number in it.
pub(crate) fn desc(prefill: &Prefill, settings: &Settings) -> (PlanDesc, usize) {
    let (layer, gate) = prefill.gate.clone().map_or((0, None), |(layer, gate)| (layer, Some(gate)));
    let layers = vec![*settings; layer + 1];
    (PlanDesc { shape: prefill.shape, limits: prefill.limits, layers, splits: 1, gate }, layer)
}

/// One call of [`Plan::forward`]; the time is the call's alone, without plan and allocation.
///
/// # Errors
/// Those of [`Plan::new`] and [`Plan::forward`].
pub(crate) fn forward(prefill: &Prefill, settings: &Settings) -> Result<Timed<Forward>> {
    let (batch, shape) = (prefill.batch()?, prefill.shape);
    let (desc, layer) = desc(prefill, settings);
    let plan = Plan::new(&desc, prefill.parallel)?;
    let mut memory = vec![0; plan.workspace_bytes()? + Sizes::ALIGNMENT];
    let aligned = memory.as_ptr().align_offset(Sizes::ALIGNMENT);
    let dims = [batch.total_q(), shape.num_q_heads, shape.head_dim];
    let mut out = Data::filled(shape.dtype, dims.iter().product(), f32::NAN);
    let mut lse = vec![f32::NAN; shape.num_q_heads * batch.total_q()];
    let step = Step { layer, summaries: prefill.summaries(settings.block_size), ..Step::default() };
    let ran = timed(|| {
        let tokens = TokensMut {
            elements: out.elements_mut(),
            stride_token: shape.num_q_heads * shape.head_dim,
            stride_head: shape.head_dim,
        };
        let lse = LseMut { elements: &mut lse, stride_head: batch.total_q() };
        plan.forward(&batch, &step, &mut Output { out: tokens, lse: Some(lse) }, &mut memory[aligned..])
    })?;
    let value = Forward { out: Tensor { dims, data: out }, lse, stats: plan.stats(layer)? };
    Ok(Timed { value, ms: ran.ms })
}
