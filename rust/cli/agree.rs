//! How far the GPU's outputs may be from the CPU's over the same lists, and how far they are.
//!
//! Both sides are judged by what their arithmetic rounds. Sums of `n` roundings of independent signs stay within
//! `LAMBDA sqrt(n) u` except with probability `2 exp(-LAMBDA^2 / 2)` (Higham and Mary 2019, theorem 2.4).

use compactattn::Result;
use compactattn::batch::Batch;
use compactattn::types::Dtype;

use crate::prefill::Prefill;

/// How two outputs compare; `max` of several.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Agreement {
    /// Forward passes compared.
    pub(crate) passes: usize,
    /// Those whose lists were not the CPU's own.
    pub(crate) other_lists: usize,
    /// Blocks that only one side's lists hold: scores on either side of a threshold, a rounding apart.
    pub(crate) other_blocks: u64,
    /// Largest `||a - b|| / ||b||` of a row (one token, one head).
    pub(crate) relative: f64,
    /// Largest difference of an element as a share of what rounding explains; NaN where an output was.
    pub(crate) of_bound: f64,
}

impl Agreement {
    /// Both together.
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            passes: self.passes + other.passes,
            other_lists: self.other_lists + other.other_lists,
            other_blocks: self.other_blocks + other.other_blocks,
            relative: larger(self.relative, other.relative),
            of_bound: larger(self.of_bound, other.of_bound),
        }
    }

    /// Adds how the lists compare.
    pub(crate) fn with_lists(self, gpu: &[u32], cpu: &[u32]) -> Self {
        let blocks = gpu.iter().zip(cpu).map(|(a, b)| u64::from((a ^ b).count_ones())).sum();
        Self { other_lists: (gpu != cpu).into(), other_blocks: blocks, ..self }
    }

    /// Whether rounding explains every difference of the outputs.
    pub(crate) fn holds(&self) -> bool {
        self.of_bound <= 1.0
    }
}

/// Compares `[total_q, num_q_heads, head_dim]` of the GPU, rounded to the layer's type, with the CPU's in f32.
///
/// # Errors
/// Those of [`Prefill::batch`].
pub(crate) fn compare(prefill: &Prefill, gpu: &[f32], cpu: &[f32]) -> Result<Agreement> {
    let (batch, shape) = (prefill.batch()?, prefill.shape);
    let extents: Vec<_> = (0..shape.num_kv_heads).map(|head| Extent::of(&batch, head)).collect();
    let mut all = Agreement { passes: 1, ..Agreement::default() };
    let rows = gpu.chunks_exact(shape.head_dim).zip(cpu.chunks_exact(shape.head_dim));
    let mut q = vec![0.0; shape.head_dim];
    for (i, (a, b)) in rows.enumerate() {
        let (token, head) = (i / shape.num_q_heads, i % shape.num_q_heads);
        let extent = &extents[head / shape.group_size()];
        batch.q().load(token, head, &mut q);
        let reach = norm(&q) * extent.longest_key * f64::from(shape.sm_scale);
        let bound = Bound::of(shape.dtype, shape.head_dim, prefill.limits.max_kv_len, reach);
        let mut apart = 0.0;
        for ((&a, &b), &most) in a.iter().zip(b).zip(&extent.largest_value) {
            let (difference, b) = (f64::from(a) - f64::from(b), f64::from(b));
            all.of_bound = larger(all.of_bound, difference.abs() / bound.at(b.abs(), most));
            apart += difference * difference;
        }
        all.relative = larger(all.relative, apart.sqrt() / norm(b));
    }
    Ok(all)
}

/// What errors of one KV head scale with.
struct Extent {
    longest_key: f64,
    /// `[head_dim]`: no weighted mean of |v| is larger.
    largest_value: Vec<f64>,
}

impl Extent {
    fn of(batch: &Batch, kv_head: usize) -> Self {
        let head_dim = batch.shape().head_dim;
        let mut row = vec![0.0; head_dim];
        let mut extent = Self { longest_key: 0.0, largest_value: vec![0.0; head_dim] };
        for token in 0..batch.kv_len(0) {
            batch.load_k(0, kv_head, token..token + 1, &mut row);
            extent.longest_key = extent.longest_key.max(norm(&row));
            batch.load_v(0, kv_head, token..token + 1, &mut row);
            for (most, &x) in extent.largest_value.iter_mut().zip(&row) {
                *most = most.max(f64::from(x).abs());
            }
        }
        extent
    }
}

