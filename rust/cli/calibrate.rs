//! `calibrate`: settings layer by layer for a target error or density, found on traces, as a file for
//! `COMPACTATTN_CONFIG`.
//!
//! Each layer gets a curve of (pages, error) over values of the keep rule and over the selectors named, ending in dense
//! attention. On the lower convex hulls of the curves pages are bought where they take away most error, layer by layer,
//! until the mean over layers reaches the target.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use clap::ValueEnum;
use compactattn::config::{self, Config};
use compactattn::config_file;
use compactattn::settings::{Keep, Scope, Selector, Settings};
use compactattn::{Error, Result, Status};
use serde_json::Value;

use crate::Outcome;
use crate::contender::{even, scope_name};
use crate::options::{self, EngineArgs};
use crate::output::write_file;
use crate::prefill::{Prefill, sparse};
use crate::report::{self, Column, fraction};
use crate::sweep::Sweep;
use crate::trace::Trace;

/// Options of `calibrate`.
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("target").required(true)))]
pub(crate) struct Args {
    /// A safetensors file with layerN.q, layerN.k, layerN.v, each [tokens, heads, head_dim]; may be repeated: errors of
    /// a layer are averaged over the traces that have it.
    #[arg(long = "trace", required = true, value_name = "FILE")]
    traces: Vec<PathBuf>,
    /// Fewest pages whose mean relative error over the layers is not above this.
    #[arg(long, group = "target", value_parser = options::share, value_name = "ERROR")]
    error: Option<f64>,
    /// Least error whose mean share of past pages is not above this.
    #[arg(long, group = "target", value_parser = options::share, value_name = "SHARE")]
    density: Option<f64>,
    /// Who may score; may be repeated: each layer takes what serves it best. The first one is that of layers that no trace
    /// has.
    #[arg(long = "selector", value_parser = Selector::from_name, default_value = "sampled_exact")]
    selectors: Vec<Selector>,
    /// The rule whose number is sought; mass carries over to other lengths best.
    #[arg(long, value_enum, default_value = "mass")]
    keep: Rule,
    /// Who shares a list, as for `attend`.
    #[arg(long, value_parser = options::scope, default_value = "head:1024", value_name = "HEADS[:TOKENS]")]
    scope: Scope,
    /// Tokens per block: 16 to 256.
    #[arg(long, default_value_t = 32, value_name = "TOKENS")]
    block_size: usize,
    /// Means stand in for skipped blocks.
    #[arg(long)]
    mean_correction: bool,
    /// The file to write.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    engine: EngineArgs,
}

/// A keep rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Rule {
    /// The best blocks that hold a share of the score.
    Mass,
    /// Blocks of at least some score.
    Threshold,
    /// A share of the blocks.
    Density,
}

/// One way to run a layer, measured.
#[derive(Clone, Copy, Debug)]
struct Point {
    settings: Settings,
    /// Share of the past pages read.
    density: f64,
    /// Mean over KV heads, and over traces, of `||o_sparse - o||_F / ||o||_F`.
    error: f64,
}

/// One layer, in each trace that has it.
struct Layer<'a> {
    number: usize,
    sweeps: Vec<Sweep<'a>>,
}

/// Measures, chooses, writes the file, and measures once more what the file says.
///
/// # Errors
/// Those of traces and stages; [`Status::Unsupported`] for a selector that a trace alone cannot run or a rule that does
/// not fit it.
pub(crate) fn run(args: &Args, out: &mut impl Write) -> Outcome {
    args.check()?;
    let traces = args.traces()?;
    let mut layers = Vec::new();
    for (&number, prefills) in &traces {
        let sweeps = prefills.chunks(1).map(|prefill| Sweep::new(prefill, None)).collect::<Result<_>>()?;
        layers.push(Layer { number, sweeps });
    }
    let curves = layers.iter_mut().map(|layer| args.curve(layer)).collect::<Result<Vec<_>>>()?;
    let hulls: Vec<_> = curves.iter().map(|curve| hull(curve)).collect();
    let chosen = args.choose(&hulls);
    let numbers = layers.iter().map(|layer| layer.number);
    let by_layer: BTreeMap<_, _> = numbers.zip(chosen.iter().map(|point| point.settings)).collect();
    let file = config_file::of(&args.common(&curves)?, &by_layer);
    let config = read_back(&file)?;
    let text = format!("{}\n", serde_json::to_string_pretty(&file).unwrap_or_default());
    write_file(&args.output, text.as_bytes())?;
    let measured = layers.iter_mut().map(|layer| layer.measure(config.layer(layer.number)));
    let measured = measured.collect::<Result<Vec<_>>>()?;
    report(&layers, &config, &measured, out)?;
    writeln!(
        out,
        "wrote {}: COMPACTATTN_MODE=compactattn COMPACTATTN_CONFIG=that file",
        args.output.display()
    )?;
    Ok(())
}

