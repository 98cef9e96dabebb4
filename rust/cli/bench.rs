//! `bench`: finds `tests/bench` and runs it with Python; all measuring is done there, beside the peers.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use compactattn::{Error, Result, Status};

use crate::{Failure, doctor_python};

/// Options of `bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The interpreter; default: the one beside this program, else python3.
    #[arg(long, value_name = "PROGRAM")]
    python: Option<PathBuf>,
    /// The folder that holds bench.py; default: tests/bench here or above, or above this program.
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
    /// A question (dense, sparse, op, ... or a TOML file), then options of bench.py; none = list the questions.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "QUESTION --out DIR ...")]
    arguments: Vec<OsString>,
}

/// Runs bench.py and ends as it does: 0 = every row is there, 3 = some are missing, 1 = an answer was wrong.
///
/// # Errors
/// [`Status::Io`] if the folder or the interpreter is not to be found; those of `out`.
pub(crate) fn run(args: &Args, out: &mut impl Write) -> std::result::Result<ExitCode, Failure> {
    let folder = folder(args.folder.as_deref())?;
    let Some((question, rest)) = args.arguments.split_first() else {
        for name in questions(&folder)? {
            writeln!(out, "{name}")?;
        }
        return Ok(ExitCode::SUCCESS);
    };
    out.flush()?;
    let python = doctor_python::interpreter(args.python.as_deref());
    let status = Command::new(&python)
        .arg(folder.join(SCRIPT))
        .arg(definition(&folder, question))
        .args(rest)
        .status()
        .map_err(|e| missing("--python", "a Python 3.11 with a GPU framework", &python, &e))?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Where bench.py lies: sources carry it, installed tools do not.
fn folder(given: Option<&Path>) -> Result<PathBuf> {
    let here = std::env::current_dir().unwrap_or_default();
    let program = std::env::current_exe().unwrap_or_default();
    let above = here.ancestors().chain(program.ancestors()).map(|dir| dir.join("tests/bench"));
    let mut candidates =
        given.map_or_else(|| above.collect::<Vec<_>>(), |dir| vec![dir.to_owned()]).into_iter();
    candidates.find(|dir| dir.join(SCRIPT).is_file()).ok_or_else(|| {
        let got = given.map_or_else(|| here.display().to_string(), |dir| dir.display().to_string());
        let wanted = "the source tree's tests/bench, here or above, or --folder DIR";
        Error::new(Status::Io, "bench", wanted, got)
    })
}

/// A name means a file of definitions/; everything else is left to bench.py.
fn definition(folder: &Path, question: &OsString) -> PathBuf {
    let named = folder.join("definitions").join(question).with_extension("toml");
    if !Path::new(question).exists() && named.is_file() { named } else { PathBuf::from(question) }
}

fn questions(folder: &Path) -> Result<Vec<String>> {
    let path = folder.join("definitions");
    let entries =
        std::fs::read_dir(&path).map_err(|e| missing("bench", "a folder of questions", &path, &e))?;
    let files =
        entries.flatten().map(|entry| entry.path()).filter(|path| path.extension() == Some("toml".as_ref()));
    let mut names: Vec<_> =
        files.filter_map(|path| Some(path.file_stem()?.to_string_lossy().into_owned())).collect();
    names.sort();
    Ok(names)
}

fn missing(what: &str, wanted: &str, path: &Path, error: &std::io::Error) -> Error {
    Error::new(Status::Io, what, wanted, format!("{} ({error})", path.display()))
}

const SCRIPT: &str = "bench.py";
