//! The `compactattn` command-line tool.

mod agree;
mod attend;
mod bench;
mod calibrate;
mod contender;
mod demo;
mod doctor;
mod doctor_python;

mod exporter;
mod extract;
mod forward;
mod gpu;
mod host;
mod inspect;

mod options;
mod output;
mod pages;
mod plot;
mod plot_error;
mod plot_heat;
mod plot_union;

mod pool;
mod prefill;
mod prometheus;
mod record;
mod report;
mod selftest;
mod stages;
mod stats;
mod summary;
mod sweep;
mod synthetic;
mod trace;
mod view;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use compactattn::{Error, Status};
use tracing_subscriber::fmt::format::FmtSpan;

/// Chunked-prefill attention that reads only the KV pages that matter.
#[derive(Debug, Parser)]
#[command(name = "compactattn", version, propagate_version = true)]
struct Cli {
    /// What to do.
    #[command(subcommand)]
    command: Command,
    /// Log to stderr: -v what was decided, -vv everything.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Chunked prefill over real tensors: every selector against dense attention, as tables and plots.
    Demo(demo::Args),
    /// Attend one trace with one selector; writes out and lse.
    Attend(attend::Args),
    /// What the union over heads and queries costs, layer by layer and head by head.
    Inspect(inspect::Args),
    /// A prefill as a web page: tables, what each list read and left out, stage times; density by layer in the terminal.
    View(view::Args),
    /// Pages that each way of choosing them needs for the error of the published union.
    Sweep(pages::Args),
    /// Find settings layer by layer for a target error or density; writes a file for COMPACTATTN_CONFIG.
    Calibrate(calibrate::Args),
    /// Copy some layers of a trace into a smaller file.
    Extract(extract::Args),
    /// Time this library beside its peers on a GPU: runs tests/bench with Python.
    Bench(bench::Args),
    /// This machine, this build, the settings in force, and a self-test.
    Doctor(doctor::Args),
    /// What serving engines have counted, as words or Prometheus text.
    Stats(stats::Args),
    /// Name and version.
    Version,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    log_to_stderr(cli.verbose);
    match run(&cli.command, &mut io::stdout().lock()) {
        Ok(code) => code,
        // Whoever reads our output has seen enough.
        Err(Failure::Write(e)) if e.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(Failure::Write(e)) => complain(&format!("cannot write to stdout: {e}"), ExitCode::FAILURE),
        Err(Failure::Library(e)) => complain(&e.to_string(), exit_code(&e)),
    }
}

fn run(command: &Command, out: &mut impl Write) -> std::result::Result<ExitCode, Failure> {
    match command {
        Command::Demo(args) => demo::run(args, out)?,
        Command::Attend(args) => attend::run(args, out)?,
        Command::Inspect(args) => inspect::run(args, out)?,
        Command::View(args) => view::run(args, out)?,
        Command::Calibrate(args) => calibrate::run(args, out)?,
        Command::Sweep(args) => pages::run(args, out)?,
        Command::Extract(args) => extract::run(args, out)?,
        Command::Bench(args) => return bench::run(args, out),
        Command::Doctor(args) => return doctor::run(args, out),
        Command::Stats(args) => stats::run(args, out)?,
        Command::Version => writeln!(out, "compactattn {}", env!("CARGO_PKG_VERSION"))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Why a command stopped.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The library or an input said no.
    Library(Error),
    /// Standard output did.
    Write(io::Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Library(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Write(error)
    }
}

/// What a command returns.
pub(crate) type Outcome = std::result::Result<(), Failure>;

/// 2 for the caller's mistakes, 1 for everything else.
fn exit_code(error: &Error) -> ExitCode {
    let callers = (error.status() as i32) < Status::NoDriver as i32;
    ExitCode::from(if callers { 2 } else { 1 })
}

/// Help and version as they are; a mistake as one line.
fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        return if error.print().is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    if error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = error.print();
        return ExitCode::from(2);
    }
    let text = error.render().to_string();
    // clap separates its message from usage and tips by an empty line.
    let message: Vec<_> = text.lines().take_while(|line| !line.trim().is_empty()).map(str::trim).collect();
    let message = message.join(" ");
    let message = message.strip_prefix("error: ").unwrap_or(&message);
    complain(&format!("{message} (see --help)"), ExitCode::from(2))
}

fn complain(message: &str, code: ExitCode) -> ExitCode {
    // With stderr gone too, the exit code is all that is left to say.
    let _ = writeln!(io::stderr(), "error: {message}");
    code
}

fn log_to_stderr(verbose: u8) {
    let level = match verbose {
        0 => return,
        1 => tracing::Level::DEBUG,
        _ => tracing::Level::TRACE,
    };
    // At the finest level each stage says how long it took.
    let spans = if level == tracing::Level::TRACE { FmtSpan::CLOSE } else { FmtSpan::NONE };
    let colours = io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_max_level(level).with_span_events(spans).with_ansi(colours);
    log.with_writer(io::stderr).init();
}