/// Errors of one row of outputs.
struct Bound {
    /// Of both sides' weights and sums, relative to the largest value.
    computed: f64,
    /// Of the output's rounding, relative to the output.
    rounding: f64,
}

impl Bound {
    /// A weight is off by its logit's error (a dot product of `head_dim` terms, the scale and the change of base,
    /// against `reach`, which no |logit| exceeds), exp's, and a sum's of at most `terms` weights; numerator and
    /// denominator both. The GPU besides cuts sums instead of rounding them (twice the unit), rescales weights twice and
    /// rounds them to the values' type; f16's smallest weights are off by half of its smallest step.
    fn of(dtype: Dtype, head_dim: usize, terms: usize, reach: f64) -> Self {
        let walk = LAMBDA * ((terms + 8) as f64).sqrt();
        let logit = LAMBDA * ((head_dim + 8) as f64).sqrt() * reach;
        let weight = |unit: f64, exp: f64| 2.0 * ((logit + walk) * unit + exp);
        let (rounding, smallest) = match dtype {
            Dtype::F16 => (1.0 / 2048.0, walk / (1 << 25) as f64),
            _ => (1.0 / 256.0, 0.0),
        };
        let gpu = weight(2.0 * UNIT, 3.0 * EXP) + rounding + smallest;
        Self { computed: gpu + weight(UNIT, EXP), rounding }
    }

    /// Of an element `out`, where no |v| is larger than `most`.
    fn at(&self, out: f64, most: f64) -> f64 {
        let computed = self.computed * most;
        computed + self.rounding * (out + computed) + F16_STEP
    }
}

fn norm(x: &[f32]) -> f64 {
    x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}

/// The larger one, NaN if either is.
fn larger(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

/// Unit roundoff of f32.
const UNIT: f64 = 1.0 / (1 << 24) as f64;
/// Relative error of an exponential in base 2, on either side.
const EXP: f64 = 4e-7;
/// Half of f16's smallest step.
const F16_STEP: f64 = 3e-8;
const LAMBDA: f64 = 8.0;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contender::even;
    use crate::pool::KvLayout;
    use crate::prefill::Engine;
    use crate::{stages, synthetic};
    use compactattn::Parallel;
    use compactattn::settings::{Keep, Scope, Selector, Settings};
    use half::bf16;

    /// A small layer and its output over the lists of `keep`.
    fn attended(keep: f32) -> (Prefill, Vec<f32>) {
        let trace = synthetic::trace(1, 900, 100);
        let engine = Engine {
            page_size: 16,
            kv_layout: KvLayout::Nhd,
            chunk: 128,
            sm_scale: None,
            parallel: Parallel::new(1),
            gate: None,
        };
        let prefill = Prefill::run(&trace, &trace.layers[0], &engine, &[128]).unwrap();
        let settings =
            Settings { keep: Keep::Density(keep), ..even(Selector::SampledExact, Scope::HEAD_CHUNK) };
        let layout = prefill.layout(&settings).unwrap();
        let scores = stages::score(&prefill, &layout).unwrap().value;
        let lists = stages::unite(&prefill, &layout, &scores).unwrap().bits;
        let out = stages::attend(&prefill, &layout, &lists).unwrap().value;
        (prefill, out)
    }

    #[test]
    fn one_rounding_is_explained_and_one_block_more_or_a_nan_is_not() {
        let (prefill, out) = attended(0.5);
        let rounded: Vec<f32> = out.iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
        let agreement = compare(&prefill, &rounded, &out).unwrap();
        assert!(agreement.holds() && agreement.relative < 1.0 / 256.0, "{agreement:?}");
        let other = attended(0.7).1;
        assert!(!compare(&prefill, &other, &out).unwrap().holds());
        let mut broken = rounded;
        broken[777] = f32::NAN;
        assert!(!agreement.and(compare(&prefill, &broken, &out).unwrap()).holds());
    }
}
