//! `view`: a recorded prefill as one page for a browser, and layer by layer in the terminal.

use std::io::Write;
use std::path::{Path, PathBuf};

use compactattn::settings::Selector;
use compactattn::{Error, Result, Status};
use serde_json::Value;

use crate::options::{EngineArgs, SelectArgs};
use crate::output::write_file;
use crate::prefill::sparse;
use crate::report::{self, Column, fraction};
use crate::trace::Trace;
use crate::{Outcome, record};

/// Options of `view`. What to keep and how the engine is set up matter where a trace is recorded.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("source").required(true))]
pub(crate) struct Args {
    /// Record the prefill of this safetensors file: layerN.q, layerN.k, layerN.v, each [tokens, heads, head_dim].
    #[arg(long, value_name = "FILE", group = "source")]
    trace: Option<PathBuf>,
    /// Show what was recorded before.
    #[arg(long, value_name = "FILE", group = "source")]
    record: Option<PathBuf>,
    /// Where view.html goes, and record.json where a trace is recorded.
    #[arg(long, value_name = "DIR", default_value = "target/view")]
    out: PathBuf,
    #[command(flatten)]
    select: SelectArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Records, where asked to, prints a line a layer and writes the page.
///
/// # Errors
/// Those of the trace and its recording; [`Status::Io`] and [`Status::Config`] for a record that is none.
pub(crate) fn run(args: &Args, out: &mut impl Write) -> Outcome {
    let found = match (&args.trace, &args.record) {
        (Some(trace), _) => {
            let settings = args.select.settings(&sparse(Selector::SampledExact))?;
            let found = record::make(&Trace::read(trace)?, trace, &args.engine.engine(), &settings)?;
            write_file(&args.out.join("record.json"), format!("{found}\n").as_bytes())?;
            writeln!(out, "wrote {}", args.out.join("record.json").display())?;
            found
        }
        (None, path) => read(path.as_deref().unwrap_or(Path::new("")))?,
    };
    print(&found, out)?;
    let path = args.out.join("view.html");
    write_file(&path, page(&found).as_bytes())?;
    writeln!(out, "wrote {}", path.display())?;
    Ok(())
}

fn read(path: &Path) -> Result<Value> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).map_err(|e| {
        Error::new(Status::Io, "--record", "a readable record of `view --trace`", format!("{shown}: {e}"))
    })?;
    let value: Option<Value> = serde_json::from_str(&text).ok();
    value.filter(|value| value["record"] == record::VERSION && value["layers"].is_array()).ok_or_else(|| {
        Error::new(Status::Config, "--record", format!("a record of version {}", record::VERSION), shown)
    })
}

/// Density layer by layer, with a bar.
fn print(found: &Value, out: &mut impl Write) -> Outcome {
    let word = |name: &str| found[name].as_str().unwrap_or("").to_owned();
    let (selector, scope, keep) = (word("selector"), word("scope"), word("keep"));
    writeln!(
        out,
        "{selector}, {scope}, keeps {keep}; the last {} of {} tokens",
        found["q_len"], found["kv_len"]
    )?;
    let rows = found["layers"].as_array().into_iter().flatten().map(|layer| {
        let number = |name: &str| layer[name].as_f64().unwrap_or(f64::NAN);
        let stages = layer["stages_ms"].as_object();
        let ms: f64 = stages.into_iter().flatten().filter_map(|(_, ms)| ms.as_f64()).sum();
        vec![
            layer["layer"].as_str().unwrap_or("").to_owned(),
            fraction(number("density"), 3),
            bar(number("density")),
            fraction(number("error"), 4),
            format!("{ms:.0}"),
            format!("{:.0}", number("dense_ms")),
        ]
    });
    Ok(report::table(out, &COLUMNS, &rows.collect::<Vec<_>>())?)
}

/// A share as a bar of 24 cells, to an eighth of one.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most 192 eighths")]
fn bar(share: f64) -> String {
    let eighths = (share.clamp(0.0, 1.0) * 24.0 * 8.0).round() as usize;
    let part = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"][eighths % 8];
    "█".repeat(eighths / 8) + part
}

/// The page: one file, which asks nobody for anything.
fn page(found: &Value) -> String {
    // Within a script element only its own end could end it.
    PAGE.replace("{{record}}", &found.to_string().replace("</", "<\\/"))
}

const PAGE: &str = include_str!("view.html");

const COLUMNS: [Column; 6] = [
    Column("layer", true),
    Column("density", true),
    Column("share of past blocks read", false),
    Column("error", true),
    Column("ms", true),
    Column("dense ms", true),
];

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn bars_grow_by_eighths() {
        assert_eq!((bar(0.0), bar(1.0 / 192.0), bar(1.0 / 24.0)), (String::new(), "▏".into(), "█".into()));
        assert_eq!((bar(1.0).chars().count(), bar(7.0).chars().count()), (24, 24));
    }

    #[test]
    fn a_name_in_a_record_cannot_leave_its_element() {
        let text = page(&json!({ "model": "</script><img src=x>" }));
        assert_eq!(text.matches("</script>").count(), PAGE.matches("</script>").count());
        assert!(text.contains(r#"<\/script><img"#), "{text}");
    }
}
