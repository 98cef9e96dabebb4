//! The library against its f64 reference, on a small made-up sequence: selection and attention.

use compactattn::plan::Layout;
use compactattn::reference::attend::Row;
use compactattn::reference::{self, Request};
use compactattn::settings::{Keep, Scope, Selector, Settings};
use compactattn::{Parallel, Result, mask};

use crate::contender::even;
use crate::gpu::Gpu;
use crate::pool::KvLayout;
use crate::prefill::{Engine, Prefill};
use crate::{stages, synthetic};

/// How the comparison went.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SelfTest {
    /// The largest difference as a multiple of what rounding explains; NaN where one was.
    pub(crate) worst: f64,
    /// How long both sides took.
    pub(crate) ms: f64,
}

impl SelfTest {
    /// Whether rounding explains every difference.
    pub(crate) fn passed(&self) -> bool {
        self.worst <= 1.0
    }
}

/// Scores, attends and compares, on the CPU.
///
/// # Errors
/// Those of the stages.
pub(crate) fn run() -> Result<SelfTest> {
    let timed = stages::timed(|| Subject::new()?.on_cpu())?;
    Ok(SelfTest { worst: timed.value, ms: timed.ms })
}

/// The same on the GPU: its lists must be the CPU's, its out and lse the reference's.
///
/// # Errors
/// Those of the stages and of [`Gpu::forward`].
pub(crate) fn run_on(gpu: &Gpu) -> Result<SelfTest> {
    let timed = stages::timed(|| Subject::new()?.on_gpu(gpu))?;
    Ok(SelfTest { worst: timed.value, ms: timed.ms })
}

/// What is compared: one layer of a made-up sequence under one setting.
struct Subject {
    prefill: Prefill,
    settings: Settings,
    layout: Layout,
}

impl Subject {
    fn new() -> Result<Self> {
        let trace = synthetic::trace(1, 900, 100);
        let engine = Engine {
            page_size: 16,
            kv_layout: KvLayout::Nhd,
            chunk: 128,
            sm_scale: None,
            parallel: Parallel::new(0),
            gate: None,
        };
        let settings = Settings {
            block_size: 64,
            // Cut where scores are far apart, so that two right answers have the same lists.
            keep: Keep::Density(0.3),
            ..even(Selector::SampledExact, Scope::HEAD_CHUNK)
        };
        let prefill = Prefill::run(&trace, &trace.layers[0], &engine, &[64])?;
        let layout = prefill.layout(&settings)?;
        Ok(Self { prefill, settings, layout })
    }

    fn on_cpu(&self) -> Result<f64> {
        let Self { prefill, layout, .. } = self;
        let requests = Request::gather_all(&prefill.batch()?);
        let scores = stages::score(prefill, layout)?.value;
        let want_scores = reference::select::scores(layout, &requests, 0.0);
        let mut worst = Worst::default();
        let rows = want_scores.iter().flat_map(|span| &span.rows);
        for (row, want) in scores.chunks(layout.max_blocks()).zip(rows) {
            for (&got, &want) in row.iter().zip(want) {
                worst.add(f64::from(got) - want, SCORE_BOUND);
            }
        }
        let lists = stages::unite(prefill, layout, &scores)?.bits;
        let out = stages::attend(prefill, layout, &lists)?.value;
        let want = self.reference(&requests, &lists);
        let (heads, head_dim) = (layout.shape.num_q_heads, layout.shape.head_dim);
        for (i, got) in out.chunks_exact(head_dim).enumerate() {
            let want = &want[i % heads][i / heads];
            let relative = 2.0 * weight_error(head_dim, want);
            for (x, &got) in got.iter().enumerate() {
                worst.add(f64::from(got) - want.out[x], relative * want.spread[x]);
            }
        }
        Ok(worst.0)
    }

