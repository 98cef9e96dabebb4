//! summaries on the GPU: which blocks are written, over which grid.

use super::context::Context;
use super::kernels::{Arg, Grid};
use super::params::Step;
use super::stream::Stream;
use crate::error::Result;
use crate::summaries::Which;
use crate::types::Dtype;

/// Addresses of a layer's summaries; 0 = none.
#[derive(Clone, Copy, Debug)]
pub struct MeansAt {
    /// Mean keys.
    pub k: u64,
    /// Mean values.
    pub v: u64,
    /// Seals of both ([`crate::seals`]).
    pub seals: u64,
}

/// Means of the blocks that a step completes, or of all whole blocks; with seals also of those of other keys.
///
/// # Errors
/// The driver's.
pub(crate) fn update(
    context: &Context,
    stream: Stream,
    step: &Step,
    (which, means): (Which, MeansAt),
    kv_dtype: Dtype,
) -> Result<()> {
    let kv_heads = step.layout.num_kv_heads.cast_unsigned();
    // Keys, values and seals of a block are written by a CTA each.
    let parts = 1 + i32::from(means.v != 0) + i32::from(means.seals != 0);
    let completed = (step.batch.total_q >> step.layout.log2_block_tokens) + step.batch.num_reqs;
    let writers = completed.saturating_mul(parts).cast_unsigned();
    // CTAs share the blocks evenly, whatever their number.
    let share = u32::try_from(8 * context.num_sms()).unwrap_or(u32::MAX).div_ceil(kv_heads);
    let (writers, checkers) = match which {
        Which::Completed if means.seals != 0 => {
            let blocks = u64::from(step.layout.max_blocks.cast_unsigned())
                * u64::from(step.batch.num_reqs.cast_unsigned());
            let runs = u32::try_from(blocks.div_ceil(CHECKED_RUN)).unwrap_or(u32::MAX);
            (writers, runs.clamp(1, share))
        }
        Which::Completed => (writers, 0),
        Which::All => (share, 0),
    };
    let name = match kv_dtype {
        Dtype::Bf16 => "compactattn_summaries_bf16",
        Dtype::E4m3 => "compactattn_summaries_e4m3",
        _ => "compactattn_summaries_fp16",
    };
    let grid = Grid { blocks: [writers + checkers, kv_heads, 1], threads: 128, shared_bytes: 0 };
    let (all, writers) = (i32::from(which == Which::All), writers.cast_signed());
    let MeansAt { k, v, seals } = means;
    let args = [Arg::of(step), Arg::of(&k), Arg::of(&v), Arg::of(&seals), Arg::of(&all), Arg::of(&writers)];
    context.kernels().launch(stream, name, grid, &args)
}

/// Blocks whose seals one CTA compares at a time.
const CHECKED_RUN: u64 = 16;
