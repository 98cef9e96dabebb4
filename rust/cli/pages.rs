//! `sweep`: how many pages each way of choosing them needs for the error of the published union, and errors over
//! densities.

use std::io::Write;
use std::path::PathBuf;

use compactattn::settings::{Scope, Selector, Settings};
use compactattn::{Error, Result, Status};

use crate::contender::{self, BLOCK, Contender, Knob, even, scope_name};
use crate::options::EngineArgs;
use crate::prefill::Prefill;
use crate::report::{self, Column, fraction};
use crate::sweep::{Row, Sweep};
use crate::trace::Trace;
use crate::{Failure, Outcome};

/// Options of `sweep`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A safetensors file with layerN.q, layerN.k, layerN.v, each [tokens, heads, head_dim].
    #[arg(long, value_name = "FILE")]
    trace: PathBuf,
    /// The density at which the union's error is the one to reach.
    #[arg(long, default_value_t = 0.30, value_parser = crate::options::share, value_name = "SHARE")]
    density: f64,
    /// Each layer by itself too.
    #[arg(long)]
    by_layer: bool,
    /// Errors over densities only of the first few ways, not the pages that each way needs.
    #[arg(long)]
    curves_only: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Measures and prints; the CPU path throughout.
///
/// # Errors
/// Those of the trace and the stages.
pub(crate) fn run(args: &Args, out: &mut impl Write) -> Outcome {
    let trace = Trace::read(&args.trace)?;
    let engine = args.engine.engine();
    let fill = |layer| Prefill::run(&trace, layer, &engine, &contender::BLOCKS);
    let prefills = trace.layers.iter().map(fill).collect::<Result<Vec<_>>>()?;
    let names: Vec<_> = trace.layers.iter().map(|layer| layer.name()).collect();
    let file = args.trace.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let (kv_len, q_len) = (trace.kv_len(), trace.q_len());
    writeln!(out, "trace: {file}; chunk: the last {q_len} of {kv_len} tokens")?;
    writeln!(out, "union = flashprefill, group x chunk, blocks of {BLOCK}, rows ORed (arXiv 2605.16839)")?;
    report(args, &prefills, &format!("layers {}, one threshold", names.join(", ")), out)?;
    if args.by_layer && prefills.len() > 1 {
        for (prefill, name) in prefills.chunks(1).zip(&names) {
            report(args, prefill, &format!("layer {name}"), out)?;
        }
    }
    Ok(())
}

/// One trace, or one of its layers.
fn report(args: &Args, prefills: &[Prefill], about: &str, out: &mut impl Write) -> Outcome {
    let mut sweep = Sweep::new(prefills, None)?;
    let reference = sweep.measure(&union(), args.density)?;
    let (density, error) = (fraction(reference.density, 3), fraction(reference.error, 4));
    writeln!(out, "\n{about}: the union's error at density {density} is {error}")?;
    if !args.curves_only {
        let open = (prefills[0].limits.max_kv_len - prefills[0].q_len()) % BLOCK;
        let found = contender::variants(open).into_iter().map(|contender| {
            let row = pages_for(&mut sweep, &contender, reference.error)?;
            let sparse = sweep.measure(&contender, SPARSE)?;
            Ok(cells((&contender, row.as_ref()), &sparse, &reference))
        });
        report::table(out, &COLUMNS, &found.collect::<Result<Vec<_>>>()?)?;
    }
    curves(&mut sweep, out)
}

/// The sparsest point found whose error is not above `error`: densities are bisected, errors measured. `None` where
/// even the densest tried misses it.
fn pages_for(sweep: &mut Sweep, contender: &Contender, error: f64) -> Result<Option<Row>> {
    let (mut low, mut high) = (0.0, DENSEST);
    let mut best: Option<Row> = None;
    for _ in 0..DENSITY_STEPS {
        let target = f64::midpoint(low, high);
        let row = sweep.measure(contender, target)?;
        if row.error > error {
            low = target;
            continue;
        }
        high = target;
        if best.as_ref().is_none_or(|best| row.density < best.density) {
            best = Some(row);
        }
    }
    Ok(best)
}

