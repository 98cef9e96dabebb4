//! Who is compared in the demo: selectors, the scopes that suit them, and the knob that sets each one's density.

use compactattn::settings::{Keep, KeepAt, Scope, Selector, Settings};

use crate::prefill::sparse;

/// The number that is bisected until the lists have the wanted density.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Knob {
    /// One threshold on the scores of all layers and lists.
    Threshold,
    /// The share of each row's score to keep, as the method is published.
    Mass,
    /// The share of blocks to keep, for a method with a budget.
    Density,
    /// The number of local blocks.
    Local,
    /// A threshold on the oracle's rows, whose bits are then handed over as the caller's own mask.
    OracleMask,
}

/// One row of the comparison.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Contender {
    /// Everything but the knob's value.
    pub(crate) settings: Settings,
    /// What is bisected.
    pub(crate) knob: Knob,
}

impl Contender {
    /// The name in tables: the selector's, and what was added to it.
    pub(crate) fn name(&self) -> String {
        let name = self.settings.selector.name();
        if self.settings.mean_correction { format!("{name}+mean_correction") } else { name.to_owned() }
    }

    /// The scope in tables.
    pub(crate) fn scope(&self) -> String {
        scope_name(self.settings.scope)
    }

    /// The settings with the knob at `x`; streaming's local blocks are `x` of `past_blocks`.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of past_blocks")]
    pub(crate) fn at(&self, x: f32, past_blocks: usize) -> Settings {
        match self.knob {
            Knob::Threshold | Knob::OracleMask => Settings { keep: Keep::Threshold(x), ..self.settings },
            Knob::Mass => Settings { keep: Keep::Mass(x), ..self.settings },
            Knob::Density => Settings { keep: Keep::Density(x), ..self.settings },
            Knob::Local => {
                let local_blocks = (f64::from(x) * past_blocks as f64).round() as usize;
                Settings { local_blocks: local_blocks.max(1), ..self.settings }
            }
        }
    }
}

/// A scope as tables and summaries name it: who shares a list x how many query tokens.
pub(crate) fn scope_name(scope: Scope) -> String {
    let heads = match scope.heads_per_list {
        0 => "group".to_owned(),
        1 => "head".to_owned(),
        n => format!("{n} heads"),
    };
    let span = if scope.query_span == 0 { "chunk".to_owned() } else { scope.query_span.to_string() };
    format!("{heads} x {span}")
}

/// Every contender, in the order of the summary; `attn_gate` only with weights, in blocks of 64 as published. `open` =
/// past tokens beyond the last whole block of 128, which are attended whatever is selected.
pub(crate) fn all(open: usize, gate: bool) -> Vec<Contender> {
    use Selector::{
        External, FlashPrefill, Oracle, PooledMass, SampledExact, Streaming, TwoLevel, XAttention,
    };
    let scopes = [Scope::GROUP_CHUNK, Scope::HEAD_CHUNK, GROUP_256, Scope::HEAD_128];
    let of = |selector, knob, scopes: &[Scope]| {
        let contender = |&scope: &Scope| Contender { settings: even(selector, scope), knob };
        scopes.iter().map(contender).collect::<Vec<_>>()
    };
    let mut all = of(SampledExact, Knob::Threshold, &scopes);
    all.extend(of(FlashPrefill, Knob::Threshold, &scopes));
    all.extend(of(Oracle, Knob::Threshold, &scopes));
    all.extend(of(PooledMass, Knob::Threshold, &scopes[..2]));
    all.extend(of(TwoLevel, Knob::Threshold, &scopes[..2]));
    all.extend(of(XAttention, Knob::Mass, &[Scope::GROUP_CHUNK, Scope::HEAD_128]));
    all.extend(quoka(open));
    all.extend(of(Streaming, Knob::Local, &scopes[..1]));
    all.extend(of(External, Knob::OracleMask, &scopes[..1]));
    if gate {
        let by_64 = |contender: Contender| {
            let settings = Settings { block_size: 64, ..contender.settings };
            Contender { settings, ..contender }
        };
        all.extend(of(Selector::AttnGate, Knob::Threshold, &scopes[..2]).into_iter().map(by_64));
    }
    for scope in &scopes[..2] {
        let settings = even(SampledExact, *scope);
        let corrected = Settings { mean_correction: true, ..settings };
        all.push(Contender { settings: corrected, knob: Knob::Threshold });
        // The default's size.
        let small = Settings { block_size: sparse(SampledExact).block_size, ..settings };
        all.push(Contender { settings: small, knob: Knob::Threshold });
    }
    all
}

/// Ways to choose pages that `sweep` compares with the union, the default's scope first; `open` as for [`all`].
pub(crate) fn variants(open: usize) -> Vec<Contender> {
    use Selector::{FlashPrefill, Oracle, PooledMass, SampledExact, TwoLevel};
    let of = |settings| Contender { settings, knob: Knob::Threshold };
    let mut all = Vec::new();
    for scope in [Scope::HEAD_CHUNK, HEAD_256, Scope::HEAD_128, GROUP_256, Scope::GROUP_CHUNK] {
        for block_size in BLOCKS {
            let settings = Settings { block_size, ..even(SampledExact, scope) };
            all.extend([settings, Settings { mean_correction: true, ..settings }].map(of));
        }
    }
    let by_row = [Scope::HEAD_CHUNK, Scope::GROUP_CHUNK].map(|scope| even(SampledExact, scope));
    all.extend(by_row.map(|settings| of(Settings { keep_at: KeepAt::Row, ..settings })));
    let budgets = [Knob::Mass, Knob::Density].map(|knob| Contender { settings: by_row[0], knob });
    all.extend(budgets);
    all.extend([TwoLevel, PooledMass, FlashPrefill].map(|selector| of(even(selector, Scope::HEAD_CHUNK))));
    all.extend(quoka(open));
    all.extend(BLOCKS.map(|block_size| of(Settings { block_size, ..even(Oracle, Scope::HEAD_CHUNK) })));
    all.push(of(even(Oracle, Scope::HEAD_128)));
    all
}

/// A selector on equal terms: blocks of 128, first and last past block always, no floor, cap or guard.
pub(crate) fn even(selector: Selector, scope: Scope) -> Settings {
    let mut settings = sparse(selector);
    settings.flashprefill.relative_to_past = true;
    Settings {
        block_size: BLOCK,
        scope,
        min_density: 0.0,
        max_density: 1.0,
        sink_blocks: 1,
        local_blocks: 1,
        density_guard: 1.0,
        ..settings
    }
}

/// By token, with as many first and last tokens forced as the others have in blocks; and by block.
fn quoka(open: usize) -> [Contender; 2] {
    let by_block = even(Selector::Quoka, Scope::GROUP_CHUNK);
    let by_token = Settings { block_size: 1, sink_blocks: BLOCK, local_blocks: BLOCK + open, ..by_block };
    let by_block = Settings { keep_at: KeepAt::List, ..by_block };
    [by_token, by_block].map(|settings| Contender { settings, knob: Knob::Density })
}

/// Tokens per block of every contender that does not say otherwise.
pub(crate) const BLOCK: usize = 128;

/// Block sizes that `sweep` compares.
pub(crate) const BLOCKS: [usize; 4] = [BLOCK, 64, 32, 16];

/// One list per query head and 256 query tokens.
const HEAD_256: Scope = Scope { query_span: 256, heads_per_list: 1 };

/// One list per KV head and 256 query tokens.
pub(crate) const GROUP_256: Scope = Scope { query_span: 256, heads_per_list: 0 };
