//! Online softmax on [`LANES`] query rows at once, one row a lane: no lane ever reads another.
//!
//! Scores are kept transposed, `[stream tokens, LANES]`, so that row maxima and sums are plain vector operations.
//! The running maximum and the rescaling of what is summed so far follow Milakov and Gimelshein, arXiv 1805.02867.

use multiversion::multiversion;

use crate::math;

/// Query rows worked on together.
pub(super) const LANES: usize = 32;

/// One value a query row.
pub(super) type Lane<T = f32> = [T; LANES];

/// What a softmax knows of each row so far.
#[derive(Clone, Debug)]
pub(super) struct Running {
    /// Largest raw score (before `sm_scale`); −inf before the first.
    pub(super) max: Lane,
    /// Sum of `exp((score - max) * sm_scale)`, over what was seen.
    pub(super) sum: Lane,
}

/// How raw scores of a tile become weights.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weigh<'a> {
    /// `sm_scale * log2(e)`.
    pub(super) scale_log2: f32,
    /// Tokens that each column stands for: the factor on its weights.
    pub(super) tokens: &'a [f32],
}

/// Scores `-inf` from each row's `limit` on.
#[multiversion(targets("x86_64+avx512f+avx512vl+fma", "x86_64+avx2+fma", "aarch64+neon"))]
pub(super) fn mask(scores: &mut [Lane], limit: &Lane<u32>) {
    for (row, c) in scores.iter_mut().zip(0_u32..) {
        for (s, &limit) in row.iter_mut().zip(limit) {
            *s = if c < limit { *s } else { f32::NEG_INFINITY };
        }
    }
}

/// Turns scores into weights in place; the factor on everything summed before.
#[multiversion(targets("x86_64+avx512f+avx512vl+fma", "x86_64+avx2+fma", "aarch64+neon"))]
pub(super) fn softmax(scores: &mut [Lane], weigh: Weigh, running: &mut Running) -> Lane {
    let mut max = running.max;
    for row in scores.iter() {
        for (max, &s) in max.iter_mut().zip(row) {
            // A NaN score is passed over here and makes its own weight NaN below.
            *max = if s > *max { s } else { *max };
        }
    }
    // A row that has seen nothing has no maximum to subtract: its weights are exp2(-inf) = 0 from any base.
    let base = max.map(|m| if m == f32::NEG_INFINITY { 0.0 } else { m });
    let mut factor = [0.0; LANES];
    for x in 0..LANES {
        factor[x] = math::exp2((running.max[x] - base[x]) * weigh.scale_log2);
    }
    let mut sum = [0.0; LANES];
    for (row, &tokens) in scores.iter_mut().zip(weigh.tokens) {
        for x in 0..LANES {
            let p = math::exp2((row[x] - base[x]) * weigh.scale_log2) * tokens;
            row[x] = p;
            sum[x] += p;
        }
    }
    for x in 0..LANES {
        running.sum[x] = running.sum[x].mul_add(factor[x], sum[x]);
    }
    running.max = max;
    factor
}

/// Multiplies every row of `out [head_dim, LANES]` by its lane's factor.
#[multiversion(targets("x86_64+avx512f+avx512vl+fma", "x86_64+avx2+fma", "aarch64+neon"))]
pub(super) fn rescale(out: &mut [Lane], factor: &Lane) {
    for row in out {
        for (o, f) in row.iter_mut().zip(factor) {
            *o *= f;
        }
    }
}

/// `yes` or `no`; a choice of lanes, not a branch.
#[inline(always)]
fn either(which: bool, yes: f32, no: f32) -> f32 {
    if which { yes } else { no }
}

/// `out [head_dim, LANES] += values [n, head_dim]ᵀ weights [n, LANES]` for columns `range`, where a lane takes only
/// columns below its `limit`: what it does not see it does not even multiply by 0, so a NaN there stays there.
#[multiversion(targets("x86_64+avx512f+avx512vl+fma", "x86_64+avx2+fma", "aarch64+neon"))]
pub(super) fn add_values_below(
    limit: &Lane<u32>,
    range: std::ops::Range<usize>,
    (weights, values): (&[Lane], &[f32]),
    out: &mut [Lane],
) {
    let head_dim = out.len();
    let columns = weights.iter().zip(values.chunks_exact(head_dim)).zip(0_u32..);
    for ((weights, values), c) in columns.take(range.end).skip(range.start) {
        let mut sees = [false; LANES];
        for x in 0..LANES {
            sees[x] = c < limit[x];
        }
        for (out, &v) in out.iter_mut().zip(values) {
            for x in 0..LANES {
                out[x] = either(sees[x], weights[x].mul_add(v, out[x]), out[x]);
            }
        }
    }
}
