//! `doctor`: what a Python environment says of this package and its engines. It is asked in a process of its own, so that
//! nothing that is broken there can break the doctor.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// The sections that Python fills: always the same names; where there is nobody to ask, the first says why.
pub(crate) fn sections(given: Option<&Path>) -> Vec<(&'static str, Value)> {
    let answer = match given.map(Path::to_owned).or_else(beside) {
        Some(python) => ask(&python, LIMIT).unwrap_or_else(|why| json!({ "python": { "error": why } })),
        None => {
            json!({ "python": { "result": "not asked: no interpreter beside this program; --python names one" } })
        }
    };
    NAMES.iter().map(|name| (*name, answer.get(name).cloned().unwrap_or_else(|| json!({})))).collect()
}

/// The interpreter that is named, else that of this program's environment, else the one on PATH.
pub(crate) fn interpreter(given: Option<&Path>) -> PathBuf {
    given.map(Path::to_owned).or_else(beside).unwrap_or_else(|| PathBuf::from("python3"))
}

/// The interpreter of the environment that this program was installed into.
fn beside() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    let python = program.parent()?.join("python3");
    python.is_file().then_some(python)
}

/// The package's own report, or why there is none.
fn ask(python: &Path, limit: Duration) -> Result<Value, String> {
    let failed = |e: io::Error| format!("{}: {e}", python.display());
    let mut asked = Command::new(python)
        .args(["-m", "compactattn.doctor"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    // Both are read while it runs: a full pipe would hold it up for ever.
    let (answer, words) = (reader(asked.stdout.take()), reader(asked.stderr.take()));
    let end = Instant::now() + limit;
    while asked.try_wait().map_err(failed)?.is_none() {
        if Instant::now() > end {
            asked.kill().and_then(|()| asked.wait()).map_err(failed)?;
            return Err(format!("{}: no answer in {} s", python.display(), limit.as_secs()));
        }
        thread::sleep(Duration::from_millis(5));
    }
    let (answer, words) = (answer.join().unwrap_or_default(), words.join().unwrap_or_default());
    serde_json::from_slice(&answer).map_err(|_| {
        let words = String::from_utf8_lossy(&words);
        let last = words.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
        format!("{} has no report of this package: {last}", python.display())
    })
}

fn reader(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What came before an error is what there is.
        let _ = pipe.map(|mut pipe| pipe.read_to_end(&mut bytes));
        bytes
    })
}

const NAMES: [&str; 3] = ["python", "engines", "collisions"];

/// Longer than what Python itself allows each engine.
const LIMIT: Duration = Duration::from_secs(40);

#[cfg(test)]
mod tests {
    use super::*;

    fn script(name: &str, text: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = std::env::temp_dir().join(format!("compactattn-doctor-{}-{name}", std::process::id()));
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn an_interpreter_that_hangs_fails_or_is_none_leaves_a_reason() {
        let cases = [
            ("hangs", "exec sleep 30", "no answer in"),
            ("fails", "echo 'No module named that' >&2; exit 1", "No module named that"),
            ("babbles", "echo hello", "it said nothing"),
        ];
        for (name, text, wanted) in cases {
            let path = script(name, text);
            let why = ask(&path, Duration::from_millis(300)).unwrap_err();
            std::fs::remove_file(&path).unwrap();
            assert!(why.contains(wanted), "{name}: {why}");
        }
        let names: Vec<_> = sections(Some("/no/such/python".as_ref()))
            .into_iter()
            .map(|(name, fields)| (name, fields.get("error").is_some()))
            .collect();
        assert_eq!(names, [("python", true), ("engines", false), ("collisions", false)]);
    }
}