fn cells((contender, row): (&Contender, Option<&Row>), sparse: &Row, reference: &Row) -> Vec<String> {
    let shown = |of: fn(&Row) -> f64, digits| row.map_or("-".to_owned(), |row| fraction(of(row), digits));
    vec![
        contender.name(),
        contender.scope(),
        contender.settings.block_size.to_string(),
        format!("{:?}", contender.settings.keep_at).to_lowercase(),
        format!("{:?}", contender.knob).to_lowercase(),
        shown(|row| row.density, 3),
        row.map_or("-".to_owned(), |row| fraction(row.density / reference.density, 2)),
        shown(|row| row.error, 4),
        fraction(sparse.error, 4),
    ]
}

/// Errors over densities: the union, the default without and with mean correction, the block oracle.
fn curves(sweep: &mut Sweep, out: &mut impl Write) -> Outcome {
    let default = Settings::of(Selector::SampledExact);
    let own = |settings: Settings| Contender { settings, knob: Knob::Threshold };
    let plain = Settings { block_size: default.block_size, ..even(Selector::SampledExact, default.scope) };
    let shown = [
        union(),
        own(plain),
        own(Settings { mean_correction: true, ..plain }),
        own(Settings { selector: Selector::Oracle, ..plain }),
    ];
    let mut worse = Vec::new();
    let mut rows = Vec::new();
    for target in (1..=12).map(|i| f64::from(i) * 0.05) {
        let measured = shown.iter().map(|contender| sweep.measure(contender, target));
        let [union, plain, corrected, oracle] =
            <[Row; 4]>::try_from(measured.collect::<Result<Vec<_>>>()?)
                .map_err(|_| Failure::Library(Error::plain(Status::Internal, "four rows were measured")))?;
        // Where the union cannot be so sparse, it is not beaten at equal pages by being beaten there.
        let reached = union.density <= target + OFF_TARGET;
        if reached && plain.error.max(corrected.error) > union.error {
            worse.push(fraction(target, 2));
        }
        rows.push(vec![
            fraction(target, 2),
            if reached { fraction(union.error, 4) } else { format!("(at {})", fraction(union.density, 3)) },
            fraction(plain.error, 4),
            fraction(corrected.error, 4),
            fraction(oracle.error, 4),
            if reached { fraction(plain.error / union.error, 2) } else { "-".to_owned() },
            format!("{:.2}", plain.error / oracle.error),
        ]);
    }
    let name = format!("{}, blocks of {}", scope_name(default.scope), default.block_size);
    writeln!(out, "errors at equal density; default = sampled_exact, {name}")?;
    report::table(out, &CURVES, &rows)?;
    match worse.is_empty() {
        true => writeln!(out, "the default is nowhere worse than the union")?,
        false => writeln!(out, "the default is worse than the union at {}", worse.join(", "))?,
    }
    Ok(())
}

/// The published union: FlashPrefill masks, ORed over the group and the whole chunk.
fn union() -> Contender {
    Contender { settings: even(Selector::FlashPrefill, Scope::GROUP_CHUNK), knob: Knob::Threshold }
}

const COLUMNS: [Column; 9] = [
    Column("selector", false),
    Column("scope", false),
    Column("block", true),
    Column("decided by", false),
    Column("rule", false),
    Column("pages", true),
    Column("x union's", true),
    Column("error", true),
    Column("error at .10", true),
];

/// Where granularity shows most.
const SPARSE: f64 = 0.10;

const CURVES: [Column; 7] = [
    Column("density", true),
    Column("union", true),
    Column("default", true),
    Column("+mean", true),
    Column("oracle", true),
    Column("default/union", true),
    Column("default/oracle", true),
];

/// Densities above it are not tried.
const DENSEST: f64 = 0.6;

/// To within a thousandth of all pages.
const DENSITY_STEPS: usize = 10;

/// Further than whole blocks explain: the union keeps at least so much (each row's best block).
const OFF_TARGET: f64 = 0.01;
