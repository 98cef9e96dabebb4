//! `extract`: some layers of a trace as a file of their own.

use std::io::Write;
use std::path::PathBuf;

use compactattn::{Error, Status};

use crate::Outcome;
use crate::trace::Trace;

/// Options of `extract`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The trace to read.
    #[arg(long, value_name = "FILE")]
    trace: PathBuf,
    /// Layer to keep; may be repeated.
    #[arg(long = "layer", required = true, value_name = "N")]
    layers: Vec<usize>,
    /// The file to write.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

/// Writes the layers, bit for bit, with the file's metadata.
///
/// # Errors
/// [`Status::Value`] for a layer the trace does not have; those of reading and writing.
pub(crate) fn run(args: &Args, out: &mut impl Write) -> Outcome {
    let mut trace = Trace::read(&args.trace)?;
    let has = |number: usize| trace.layers.iter().any(|layer| layer.number == Some(number));
    if let Some(missing) = args.layers.iter().find(|&&number| !has(number)) {
        let there: Vec<_> = trace.layers.iter().map(|layer| layer.name()).collect();
        let wanted = format!("one of {}", there.join(", "));
        return Err(Error::new(Status::Value, "--layer", wanted, missing).into());
    }
    trace.layers.retain(|layer| layer.number.is_some_and(|number| args.layers.contains(&number)));
    trace.write(&args.output)?;
    writeln!(out, "wrote {}", args.output.display())?;
    Ok(())
}
