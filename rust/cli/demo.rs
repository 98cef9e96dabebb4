//! `demo`: chunked prefill over real tensors, dense against every selector.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::PathBuf;

use compactattn::settings::{Scope, Selector, Settings};
use compactattn::{Error, Result, Status};
use indicatif::{ProgressBar, ProgressStyle};

use crate::agree::Agreement;
use crate::contender::{self, BLOCK, Contender, even};
use crate::gpu::{PASSES, Path};
use crate::options::{DeviceArgs, EngineArgs};
use crate::plot_heat::Heat;
use crate::prefill::Prefill;
use crate::report::{self, Column, fraction};
use crate::sweep::{Row, Sweep};
use crate::trace::Trace;
use crate::{Outcome, plot_error, plot_heat, prefill, summary};

/// Options of `demo`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A safetensors file with layerN.q, layerN.k, layerN.v, each [tokens, heads, head_dim]; the default is the source
    /// tree's.
    #[arg(long, value_name = "FILE", default_value = SOURCE_TREES)]
    trace: PathBuf,
    /// Where summary.json and the plots go.
    #[arg(long, value_name = "DIR", default_value = "target/demo")]
    out: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Runs the comparison, prints it and writes summary.json, selected_blocks.png and error_density.png.
///
/// # Errors
/// Those of the trace, the engine's shape and the stages; [`Status::Internal`] where the GPU's outputs differ from the
/// CPU's by more than rounding.
pub(crate) fn run(args: &Args, out: &mut impl Write) -> Outcome {
    let trace = Trace::read(&args.trace).map_err(|error| {
        let elsewhere = args.trace.as_os_str() == SOURCE_TREES && error.status() == Status::Io;
        let hint = "the source tree has it: run there, or name a trace with --trace FILE";
        if elsewhere { Error::plain(Status::Io, format!("no {SOURCE_TREES} here; {hint}")) } else { error }
    })?;
    let engine = args.engine.engine();
    let fill = |layer| Prefill::run(&trace, layer, &engine, &[BLOCK, 64]);
    let prefills = trace.layers.iter().map(fill).collect::<Result<Vec<_>>>()?;
    let path = Path::choose(args.device.device, &prefills[0], &even(Selector::Dense, Scope::GROUP_CHUNK))?;
    introduce(args, &trace, (&prefills[0], &path), out)?;
    let mut sweep = Sweep::new(&prefills, path.gpu())?;
    let past = trace.kv_len() - trace.q_len();
    let rows = measure(&mut sweep, &contender::all(past % BLOCK, args.engine.has_gate()))?;
    for target in DENSITIES {
        print_table(&rows, target, path.gpu().is_some(), out)?;
    }
    print_dense(&sweep, out)?;
    let default = prefill::sparse(Selector::SampledExact);
    let ms = time(path.forward(&prefills[0], &default)?.ms);
    let what =
        format!("sampled_exact, {}, blocks of {}", contender::scope_name(default.scope), default.block_size);
    writeln!(
        out,
        "one forward with the default settings ({what}): {ms} ms a layer; `view` shows what it reads"
    )?;
    print_gpu(&sweep, &rows, out)?;
    if !args.engine.has_gate() {
        writeln!(out, "skipped: attn_gate (needs trained gate weights: --gate FILE --rope-theta BASE)")?;
    }
    summary::write(&args.out.join("summary.json"), &summary::rows(&rows, &sweep))?;
    draw(args, &trace, &prefills[0], &rows)?;
    for file in ["summary.json", HEAT_PNG, ERROR_PNG] {
        writeln!(out, "wrote {}", args.out.join(file).display())?;
    }
    Ok(())
}

fn introduce(
    args: &Args,
    trace: &Trace,
    (prefill, path): (&Prefill, &Path),
    out: &mut impl Write,
) -> Outcome {
    let shape = prefill.shape;
    let layers: Vec<_> = trace.layers.iter().map(|layer| layer.name()).collect();
    writeln!(out, "trace: {}, layer {}", args.trace.display(), layers.join(", "))?;
    if let Some(model) = trace.metadata.get("model") {
        writeln!(out, "model: {model}")?;
    }
    let heads =
        format!("{} query heads, {} KV heads of {}", shape.num_q_heads, shape.num_kv_heads, shape.head_dim);
    writeln!(out, "shape: {heads}, {}, pages of {}", shape.dtype.name(), shape.page_size)?;
    let (kv_len, q_len) = (trace.kv_len(), trace.q_len());
    writeln!(
        out,
        "chunk: the last {q_len} of {kv_len} tokens; {} past blocks of {BLOCK}",
        (kv_len - q_len) / BLOCK
    )?;
    writeln!(out, "{}", path.line(prefill))?;
    if path.gpu().is_some() {
        writeln!(
            out,
            "GPU ms: select to combine, mean of {PASSES} forward passes; errors are of the GPU's own output"
        )?;
    }
    Ok(())
}

