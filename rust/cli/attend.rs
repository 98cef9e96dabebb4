//! `attend`: the library's forward pass over a trace; out and lse as a file.

use std::collections::HashMap;
use std::io::Write;
use std::path::PathBuf;

use compactattn::Result;
use compactattn::settings::Selector;

use crate::Outcome;
use crate::forward::Forward;
use crate::gpu::Path;
use crate::options::{DeviceArgs, EngineArgs, SelectArgs};
use crate::output::write_tensors;
use crate::prefill::{Prefill, sparse};
use crate::report::{self, Column, fraction};
use crate::stages::Timed;
use crate::trace::{Data, Trace};

/// Options of `attend`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A safetensors file with q, k, v or layerN.q, layerN.k, layerN.v, each [tokens, heads, head_dim].
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// The safetensors file to write: out [q tokens, q heads, head_dim], lse [q heads, q tokens], natural log.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    select: SelectArgs,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Attends every layer of the file and writes what came out under the layers' own prefixes.
///
/// # Errors
/// Those of the trace, the options and the forward pass.
pub(crate) fn run(args: &Args, out: &mut impl Write) -> Outcome {
    let settings = args.select.settings(&sparse(Selector::SampledExact))?;
    let trace = Trace::read(&args.input)?;
    let engine = args.engine.engine();
    // Summaries are of blocks of 16 and more; token-level selectors read none.
    let sizes: Vec<_> = Some(settings.block_size).filter(|&size| size > 1).into_iter().collect();
    let (mut path, mut results) = (None, Vec::new());
    for layer in &trace.layers {
        let prefill = Prefill::run(&trace, layer, &engine, &sizes)?;
        if path.is_none() {
            let chosen = Path::choose(args.device.device, &prefill, &settings)?;
            writeln!(out, "{}", chosen.line(&prefill))?;
            path = Some(chosen);
        }
        results.extend(path.as_ref().map(|path| path.forward(&prefill, &settings)).transpose()?);
    }
    let cells = trace.layers.iter().zip(&results).map(|(layer, Timed { value, ms })| {
        let density = value.stats.density().map_or("dense".to_owned(), |x| fraction(x, 3));
        let selector = settings.selector.name().to_owned();
        vec![layer.name(), selector, density, format!("{ms:.3}")]
    });
    report::table(out, &COLUMNS, &cells.collect::<Vec<_>>())?;
    write(args, &trace, results)?;
    writeln!(out, "wrote {}", args.output.display())?;
    Ok(())
}

fn write(args: &Args, trace: &Trace, results: Vec<Timed<Forward>>) -> Result<()> {
    let mut tensors = Vec::new();
    for (layer, Timed { value: Forward { out, lse, .. }, .. }) in trace.layers.iter().zip(results) {
        let [tokens, heads, _] = out.dims;
        tensors.push((format!("{}out", layer.prefix()), out.dims.to_vec(), out.data));
        tensors.push((format!("{}lse", layer.prefix()), vec![heads, tokens], Data::F32(lse)));
    }
    let tensors = tensors.iter().map(|(name, dims, data)| (name.clone(), dims.clone(), data));
    write_tensors(&args.output, tensors, HashMap::new())
}

const COLUMNS: [Column; 4] =
    [Column("layer", true), Column("selector", false), Column("density", true), Column("ms", true)];
