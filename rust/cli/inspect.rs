//! `inspect`: what the union over heads and queries costs, KV head by KV head.

use std::io::Write;
use std::path::PathBuf;

use compactattn::mask;
use compactattn::plan::Layout;
use compactattn::settings::{Keep, Scope, Selector, Settings};
use compactattn::{Error, Result, Status};

use crate::Outcome;
use crate::contender::{even, scope_name};
use crate::options::{EngineArgs, SelectArgs};
use crate::plot_union;
use crate::prefill::Prefill;
use crate::report::{self, Column, fraction};
use crate::stages;
use crate::trace::Trace;

/// Options of `inspect`. Without any, the paper's own point: FlashPrefill masks united over the group and the chunk.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A safetensors file with layerN.q, layerN.k, layerN.v, each [tokens, heads, head_dim].
    #[arg(long, value_name = "FILE")]
    trace: PathBuf,
    /// Where union.png goes.
    #[arg(long, value_name = "DIR", default_value = "target/inspect")]
    out: PathBuf,
    #[command(flatten)]
    select: SelectArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

/// One KV head of one layer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Inflation {
    /// The layer's name.
    pub(crate) layer: String,
    /// The KV head.
    pub(crate) kv_head: usize,
    /// Share of past blocks in a row of bits before union (one query head, one span), mean over rows.
    pub(crate) before: f64,
    /// Share of past blocks in a list, mean over lists.
    pub(crate) after: f64,
    /// Share of the exact attention mass on past blocks that the lists hold.
    pub(crate) mass: f64,
}

impl Inflation {
    /// Blocks of a list per block of a row.
    pub(crate) fn factor(&self) -> f64 {
        self.after / self.before
    }
}

/// Prints the table and draws it.
///
/// # Errors
/// Those of the trace, the options and the stages; [`Status::Unsupported`] for token-level selection.
pub(crate) fn run(args: &Args, out: &mut impl Write) -> Outcome {
    let paper = even(Selector::FlashPrefill, Scope::GROUP_CHUNK);
    let settings = args.select.settings(&Settings { keep: Settings::paper().keep, ..paper })?;
    if settings.block_size == 1 {
        return Err(Error::new(Status::Unsupported, "--block-size", "16..=256", 1).into());
    }
    let trace = Trace::read(&args.trace)?;
    let mut heads = Vec::new();
    for layer in &trace.layers {
        let prefill = Prefill::run(&trace, layer, &args.engine.engine(), &[settings.block_size])?;
        heads.extend(inspect(&prefill, &layer.name(), &settings)?);
    }
    let keep = match settings.keep {
        Keep::Threshold(x) => format!("scores of at least {x}"),
        Keep::Mass(x) => format!("a mass of {x}"),
        Keep::Density(x) => format!("a density of {x}"),
    };
    let about = format!("{}, {}, keeps {keep}", settings.selector.name(), scope_name(settings.scope));
    writeln!(out, "{about}; before = one head's row of bits, after = a list")?;
    report::table(out, &COLUMNS, &heads.iter().map(cells).collect::<Vec<_>>())?;
    let path = args.out.join("union.png");
    plot_union::draw(&path, &about, &heads)?;
    writeln!(out, "wrote {}", path.display())?;
    Ok(())
}

fn inspect(prefill: &Prefill, layer: &str, settings: &Settings) -> Result<Vec<Inflation>> {
    let layout = prefill.layout(settings)?;
    let scores = stages::score(prefill, &layout)?.value;
    let rows = stages::masks(prefill, &layout, &scores)?;
    let lists = stages::unite(prefill, &layout, &scores)?.bits;
    let oracle = Settings { block_size: settings.block_size, ..even(Selector::Oracle, settings.scope) };
    let exact = prefill.layout(&oracle)?;
    let mass = stages::score(prefill, &exact)?.value;
    let past_blocks = layout.geometry.past_blocks(prefill.limits.max_kv_len - prefill.q_len());
    if past_blocks == 0 {
        let wanted = format!("at least {} KV tokens before the queries", settings.block_size);
        return Err(Error::new(Status::Shape, "trace", wanted, "fewer"));
    }
    let (select, list) =
        (layout.select_spans(&prefill.batch()?).len(), layout.list_spans(&prefill.batch()?).len());
    let head = |kv_head| {
        let of = Head { layout: &layout, kv_head, past_blocks };
        Inflation {
            layer: layer.to_owned(),
            kv_head,
            before: of.rows(select, &rows),
            after: of.lists(list, &lists),
            mass: of.mass(list, &lists, &mass),
        }
    };
    Ok((0..layout.shape.num_kv_heads).map(head).collect())
}

