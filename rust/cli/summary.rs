//! summary.json: a list with one object per measured row.

use std::path::Path;

use compactattn::{Error, Result, Status};
use serde_json::{Value, json};

use crate::output::write_file;
use crate::sweep::Row;

/// The summary's rows: dense first (density 1, error 0 by definition), then as measured.
pub(crate) fn rows(measured: &[Row], dense_ms: f64) -> Vec<Value> {
    let dense = json!({
        "selector": "dense", "scope": "group x chunk", "block_size": 128,
        "density": 1.0, "error": 0.0, "ms": dense_ms,
    });
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

fn row(row: &Row) -> Value {
    json!({
        "selector": row.contender.name(),
        "scope": row.contender.scope(),
        "block_size": row.contender.settings.block_size,
        "density": row.density,
        "error": row.error,
        "ms": row.ms,
        "target_density": row.target,
        "knob": format!("{:?}", row.contender.knob).to_lowercase(),
        "knob_value": row.knob,
    })
}