    fn on_gpu(&self, gpu: &Gpu) -> Result<f64> {
        let Self { prefill, layout, .. } = self;
        let ran = gpu.forward(prefill, &self.settings, None)?;
        let mut worst = Worst::default();
        let scores = stages::score(prefill, layout)?.value;
        if ran.lists != stages::unite(prefill, layout, &scores)?.bits {
            worst.add(f64::INFINITY, 1.0);
        }
        let want = self.reference(&Request::gather_all(&prefill.batch()?), &ran.lists);
        let (heads, head_dim) = (layout.shape.num_q_heads, layout.shape.head_dim);
        let out = ran.forward.out.to_f32();
        for (i, got) in out.chunks_exact(head_dim).enumerate() {
            let (token, head) = (i / heads, i % heads);
            let want = &want[head][token];
            // Tensor cores cut what f32 cannot hold, which is twice a rounding; a weight is an exponential, rescaled at
            // most twice, and rounded to bf16 before it meets its value; the result is rounded to bf16.
            let weight = 2.0 * weight_error(head_dim, want) + 3.0 * EXP;
            let lse = f64::from(ran.forward.lse[head * prefill.q_len() + token]);
            worst.add(lse - want.lse, weight + 2.0 * EPSILON * (want.lse.abs() + 1.0));
            for (x, &got) in got.iter().enumerate() {
                let computed = (2.0 * weight + BF16) * want.spread[x];
                worst.add(f64::from(got) - want.out[x], computed + BF16 * (want.out[x].abs() + computed));
            }
        }
        Ok(worst.0)
    }

    /// Rows `[num_q_heads][total_q]` over `lists`.
    fn reference(&self, requests: &[Request], lists: &[u32]) -> Vec<Vec<Row>> {
        let blocks = self.layout.geometry.blocks(self.prefill.limits.max_kv_len);
        let of_row = |bits: &[u32]| (0..blocks).map(|j| mask::get(bits, j)).collect();
        // The plan has room for a longer chunk, and so for more lists than the step's.
        let lists = lists.chunks(self.layout.mask_words()).map(of_row);
        reference::attend::attend(&self.layout, requests, &lists.collect::<Vec<Vec<bool>>>())
    }
}

/// How far a weight may be off: a logit is a sum of `head_dim` products, each rounded against its own size (at most
/// `reach` in all), and moves its weight by as much; the sum over keys rounds `terms` times more. Numerator and
/// denominator of an output both carry it.
fn weight_error(head_dim: usize, want: &Row) -> f64 {
    EPSILON * (head_dim as f64 * want.reach + want.terms as f64)
}

/// The largest difference over its bound; NaN once one was NaN.
#[derive(Default)]
struct Worst(f64);

impl Worst {
    fn add(&mut self, difference: f64, bound: f64) {
        let ratio = difference.abs() / bound;
        self.0 = if ratio.is_nan() || self.0.is_nan() { f64::NAN } else { self.0.max(ratio) };
    }
}

/// f32's unit roundoff.
const EPSILON: f64 = 1.0 / (1 << 24) as f64;

/// bf16's.
const BF16: f64 = 1.0 / 256.0;

/// Relative error of an exponential in base 2.
const EXP: f64 = 4e-7;

/// A score is a share of mass in [0, 1]: logits of at most |q| |k| / 8 <= 1.5^2 * 64 / 8 = 18, rounded over 64
/// products, and a sum over at most 900 keys, twice (numerator and denominator).
const SCORE_BOUND: f64 = EPSILON * 2.0 * (64.0 * 18.0 + 900.0);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_agrees_with_its_reference() {
        let test = run().unwrap();
        assert!(test.passed(), "{test:?}");
    }

    #[test]
    #[expect(clippy::cast_possible_truncation, reason = "scores are f32")]
    fn the_lists_do_not_hang_on_the_last_bits_of_scores() {
        let Subject { prefill, layout, .. } = Subject::new().unwrap();
        let scores = stages::score(&prefill, &layout).unwrap().value;
        let lists = stages::unite(&prefill, &layout, &scores).unwrap().bits;
        for shift in [1.0, -1.0] {
            // Neighbours in opposite directions, each by what two right answers may differ.
            let sign = |i: usize| if i.is_multiple_of(2) { shift } else { -shift };
            let moved = scores.iter().enumerate().map(|(i, x)| x + sign(i) * 2.0 * SCORE_BOUND as f32);
            let moved: Vec<f32> = moved.collect();
            assert_eq!(stages::unite(&prefill, &layout, &moved).unwrap().bits, lists);
        }
    }

    #[test]
    fn a_difference_beyond_its_bound_or_a_nan_fails() {
        for difference in [2e-3, f64::NAN] {
            let mut worst = Worst::default();
            worst.add(difference, 1e-3);
            worst.add(0.0, 1e-3);
            assert!(!SelfTest { worst: worst.0, ms: 0.0 }.passed());
        }
    }
}
