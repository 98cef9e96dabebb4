//! Fixed cases: every kernel in miniature, shapes that are repeated, and their settings.

use compactattn::settings::{DenseRules, Keep, KeepAt, Scope, Selector, Settings};
use compactattn::types::{Dtype, Shape};

use crate::common::case::{Case, Lens};
use crate::common::rng::Rng;

/// The published settings of a selector with blocks of that size, and no request dense by policy.
pub(crate) fn settings(selector: Selector, block_size: usize) -> Settings {
    let published = Settings::of(selector);
    Settings {
        block_size,
        dense: DenseRules { below_kv_len: 0, max_q_len: 0, prefix_tokens: 0 },
        keep: match published.keep {
            // Small contexts spread their mass; 0.95 of it would keep all there is.
            Keep::Mass(_) => Keep::Mass(0.6),
            keep => keep,
        },
        density_guard: 1.0,
        xattention_stride: 8,
        ..published
    }
}

/// Heads, `[num_q_heads, num_kv_heads]`, and sizes.
pub(crate) fn shape(heads: [usize; 2], head_dim: usize, page_size: usize, dtype: Dtype) -> Shape {
    Shape {
        num_q_heads: heads[0],
        num_kv_heads: heads[1],
        head_dim,
        page_size,
        dtype,
        kv_dtype: dtype,
        sm_scale: 1.0 / (head_dim as f32).sqrt(),
    }
}

pub(crate) const SELECTORS: [Selector; 9] = [
    Selector::Dense,
    Selector::SampledExact,
    Selector::FlashPrefill,
    Selector::PooledMass,
    Selector::TwoLevel,
    Selector::XAttention,
    Selector::Streaming,
    Selector::Oracle,
    Selector::External,
];

/// Forty small cases: each selector (external twice: scores and masks) with each head_dim, all else in rotation; and
/// nine of them over e4m3 caches, one of these with mean correction.
pub(crate) fn miniatures() -> Vec<Case> {
    let over_e4m3 = [0, 1, 3, 4, 7, 20, 21, 23, 24].map(|i| miniature(i, true));
    (0..40).map(|i| miniature(i, false)).chain(over_e4m3).collect()
}

fn miniature(i: usize, over_e4m3: bool) -> Case {
    let mut rng = Rng::new(i as u64);
    let (selector, d) = (SELECTORS[(i % 10).min(8)], i / 10);
    let turn = i % 10 + d;
    let dtype = [Dtype::Bf16, Dtype::F16][turn % 2];
    let heads = [[4, 2], [2, 2], [7, 1], [8, 1], [6, 2]][turn % 5];
    let mut shape = shape(heads, [64, 96, 128, 256][d], [16, 32, 64, 128, 256][turn % 5], dtype);
    let mut settings = settings(selector, [16, 32, 64, 16][turn % 4]);
    if over_e4m3 {
        shape.kv_dtype = Dtype::E4m3;
        settings.mean_correction = i == 21;
    }
    settings.scope.query_span = [0, 128][turn % 2];
    settings.scope.heads_per_list = [0, 1, 2][turn % 3];
    settings.keep_at = [KeepAt::Row, KeepAt::List][turn / 2 % 2];
    settings.keep = [settings.keep, Keep::Density(0.4), Keep::Mass(0.6)][turn % 3];
    if turn % 5 == 1 {
        // What is kept anyway holds the mass wanted, and the floor asks the rule's ranking for more.
        (settings.keep, settings.min_density) = (Keep::Mass(0.5), 0.3);
    }
    let lens = [
        vec![Lens { q: 33, kv: 33 + 160 + turn }],
        vec![Lens { q: 1, kv: 130 }, Lens { q: 20, kv: 117 }, Lens { q: 0, kv: 5 }],
        vec![Lens { q: 130, kv: 130 + 65 }],
        vec![Lens { q: 5, kv: 3 }, Lens { q: 17, kv: 177 }],
    ];
    Case::with(&mut rng, shape, settings, &lens[turn % 4])
}