impl Args {
    fn check(&self) -> Result<()> {
        for &selector in &self.selectors {
            if matches!(
                selector,
                Selector::External | Selector::Dense | Selector::Streaming | Selector::AttnGate
            ) {
                let wanted = "selectors that score by the trace alone";
                return Err(Error::new(Status::Unsupported, "--selector", wanted, selector.name()));
            }
            // It scores again as many blocks as it may keep, so it must know how many those are.
            if selector == Selector::TwoLevel && self.keep != Rule::Density {
                return Err(Error::new(Status::Unsupported, "--keep", "density, for two_level", "another"));
            }
            self.settings(selector).check()?;
        }
        Ok(())
    }

    fn settings(&self, selector: Selector) -> Settings {
        let Settings { flashprefill, .. } = Settings::of(selector);
        let (block_size, mean_correction) = (self.block_size, self.mean_correction);
        Settings { block_size, mean_correction, flashprefill, ..even(selector, self.scope) }
    }

    /// The traces' layers by number.
    fn traces(&self) -> Result<BTreeMap<usize, Vec<Prefill>>> {
        let engine = self.engine.engine();
        let mut layers: BTreeMap<usize, Vec<Prefill>> = BTreeMap::new();
        for path in &self.traces {
            let trace = Trace::read(path)?;
            for layer in &trace.layers {
                let prefill = Prefill::run(&trace, layer, &engine, &[self.block_size])?;
                layers.entry(layer.number.unwrap_or(0)).or_default().push(prefill);
            }
        }
        Ok(layers)
    }

    /// Every value of the rule under every selector, and dense attention last.
    fn curve(&self, layer: &mut Layer) -> Result<Vec<Point>> {
        let mut curve = Vec::new();
        for &selector in &self.selectors {
            for &value in self.values() {
                curve.push(self.point(layer, selector, value)?);
            }
        }
        curve.push(Point { settings: Settings::of(Selector::Dense), density: 1.0, error: 0.0 });
        Ok(curve)
    }

    fn point(&self, layer: &mut Layer, selector: Selector, value: f32) -> Result<Point> {
        let keep = match self.keep {
            Rule::Mass => Keep::Mass(value),
            Rule::Threshold => Keep::Threshold(value),
            Rule::Density => Keep::Density(value),
        };
        let settings = Settings { keep, ..self.settings(selector) };
        let [density, error] = layer.measure(&settings)?;
        // What is not measured here, when to be dense, stays as the mode has it.
        Ok(Point { settings: Settings { dense: Settings::of(selector).dense, ..settings }, density, error })
    }

    fn values(&self) -> &'static [f32] {
        match self.keep {
            Rule::Mass => &MASSES,
            Rule::Threshold => &THRESHOLDS,
            Rule::Density => &DENSITIES,
        }
    }

    /// One point of each hull, so that the mean over layers meets the target.
    fn choose(&self, hulls: &[Vec<Point>]) -> Vec<Point> {
        let mut at = vec![0; hulls.len()];
        loop {
            let now: Vec<Point> = at.iter().zip(hulls).map(|(&i, hull)| hull[i]).collect();
            if self.error.is_some_and(|most| mean(&now, |point| point.error) <= most) {
                return now;
            }
            // The layer whose next point takes away most error a page.
            let gain = |(&i, hull): (&usize, &Vec<Point>)| {
                let next = hull.get(i + 1)?;
                Some((hull[i].error - next.error) / (next.density - hull[i].density))
            };
            let gains = at.iter().zip(hulls).map(gain).enumerate();
            let best =
                gains.filter_map(|(layer, gain)| Some((layer, gain?))).max_by(|a, b| a.1.total_cmp(&b.1));
            let Some((layer, _)) = best else { return now };
            let more = hulls[layer][at[layer] + 1].density - now[layer].density;
            let total = mean(&now, |point| point.density) + more / hulls.len() as f64;
            if self.density.is_some_and(|most| total > most) {
                return now;
            }
            at[layer] += 1;
        }
    }

    /// The first selector's one value that meets the target over all layers together: for layers without a trace.
    fn common(&self, curves: &[Vec<Point>]) -> Result<Settings> {
        let values = self.values().len();
        let of = |i: usize| curves.iter().map(|curve| curve[i]).collect::<Vec<_>>();
        let meets = |points: &[Point]| match (self.error, self.density) {
            (Some(most), _) => mean(points, |point| point.error) <= most,
            (_, Some(most)) => mean(points, |point| point.density) <= most,
            _ => true,
        };
        // Values ascend in pages: the first that is right enough, or the last that is sparse enough.
        let found = match self.error {
            Some(_) => (0..values).find(|&i| meets(&of(i))).unwrap_or(values - 1),
            None => (0..values).rev().find(|&i| meets(&of(i))).unwrap_or(0),
        };
        let first = curves.first().ok_or_else(|| Error::plain(Status::Shape, "the traces have no layer"))?;
        Ok(first[found].settings)
    }
}

