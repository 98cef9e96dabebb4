//! `eval`: accuracy on long prompts, paired with dense attention; all measuring is the Python package's, beside a model.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use compactattn::{Error, Status};

use crate::{Failure, doctor_python};

/// Options of `eval`.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Args {
    /// The interpreter, with this package and transformers; default: the one beside this program, else python3.
    #[arg(long, value_name = "PROGRAM")]
    python: Option<PathBuf>,
    /// Options of `python -m compactattn eval`; --help lists them.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "--out DIR ...")]
    arguments: Vec<OsString>,
}

/// Runs `python -m compactattn.eval` and ends as it does: 0 = every row is there, 3 = some are missing.
///
/// # Errors
/// [`Status::Io`] if the interpreter is not to be found; those of `out`.
pub(crate) fn run(args: &Args, out: &mut impl Write) -> std::result::Result<ExitCode, Failure> {
    out.flush()?;
    let python = doctor_python::interpreter(args.python.as_deref());
    let command = ["-m", "compactattn.eval"];
    let status = Command::new(&python).args(command).args(&args.arguments).status().map_err(|e| {
        let wanted = "a Python with compactattn and transformers";
        Error::new(Status::Io, "--python", wanted, format!("{} ({e})", python.display()))
    })?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}