/// Twenty shapes to repeat: lists that many CTAs share, lists that few do, decode rows, every head_dim, type and selector.
pub(crate) fn repeated() -> Vec<(&'static str, Case)> {
    let decode: Vec<Lens> = (0..9).map(|i| Lens { q: 1, kv: 1500 + 170 * i }).collect();
    let ragged = vec![Lens { q: 200, kv: 1111 }, Lens { q: 1, kv: 900 }, Lens { q: 63, kv: 63 }];
    let one = |q, kv| vec![Lens { q, kv }];
    let (bf16, f16) = (Dtype::Bf16, Dtype::F16);
    let small = |heads, d, page| Shape { kv_dtype: Dtype::E4m3, ..shape(heads, d, page, bf16) };
    let by_row = |settings| Settings { keep_at: KeepAt::Row, ..settings };
    let per_head = |settings| Settings { scope: Scope::HEAD_128, ..settings };
    let corrected = |settings| Settings { mean_correction: true, ..settings };
    let (sampled, pooled) = (settings(Selector::SampledExact, 128), settings(Selector::PooledMass, 32));
    let (flash, dense) = (settings(Selector::FlashPrefill, 64), settings(Selector::Dense, 128));
    let (oracle, sparse) = (settings(Selector::Oracle, 64), settings(Selector::XAttention, 64));
    let (two_level, streaming) = (settings(Selector::TwoLevel, 32), settings(Selector::Streaming, 64));
    let scenes = [
        ("split KV, one list", shape([4, 1], 128, 64, bf16), sampled, one(64, 4096)),
        ("dense, one list over all CTAs", shape([8, 1], 128, 16, f16), dense, one(16, 8000)),
        ("lists per head and 128 tokens", shape([8, 2], 128, 128, bf16), per_head(flash), one(512, 2048)),
        ("decode rows", shape([8, 2], 64, 16, bf16), sampled, decode.clone()),
        ("ragged, d256", shape([4, 2], 256, 32, f16), oracle, ragged.clone()),
        ("split KV over e4m3", small([8, 2], 128, 32), pooled, ragged.clone()),
        ("two_level, d96", shape([6, 2], 96, 256, bf16), two_level, ragged.clone()),
        ("xattention, d64", shape([8, 2], 64, 64, f16), sparse, one(300, 1800)),
        ("xattention, lists per head", shape([4, 4], 128, 16, bf16), per_head(sparse), ragged.clone()),
        ("flashprefill by row, d96", shape([7, 1], 96, 64, f16), by_row(flash), one(260, 1500)),
        ("streaming, d256", shape([2, 2], 256, 64, bf16), streaming, ragged.clone()),
        ("means for what is skipped", shape([8, 2], 128, 32, bf16), corrected(pooled), one(130, 2000)),
        ("means over e4m3", small([4, 2], 64, 64), corrected(flash), ragged.clone()),
        ("dense decode over e4m3", small([8, 1], 128, 16), dense, decode.clone()),
        ("sampled by row over e4m3", small([16, 2], 64, 128), by_row(sampled), one(129, 3000)),
        ("group of 16", shape([16, 1], 128, 16, bf16), sampled, one(100, 2500)),
        ("pooled, odd groups", shape([14, 2], 64, 16, f16), pooled, ragged.clone()),
        ("oracle by row", shape([4, 2], 128, 256, f16), by_row(oracle), one(190, 1300)),
        ("two_level per head, d128", shape([8, 4], 128, 32, bf16), per_head(two_level), one(400, 1700)),
        ("decode, d256", shape([4, 1], 256, 16, bf16), sampled, decode),
    ];
    scenes
        .map(|(name, shape, settings, lens)| (name, Case::with(&mut Rng::new(7), shape, settings, &lens)))
        .into()
}
