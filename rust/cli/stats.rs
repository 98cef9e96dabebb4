//! `stats`: what serving processes have counted, from the files that their setting `counters_file` names.
//!
//! An engine writes such a file at most once a second and replaces it whole, so that it may be read at any time. In
//! `/dev/shm` that is shared memory; on the GPU's side counters are copied into memory that the host reads, and no one waits.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use compactattn::{Error, Result, Status};
use serde_json::{Map, Value};

use crate::{Outcome, exporter, prometheus};

/// Options of `stats`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Counters of one process each, or a folder of such files.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Prometheus text format, for a textfile collector.
    #[arg(long, visible_alias = "prom", group = "form")]
    prometheus: bool,
    /// A JSON array, one object a process.
    #[arg(long, group = "form")]
    json: bool,
    /// Again each so many seconds, until interrupted.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", value_parser = seconds)]
    watch: Option<Duration>,
    /// With --watch: so many times.
    #[arg(long, value_name = "N", requires = "watch")]
    times: Option<u64>,
    /// Answer GET /metrics at this address, until interrupted: an exporter for Prometheus.
    #[arg(long, value_name = "ADDRESS:PORT", conflicts_with_all = ["watch", "form"])]
    serve: Option<SocketAddr>,
}

/// Prints all files' counters.
///
/// # Errors
/// [`Status::Io`] for a file that cannot be read, [`Status::Config`] for one without counters; those of `out`.
pub(crate) fn run(args: &Args, out: &mut impl Write) -> Outcome {
    if let Some(address) = args.serve {
        return exporter::serve(address, &args.files, out);
    }
    let Some(pause) = args.watch else {
        return show(args, &read_all(&args.files)?, out);
    };
    for time in 0..args.times.unwrap_or(u64::MAX) {
        if time > 0 {
            thread::sleep(pause);
        }
        if !args.prometheus && !args.json {
            out.write_all(CLEAR)?;
        }
        show(args, &read_all(&args.files)?, out)?;
        out.flush()?;
    }
    Ok(())
}

fn show(args: &Args, all: &[Counters], out: &mut impl Write) -> Outcome {
    let text = match (args.prometheus, args.json) {
        (true, _) => prometheus::text(all),
        (_, true) => format!("{}\n", Value::from_iter(all.iter().cloned().map(Value::Object))),
        _ => all.iter().map(plain).collect::<Vec<_>>().join("\n"),
    };
    Ok(out.write_all(text.as_bytes())?)
}

/// One process's counters, as its file holds them.
pub(crate) type Counters = Map<String, Value>;

/// All files, and those that folders hold now: processes come and go.
///
/// # Errors
/// As [`run`]; not for a file of a folder that is gone when it is read.
pub(crate) fn read_all(paths: &[PathBuf]) -> Result<Vec<Counters>> {
    let mut all = Vec::new();
    for path in paths {
        match std::fs::read_dir(path) {
            Ok(entries) => {
                let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
                files.retain(|file| file.extension().is_some_and(|kind| kind == "json"));
                files.sort();
                let found = files.iter().map(|file| read(file));
                all.extend(found.filter(|read| !is_gone(read)).collect::<Result<Vec<_>>>()?);
            }
            Err(_) => all.push(read(path)?),
        }
    }
    Ok(all)
}

fn is_gone(read: &Result<Counters>) -> bool {
    read.as_ref().is_err_and(|error| error.status() == Status::Io)
}

fn seconds(text: &str) -> std::result::Result<Duration, String> {
    let number = text.parse().ok().and_then(|x: f64| Duration::try_from_secs_f64(x).ok());
    number.filter(|pause| !pause.is_zero()).ok_or_else(|| format!("wanted seconds, got {text:?}"))
}

/// Cursor to the top, screen erased.
const CLEAR: &[u8] = b"\x1b[H\x1b[2J";

fn read(path: &Path) -> Result<Counters> {
    let text = std::fs::read_to_string(path).map_err(|e| {
        Error::new(
            Status::Io,
            "stats",
            "a file of the setting counters_file",
            format!("{}: {e}", path.display()),
        )
    })?;
    match serde_json::from_str(&text) {
        Ok(Value::Object(counters)) if counters.contains_key("split_steps") => Ok(counters),
        _ => Err(Error::new(Status::Config, "stats", "JSON with counters", path.display().to_string())),
    }
}

/// One process in words: a line a counter, reasons and plans on lines of their own.
fn plain(counters: &Counters) -> String {
    let mut lines = Vec::new();
    for (name, value) in counters {
        match value {
            Value::Object(reasons) => {
                lines.push(format!("  {name}: {}", if reasons.is_empty() { "none" } else { "" }));
                lines.extend(reasons.iter().map(|(reason, count)| format!("    {reason}: {count}")));
            }
            Value::Array(plans) => lines.extend(plans.iter().map(|plan| format!("  plan: {}", fields(plan)))),
            _ if name == "pid" => lines.insert(0, format!("pid {value}")),
            _ => lines.push(format!("  {name}: {value}")),
        }
    }
    lines.iter().map(|line| format!("{}\n", line.trim_end())).collect()
}

fn fields(plan: &Value) -> String {
    let each = plan.as_object().into_iter().flatten();
    let shown = each.map(|(name, value)| match value.as_f64() {
        Some(number) if value.is_f64() => format!("{name} {number:.4}"),
        _ => format!("{name} {value}"),
    });
    shown.collect::<Vec<_>>().join(", ").replace("null", "none yet")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Counters of one process as a server writes them.
    pub(crate) const FILE: &str = r#"{"pid": 7, "steps": 18, "split_steps": 12, "our_requests": 21, "our_tokens": 126682,
        "left_to_engine": {"decode": 17}, "fallbacks": {"layer: \"odd\"": 4},
        "plans": [{"page_size": 16, "density": 0.25, "refused": 1, "dense": 896},
                  {"page_size": 64, "density": null, "refused": 0, "dense": 0}]}"#;

    #[test]
    fn words_name_the_process_reasons_and_plans() {
        let text = plain(&serde_json::from_str(FILE).unwrap());
        assert!(text.starts_with("pid 7\n"), "{text}");
        assert!(text.contains("    decode: 17\n"), "{text}");
        assert!(text.contains("density 0.2500") && text.contains("density none yet"), "{text}");
    }

    #[test]
    fn a_file_without_counters_is_refused_by_name() {
        let path = std::env::temp_dir().join(format!("compactattn_stats_{}.json", std::process::id()));
        std::fs::write(&path, "[1, 2]").unwrap();
        assert_eq!(read(&path).unwrap_err().status(), Status::Config);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(read(&path).unwrap_err().status(), Status::Io);
    }

    #[test]
    fn a_folder_is_all_its_counters_and_nothing_else() {
        let folder = std::env::temp_dir().join(format!("compactattn_stats_folder_{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        for (name, text) in [("8.json", FILE), ("7.json", FILE), ("7.json.99.tmp", "{")] {
            std::fs::write(folder.join(name), text).unwrap();
        }
        let paths = [folder.clone()];
        assert_eq!(read_all(&paths).unwrap().len(), 2);
        std::fs::write(folder.join("9.json"), "{}").unwrap();
        assert_eq!(read_all(&paths).unwrap_err().status(), Status::Config);
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(read_all(&paths).unwrap_err().status(), Status::Io);
    }
}
