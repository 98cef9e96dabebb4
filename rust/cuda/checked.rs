//! Checked mode on a GPU: lists are looked at once more before attend follows them (cuda/check/lists.cu).

use super::kernels::{Arg, Grid};
use super::plan::Run;
use crate::error::Result;

/// What attend may follow, into the workspace: the table may be a caller's. Nothing outside checked mode.
pub(super) fn check_lists(run: &mut Run) -> Result<()> {
    if !run.plan.checked {
        return Ok(());
    }
    let own = [run.scratch.stages.counts, run.scratch.stages.stream_lens];
    let args = [Arg::of(&run.step), Arg::of(&own[0]), Arg::of(&own[1])];
    let rows = run.list_rows().cast_unsigned();
    let grid = Grid { blocks: [rows, 1, 1], threads: 256, shared_bytes: 0 };
    run.plan.context().kernels().launch(run.stream, "compactattn_check_lists", grid, &args)?;
    [run.step.stages.counts, run.step.stages.stream_lens] = own;
    Ok(())
}
