//! Random steps over everything the GPU offers, skewed to edges, and their names.

use compactattn::settings::{Selector, Settings};
use compactattn::types::{Dtype, Shape};

use crate::common::case::{self, Case, Lens};
use crate::common::rng::Rng;

/// Selectors by how often they are drawn.
const SELECTORS: [Selector; 16] = [
    Selector::Dense,
    Selector::SampledExact,
    Selector::SampledExact,
    Selector::SampledExact,
    Selector::FlashPrefill,
    Selector::FlashPrefill,
    Selector::FlashPrefill,
    Selector::PooledMass,
    Selector::PooledMass,
    Selector::TwoLevel,
    Selector::XAttention,
    Selector::XAttention,
    Selector::Streaming,
    Selector::Oracle,
    Selector::External,
    Selector::External,
];

/// Case `index` of a run.
pub(crate) fn random(seed: u64, index: u64) -> Case {
    let mut rng = rng(seed, index);
    let mut shape = shape(&mut rng);
    let settings = settings(&mut rng);
    if !is_offered(&shape, &settings) {
        shape.kv_dtype = shape.dtype;
    }
    let lens = lens(&mut rng, &shape, &settings);
    Case::with(&mut rng, shape, settings, &lens)
}

/// Two to six requests, as many as tests of isolation need, nothing split: so no result depends on the others.
pub(crate) fn several(rng: &mut Rng) -> Case {
    let settings = settings(rng);
    let shape = shape_for(rng, &settings);
    let count = rng.within(2, 6);
    let each = 8_000_000 / count / (shape.num_q_heads * shape.head_dim);
    let units = [shape.page_size, settings.block_size];
    let lens: Vec<Lens> = (0..count).map(|_| one_lens(rng, units, each, true)).collect();
    Case { splits: 1, ..Case::with(rng, shape, settings, &lens) }
}

/// A shape; a third of its caches are of e4m3 where that is served, the others of the queries' type.
pub(crate) fn shape_for(rng: &mut Rng, settings: &Settings) -> Shape {
    let drawn = shape(rng);
    let plain = Shape { kv_dtype: drawn.dtype, ..drawn };
    let small = Shape { kv_dtype: Dtype::E4m3, ..drawn };
    if rng.once_in(3) && is_offered(&small, settings) { small } else { plain }
}

/// Whether the GPU serves such a cache under such settings.
fn is_offered(shape: &Shape, settings: &Settings) -> bool {
    shape.kv_dtype != Dtype::E4m3
        || (matches!(shape.head_dim, 64 | 128) && settings.selector != Selector::XAttention)
}

/// The numbers of case `index`, and of what is done with it.
pub(crate) fn rng(seed: u64, index: u64) -> Rng {
    Rng::new(seed.wrapping_mul(1_000_000_007).wrapping_add(index))
}

/// One line that says what the case is.
pub(crate) fn describe(case: &Case) -> String {
    let (s, shape) = (&case.settings, &case.shape);
    let lens: Vec<String> = case
        .cu_seqlens_q
        .windows(2)
        .zip(&case.seq_lens)
        .map(|(q, kv)| format!("{}/{kv}", q[1] - q[0]))
        .collect();
    format!(
        "{}{} b{} p{} d{} h{}/{} {}/{} {:?} {:?} {:?} q/kv {}",
        s.selector.name(),
        if s.mean_correction { "+means" } else { "" },
        s.block_size,
        shape.page_size,
        shape.head_dim,
        shape.num_q_heads,
        shape.num_kv_heads,
        shape.dtype.name(),
        shape.kv_dtype.name(),
        s.scope,
        s.keep,
        s.keep_at,
        lens.join(" "),
    )
}

pub(crate) fn shape(rng: &mut Rng) -> Shape {
    let drawn = case::shape(rng);
    let head_dim = rng.pick(&[64, 96, 128, 128, 128, 256]);
    let dtype = rng.pick(&[Dtype::Bf16, Dtype::F16]);
    Shape {
        dtype,
        kv_dtype: if drawn.kv_dtype == Dtype::E4m3 { Dtype::E4m3 } else { dtype },
        head_dim,
        sm_scale: rng.pick(&[1.0, 1.0, 0.5]) / (head_dim as f32).sqrt(),
        ..drawn
    }
}

pub(crate) fn settings(rng: &mut Rng) -> Settings {
    let drawn = case::settings(rng);
    let selector = rng.pick(&SELECTORS);
    let by_token = matches!(selector, Selector::Dense | Selector::External) && rng.once_in(4);
    let block_size = if by_token { 1 } else { rng.pick(&[16, 16, 32, 64, 64, 128, 256]) };
    Settings { selector, block_size, mean_correction: drawn.mean_correction && block_size > 1, ..drawn }
}

/// One request, several ragged ones, or prefill chunks among decode rows.
fn lens(rng: &mut Rng, shape: &Shape, settings: &Settings) -> Vec<Lens> {
    let count = rng.pick(&[1, 1, 1, 2, 3, 5, 9]);
    let mixed = count > 1 && rng.once_in(2);
    // In products of one query, key and element: what the oracle takes a nanosecond or two for.
    let budget = match rng.below(200) {
        0 => 500_000_000,
        1..=15 => 100_000_000,
        _ => 25_000_000,
    };
    let each = budget / count / (shape.num_q_heads * shape.head_dim);
    let units = [shape.page_size, settings.block_size];
    (0..count).map(|_| one_lens(rng, units, each, mixed)).collect()
}

/// One request of at most about `work = q * kv`, its lengths on and beside page and block borders.
fn one_lens(rng: &mut Rng, units: [usize; 2], work: usize, mixed: bool) -> Lens {
    if rng.once_in(15) {
        return Lens { q: 0, kv: rng.below(100) };
    }
    let wanted =
        if mixed && rng.once_in(2) { 1 } else { rng.pick(&[1, 7, 16, 63, 128, 129, 200, 513, 1024]) };
    let longest = rng.pick(&[0, 100, 500, 1000, 2000, 2000, 8000]);
    // Square, or long and thin: many blocks to choose from.
    let most_q = (work / rng.pick(&[4, 100])).isqrt();
    let (q, drawn) = (wanted.min(most_q).max(1), rng.below(longest + 1));
    let most = (work / q).saturating_sub(q).min(drawn);
    let unit = units[rng.below(2)];
    let beside = rng.pick(&[0, 1, unit - 1]);
    // The past, or the whole KV, beside a border.
    let shift = if rng.once_in(2) { 0 } else { q };
    let kv = ((most + shift) / unit * unit + beside + q).saturating_sub(shift).max(q);
    // A chunk longer than its KV: its first tokens lie before position 0 and see nothing.
    Lens { q, kv: if rng.once_in(25) { rng.below(q + 1) } else { kv } }
}
