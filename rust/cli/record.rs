//! A recorded prefill: what each list of each layer read, what it left out, and how long each stage took, as JSON.

use std::ops::Range;
use std::path::Path;

use compactattn::plan::Layout;
use compactattn::settings::{Keep, Scope, Selector, Settings};
use compactattn::{Error, Result, Status, mask};
use serde_json::{Value, json};

use crate::contender::{even, scope_name};
use crate::prefill::{Engine, Prefill};
use crate::stages::{self, Attended};
use crate::sweep::mean_error;
use crate::trace::{Layer, Trace};

/// Runs the last chunk of every layer under `settings`, and densely beside it.
///
/// # Errors
/// Those of the trace and the stages; [`Status::Unsupported`] for token-level selection, [`Status::Shape`] for a prompt
/// without a past block.
pub(crate) fn make(trace: &Trace, name: &Path, engine: &Engine, settings: &Settings) -> Result<Value> {
    if settings.block_size == 1 {
        return Err(Error::new(Status::Unsupported, "--block-size", "16..=256", 1));
    }
    let past_blocks = (trace.kv_len() - trace.q_len()) / settings.block_size;
    if past_blocks == 0 {
        let wanted = format!("at least {} KV tokens before the queries", settings.block_size);
        return Err(Error::new(Status::Shape, "trace", wanted, "fewer"));
    }
    let layers = trace.layers.iter().map(|layer| record(trace, layer, engine, settings));
    let layers = layers.collect::<Result<Vec<_>>>()?;
    let shape = trace.shape(engine.page_size, engine.sm_scale)?;
    Ok(json!({
        "record": VERSION,
        "tool": concat!("compactattn ", env!("CARGO_PKG_VERSION")),
        "trace": name.file_name().map(|name| name.to_string_lossy()),
        "model": trace.metadata.get("model"),
        "path": "CPU",
        "selector": settings.selector.name(),
        "scope": scope_name(settings.scope),
        "keep": keep(settings.keep),
        "block_size": settings.block_size,
        "page_size": shape.page_size,
        "num_q_heads": shape.num_q_heads,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "dtype": shape.dtype.name(),
        "kv_len": trace.kv_len(),
        "q_len": trace.q_len(),
        "past_blocks": past_blocks,
        "blocks": trace.kv_len().div_ceil(settings.block_size),
        "layers": layers,
    }))
}

/// One layer, its lists in the order of the library's tables.
fn record(trace: &Trace, layer: &Layer, engine: &Engine, settings: &Settings) -> Result<Value> {
    let prefill = Prefill::run(trace, layer, engine, &[settings.block_size])?;
    let layout = prefill.layout(settings)?;
    let scores = stages::score(&prefill, &layout)?;
    let lists = stages::timed(|| stages::unite(&prefill, &layout, &scores.value))?;
    let Attended { out, ms: [table, attend, combine] } =
        stages::attend_apart(&prefill, &layout, &lists.value.bits)?;
    let dense = prefill.layout(&even(Selector::Dense, Scope::GROUP_CHUNK))?;
    let everything = stages::unite(&prefill, &dense, &stages::score(&prefill, &dense)?.value)?.bits;
    let wanted = stages::attend(&prefill, &dense, &everything)?;
    let oracle = Settings { block_size: settings.block_size, ..even(Selector::Oracle, settings.scope) };
    let exact = stages::score(&prefill, &prefill.layout(&oracle)?)?.value;
    let past = layout.geometry.past_blocks(trace.kv_len() - trace.q_len());
    let of = Lists { layout: &layout, bits: &lists.value.bits, exact: &exact, past };
    let spans = layout.list_spans(&prefill.batch()?).len();
    let all: Vec<_> = (0..spans).flat_map(|span| of.span(span)).collect();
    Ok(json!({
        "layer": layer.name(),
        "density": lists.value.counts.selected as f64 / (lists.value.counts.candidates.max(1)) as f64,
        "error": mean_error(&prefill, &out, &wanted.value),
        "dense_ms": wanted.ms,
        "stages_ms": {
            "select": scores.ms, "union": lists.ms, "table": table, "attend": attend, "combine": combine,
        },
        "lists": all,
    }))
}

/// What a layer's lists are told from.
struct Lists<'a> {
    layout: &'a Layout,
    /// `[list spans, lists per span, mask_words]`.
    bits: &'a [u32],
    /// Exact attention mass, `[select spans, num_q_heads, max_blocks]`.
    exact: &'a [f32],
    past: usize,
}

impl Lists<'_> {
    /// Every list of one span.
    fn span(&self, span: usize) -> Vec<Value> {
        let words = self.layout.mask_words();
        let per_span = self.layout.lists_per_span();
        let list = |list: usize| {
            let first = (span * per_span + list) * words;
            let bits = &self.bits[first..first + words];
            let (kv_head, heads) = self.layout.list_heads(list);
            let mass = self.mass(span, heads.clone());
            let all: f64 = mass.iter().sum();
            let held: f64 = mask::ones(bits, self.past).map(|block| mass[block]).sum();
            let kept = mask::count(bits, self.past);
            json!({
                "span": span, "kv_head": kv_head, "heads": heads.collect::<Vec<_>>(),
                "kept_blocks": kept,
                "density": kept as f64 / self.past as f64,
                "mass": held / all.max(f64::MIN_POSITIVE),
                "kept": (0..self.past).map(|block| if mask::get(bits, block) { '1' } else { '0' }).collect::<String>(),
                "mass_by_block": shades(&mass),
            })
        };
        (0..per_span).map(list).collect()
    }

    /// Mass of each past block, summed over the list's heads.
    fn mass(&self, span: usize, heads: Range<usize>) -> Vec<f64> {
        let stride = self.layout.max_blocks();
        let row = |head: usize| (span * self.layout.shape.num_q_heads + head) * stride;
        let of = |block: usize| heads.clone().map(|head| f64::from(self.exact[row(head) + block])).sum();
        (0..self.past).map(of).collect()
    }
}

/// Shares of the largest as two hex digits a block, by their square root: most blocks hold little.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of 255")]
fn shades(mass: &[f64]) -> String {
    let most = mass.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    mass.iter().map(|x| format!("{:02x}", ((x / most).sqrt() * 255.0).round() as u8)).collect()
}

fn keep(keep: Keep) -> String {
    match keep {
        Keep::Threshold(x) => format!("scores of at least {x}"),
        Keep::Mass(x) => format!("a mass of {x}"),
        Keep::Density(x) => format!("a density of {x}"),
    }
}

/// Of the format; a reader refuses others.
pub(crate) const VERSION: u64 = 1;
