//! summary.json: a list with one object per measured row.

use std::path::Path;

use compactattn::{Error, Result, Status};
use serde_json::{Value, json};

use crate::output::write_file;
use crate::sweep::{Row, Sweep};

/// The summary's rows: dense first (density 1; on the CPU error 0 by definition), then as measured.
pub(crate) fn rows(measured: &[Row], sweep: &Sweep) -> Vec<Value> {
    let on_gpu = sweep.dense_on_gpu();
    let (ms, error) = on_gpu.map_or((sweep.dense_ms(), 0.0), |dense| (dense.ms, dense.error));
    let dense = json!({
        "selector": "dense", "scope": "group x chunk", "block_size": 128,
        "density": 1.0, "error": error, "ms": ms, "device": device(on_gpu.is_some()),
    });
    let row = |measured: &Row| row(measured, on_gpu.is_some() && measured.off_gpu.is_none());
    std::iter::once(dense).chain(measured.iter().map(row)).collect()
}

/// Writes the summary.
///
/// # Errors
/// [`Status::Io`].
pub(crate) fn write(path: &Path, rows: &[Value]) -> Result<()> {
    let text = serde_json::to_string_pretty(rows)
        .map_err(|e| Error::plain(Status::Internal, format!("summary: {e}")))?;
    write_file(path, format!("{text}\n").as_bytes())
}

fn row(row: &Row, on_gpu: bool) -> Value {
    json!({
        "selector": row.contender.name(),
        "scope": row.contender.scope(),
        "block_size": row.contender.settings.block_size,
        "density": row.density,
        "error": row.error,
        "ms": row.ms,
        "device": device(on_gpu),
        "target_density": row.target,
        "knob": format!("{:?}", row.contender.knob).to_lowercase(),
        "knob_value": row.knob,
    })
}

/// Where a row was measured.
fn device(on_gpu: bool) -> &'static str {
    if on_gpu { "cuda" } else { "cpu" }
}