/// Every contender at every density, with a bar on stderr where that is a terminal.
fn measure(sweep: &mut Sweep, contenders: &[Contender]) -> Result<Vec<Row>> {
    let bar = ProgressBar::new((contenders.len() * DENSITIES.len()) as u64);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}") {
        bar.set_style(style);
    }
    let mut rows = Vec::new();
    for contender in contenders {
        bar.set_message(format!("{} {}", contender.name(), contender.scope()));
        for target in DENSITIES {
            rows.push(sweep.measure(contender, target)?);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    Ok(rows)
}

/// Ranked by error; `x union` compares with the paper's point, FlashPrefill masks under one list per group.
fn print_table(rows: &[Row], target: f64, on_gpu: bool, out: &mut impl Write) -> Outcome {
    let mut here: Vec<_> = rows.iter().filter(|row| (row.target - target).abs() < 1e-9).collect();
    here.sort_by(|a, b| a.error.total_cmp(&b.error));
    let union = |c: &Contender| {
        c.settings.selector == Selector::FlashPrefill && c.settings.scope == Scope::GROUP_CHUNK
    };
    let paper = here.iter().find(|row| union(&row.contender)).map_or(f64::NAN, |row| row.error);
    let cells = here.iter().enumerate().map(|(i, row)| {
        vec![
            (i + 1).to_string(),
            row.contender.name(),
            row.contender.scope(),
            row.contender.settings.block_size.to_string(),
            fraction(row.density, 3),
            fraction(row.error, 4),
            fraction(row.error / paper, 2),
            if row.off_gpu.is_some() { format!("{} (CPU)", time(row.ms)) } else { time(row.ms) },
        ]
    });
    writeln!(
        out,
        "\nDensity {}, least error first (x union = error / flashprefill group x chunk)",
        fraction(target, 2)
    )?;
    let mut columns = COLUMNS;
    columns[7].0 = if on_gpu { "GPU ms" } else { "ms" };
    report::table(out, &columns, &cells.collect::<Vec<_>>())?;
    for row in here.iter().filter(|row| row.density > target + OFF_TARGET) {
        let (name, scope) = (row.contender.name(), row.contender.scope());
        writeln!(out, "note: {name} {scope} cannot be sparser than {}", fraction(row.density, 3))?;
    }
    Ok(())
}

fn print_dense(sweep: &Sweep, out: &mut impl Write) -> Outcome {
    let cpu = time(sweep.dense_ms());
    match sweep.dense_on_gpu() {
        None => writeln!(out, "\ndense: {cpu} ms a layer")?,
        Some(dense) => writeln!(
            out,
            "\ndense: {} ms a layer on the GPU, error {}; {cpu} ms on the CPU, in f32, which errors are measured against",
            time(dense.ms),
            fraction(dense.error, 4)
        )?,
    }
    Ok(())
}

/// What the GPU did not run and why, and whether what it ran is right; nothing where the path is the CPU.
fn print_gpu(sweep: &Sweep, rows: &[Row], out: &mut impl Write) -> Outcome {
    if sweep.dense_on_gpu().is_none() {
        return Ok(());
    }
    let reasons: BTreeSet<_> = rows.iter().filter_map(|row| row.off_gpu.as_ref()).collect();
    for reason in reasons {
        writeln!(out, "(CPU): not on the GPU: {reason}")?;
    }
    let agreement = sweep.agreement();
    let Agreement { passes, other_lists, other_blocks, relative, of_bound } = agreement;
    writeln!(
        out,
        "check: {passes} forward passes on the GPU against the CPU over the same lists: largest relative error of a \
         row {relative:.1e}, {of_bound:.2} of what rounding explains; {other_lists} of them read other lists than the \
         CPU made, {other_blocks} blocks in all"
    )?;
    if !agreement.holds() {
        let text = "the GPU's outputs differ from the CPU's by more than rounding explains";
        return Err(Error::plain(Status::Internal, text).into());
    }
    Ok(())
}

/// Milliseconds, with digits where there are few.
fn time(ms: f64) -> String {
    if ms < 10.0 { format!("{ms:.3}") } else { format!("{ms:.0}") }
}

fn draw(args: &Args, trace: &Trace, prefill: &Prefill, rows: &[Row]) -> Result<()> {
    let past = trace.kv_len() - trace.q_len();
    let layer = match trace.layers.len() {
        1 => format!("layer {}", trace.layers[0].name()),
        n => format!("layer {}, the first of {n} that share a threshold", trace.layers[0].name()),
    };
    let heat = Heat {
        layer: &layer,
        density: HEAT_DENSITY,
        past_blocks: past / BLOCK,
        blocks: trace.kv_len().div_ceil(BLOCK),
        num_kv_heads: prefill.shape.num_kv_heads,
    };
    let shown = |row: &&Row| {
        let Settings { scope, block_size, mean_correction, .. } = row.contender.settings;
        row.target == HEAT_DENSITY && scope.query_span == 0 && block_size == BLOCK && !mean_correction
    };
    let mut strips: Vec<_> = rows.iter().filter(shown).collect();
    strips.sort_by_key(|row| row.contender.settings.scope.heads_per_list);
    plot_heat::draw(&args.out.join(HEAT_PNG), &heat, &strips)?;
    let layers = if trace.layers.len() == 1 { "layer" } else { "layers" };
    let names: Vec<_> = trace.layers.iter().map(|layer| layer.name()).collect();
    let chunk = format!("the last {} of {} tokens", trace.q_len(), trace.kv_len());
    let about = format!(
        "{layers} {}, {chunk} | solid: one list for the whole chunk; dashed: variants",
        names.join(", ")
    );
    plot_error::draw(&args.out.join(ERROR_PNG), &about, rows)
}

const COLUMNS: [Column; 8] = [
    Column("rank", true),
    Column("selector", false),
    Column("scope", false),
    Column("block", true),
    Column("density", true),
    Column("error", true),
    Column("x union", true),
    Column("ms", true),
];

/// What runs where nothing else is named.
const SOURCE_TREES: &str = "tests/data/smollm2_layer26.safetensors";

/// Where selectors are compared.
const DENSITIES: [f64; 3] = [0.10, 0.20, 0.30];

/// Further than whole blocks explain: the method keeps at least so much (each row's best block, say).
const OFF_TARGET: f64 = 0.01;

/// Where the selected blocks are drawn.
const HEAT_DENSITY: f64 = 0.20;

const HEAT_PNG: &str = "selected_blocks.png";
const ERROR_PNG: &str = "error_density.png";