/// Sums over what belongs to one KV head.
struct Head<'a> {
    layout: &'a Layout,
    kv_head: usize,
    past_blocks: usize,
}

impl Head<'_> {
    /// Mean share of past blocks in the head's rows `[spans, num_q_heads, mask_words]`.
    fn rows(&self, spans: usize, rows: &[u32]) -> f64 {
        let (heads, group) = (self.layout.shape.num_q_heads, self.layout.shape.group_size());
        let own = (self.kv_head * group)..(self.kv_head + 1) * group;
        self.share(spans, heads, own, rows)
    }

    /// Mean share of past blocks in the head's lists `[spans, lists per span, mask_words]`.
    fn lists(&self, spans: usize, lists: &[u32]) -> f64 {
        self.share(spans, self.layout.lists_per_span(), self.own_lists(), lists)
    }

    /// Share of `mass [spans, num_q_heads, max_blocks]` on past blocks that the lists hold.
    fn mass(&self, spans: usize, lists: &[u32], mass: &[f32]) -> f64 {
        let (mut held, mut all) = (0.0, 0.0);
        for (span, list) in (0..spans).flat_map(|span| self.own_lists().map(move |list| (span, list))) {
            let bits = self.row(lists, span * self.layout.lists_per_span() + list);
            for head in self.layout.list_heads(list).1 {
                let row = (span * self.layout.shape.num_q_heads + head) * self.layout.max_blocks();
                let scores = &mass[row..row + self.past_blocks];
                all += scores.iter().map(|&x| f64::from(x)).sum::<f64>();
                held += mask::ones(bits, self.past_blocks).map(|j| f64::from(scores[j])).sum::<f64>();
            }
        }
        held / all
    }

    fn share(&self, spans: usize, stride: usize, own: std::ops::Range<usize>, bits: &[u32]) -> f64 {
        let count = own.len() * spans * self.past_blocks;
        let rows = (0..spans).flat_map(|span| own.clone().map(move |row| span * stride + row));
        let set: usize = rows.map(|row| mask::count(self.row(bits, row), self.past_blocks)).sum();
        set as f64 / count as f64
    }

    fn row<'b>(&self, bits: &'b [u32], row: usize) -> &'b [u32] {
        let words = self.layout.mask_words();
        &bits[row * words..(row + 1) * words]
    }

    fn own_lists(&self) -> std::ops::Range<usize> {
        let per_head = self.layout.lists_per_kv_head();
        self.kv_head * per_head..(self.kv_head + 1) * per_head
    }
}

fn cells(head: &Inflation) -> Vec<String> {
    vec![
        head.layer.clone(),
        head.kv_head.to_string(),
        fraction(head.before, 3),
        fraction(head.after, 3),
        format!("{:.2}", head.factor()),
        fraction(head.mass, 3),
    ]
}

const COLUMNS: [Column; 6] = [
    Column("layer", true),
    Column("KV head", true),
    Column("density before", true),
    Column("density after", true),
    Column("inflation", true),
    Column("captured mass", true),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::KvLayout;
    use crate::prefill::Engine;
    use crate::synthetic;
    use compactattn::Parallel;

    fn heads(settings: &Settings) -> Vec<Inflation> {
        let trace = synthetic::trace(1, 1500, 300);
        let engine = Engine {
            page_size: 16,
            kv_layout: KvLayout::Hnd,
            chunk: 256,
            sm_scale: None,
            parallel: Parallel::new(1),
            gate: None,
        };
        let prefill = Prefill::run(&trace, &trace.layers[0], &engine, &[settings.block_size]).unwrap();
        inspect(&prefill, "0", settings).unwrap()
    }

    #[test]
    fn without_union_a_list_is_a_row() {
        let settings =
            Settings { keep: Keep::Threshold(0.3), ..even(Selector::FlashPrefill, Scope::HEAD_128) };
        for head in heads(&settings) {
            assert_eq!(head.before, head.after);
        }
    }

    #[test]
    fn a_union_holds_at_least_what_its_rows_hold_and_a_full_one_all_mass() {
        // Only each row's best block: 2 heads x 3 spans and 2 forced blocks leave one of the 9 out.
        let settings =
            Settings { keep: Keep::Threshold(1.0), ..even(Selector::FlashPrefill, Scope::GROUP_CHUNK) };
        assert!(heads(&settings).iter().all(|head| head.factor() >= 1.0 && head.mass < 1.0));
        let all = Settings { keep: Keep::Density(1.0), ..settings };
        assert!(heads(&all).iter().all(|head| head.factor() == 1.0 && (head.mass - 1.0).abs() < 1e-12));
    }
}