/// What the file makes of each layer.
fn report(layers: &[Layer], config: &Config, measured: &[[f64; 2]], out: &mut impl Write) -> Outcome {
    let mut rows = Vec::new();
    for (layer, [density, error]) in layers.iter().zip(measured) {
        let settings = config.layer(layer.number);
        let keep = match settings.keep {
            _ if settings.selector == Selector::Dense => "everything".to_owned(),
            Keep::Mass(x) => format!("mass {x}"),
            Keep::Threshold(x) => format!("score {x}"),
            Keep::Density(x) => format!("density {x}"),
        };
        let (number, name) = (layer.number.to_string(), settings.selector.name().to_owned());
        rows.push(vec![
            number,
            name,
            scope_name(settings.scope),
            keep,
            fraction(*density, 3),
            fraction(*error, 4),
        ]);
    }
    let all = |i: usize| measured.iter().map(|x| x[i]).sum::<f64>() / measured.len() as f64;
    let mut last = vec![String::new(); COLUMNS.len()];
    (last[0], last[4], last[5]) = ("mean".to_owned(), fraction(all(0), 3), fraction(all(1), 4));
    rows.push(last);
    report::table(out, &COLUMNS, &rows)?;
    Ok(())
}

impl Layer<'_> {
    /// Density and error under `settings`, means over the traces; sparse however short they are.
    fn measure(&mut self, settings: &Settings) -> Result<[f64; 2]> {
        if settings.selector == Selector::Dense {
            return Ok([1.0, 0.0]);
        }
        let settings = Settings { dense: sparse(settings.selector).dense, ..*settings };
        let mut sums = [0.0; 2];
        for sweep in &mut self.sweeps {
            let row = sweep.as_set(&settings)?;
            sums = [sums[0] + row.density, sums[1] + row.error];
        }
        Ok(sums.map(|sum| sum / self.sweeps.len() as f64))
    }
}

/// Points by density on the lower convex hull of error, the last of them dense.
fn hull(curve: &[Point]) -> Vec<Point> {
    let mut points = curve.to_vec();
    points.sort_by(|a, b| a.density.total_cmp(&b.density).then(a.error.total_cmp(&b.error)));
    let slope = |a: &Point, b: &Point| (b.error - a.error) / (b.density - a.density);
    let mut hull: Vec<Point> = Vec::new();
    for point in points {
        if hull.last().is_some_and(|last| point.error >= last.error || point.density <= last.density) {
            continue;
        }
        while let [.., a, b] = hull.as_slice() {
            if slope(a, b) < slope(b, &point) {
                break;
            }
            hull.pop();
        }
        hull.push(point);
    }
    hull
}

fn mean(points: &[Point], of: impl Fn(&Point) -> f64) -> f64 {
    points.iter().map(of).sum::<f64>() / points.len() as f64
}

/// What an engine makes of the file.
fn read_back(file: &Value) -> Result<Config> {
    let vars = [("COMPACTATTN_MODE", "compactattn"), ("COMPACTATTN_CONFIG", "the file")];
    let vars = vars.map(|(name, value)| (name.to_owned(), value.to_owned()));
    config::resolve(vars.into_iter(), |_| Ok(file.to_string()))
}

const COLUMNS: [Column; 6] = [
    Column("layer", true),
    Column("selector", false),
    Column("scope", false),
    Column("keeps", false),
    Column("pages", true),
    Column("error", true),
];

// Ascending in pages.
const MASSES: [f32; 16] =
    [0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995];
const THRESHOLDS: [f32; 16] =
    [5e-2, 3e-2, 2e-2, 1.5e-2, 1e-2, 8e-3, 6e-3, 5e-3, 4e-3, 3e-3, 2e-3, 1.5e-3, 1e-3, 5e-4, 2e-4, 1e-4];
const DENSITIES: [f32; 16] =
    [0.03, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.85];
