//! The library against its f64 reference, on a small made-up sequence: selection and attention.

use compactattn::reference::{self, Request};
use compactattn::settings::{Keep, Scope, Selector, Settings};
use compactattn::{Parallel, Result, mask};

use crate::contender::even;
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

/// Scores, attends and compares.
///
/// # Errors
/// Those of the stages.
pub(crate) fn run() -> Result<SelfTest> {
    let timed = stages::timed(compare)?;
    Ok(SelfTest { worst: timed.value, ms: timed.ms })
}

fn compare() -> Result<f64> {
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
        keep: Keep::Density(0.4),
        ..even(Selector::SampledExact, Scope::HEAD_CHUNK)
    };
    let prefill = Prefill::run(&trace, &trace.layers[0], &engine, &[64])?;
    let layout = prefill.layout(&settings)?;
    let batch = prefill.batch()?;
    let requests = Request::gather_all(&batch);

    let scores = stages::score(&prefill, &layout)?.value;
    let want_scores = reference::select::scores(&layout, &requests, 0.0);
    let mut worst = Worst::default();
    for (row, want) in scores.chunks(layout.max_blocks()).zip(want_scores.iter().flat_map(|span| &span.rows))
    {
        for (&got, &want) in row.iter().zip(want) {
            worst.add(f64::from(got) - want, SCORE_BOUND);
        }
    }

    let lists = stages::unite(&prefill, &layout, &scores)?.bits;
    let blocks = layout.geometry.blocks(prefill.limits.max_kv_len);
    let of_row = |bits: &[u32]| (0..blocks).map(|j| mask::get(bits, j)).collect();
    let rows: Vec<Vec<bool>> = lists.chunks(layout.mask_words()).map(of_row).collect();
    let out = stages::attend(&prefill, &layout, &lists)?.value;
    let want = reference::attend::attend(&layout, &requests, &rows);
    let (heads, head_dim) = (layout.shape.num_q_heads, layout.shape.head_dim);
    for (i, got) in out.chunks_exact(head_dim).enumerate() {
        let want = &want[i % heads][i / heads];
        // A logit is a sum of head_dim products, each rounded against its own size (at most `reach` in all); it moves
        // its weight by as much, and numerator and denominator both. The sums over keys round `terms` times more.
        let relative = EPSILON * (2.0 * head_dim as f64 * want.reach + 2.0 * want.terms as f64);
        for (x, &got) in got.iter().enumerate() {
            worst.add(f64::from(got) - want.out[x], relative * want.spread[x]);
        }
    }
    Ok(worst.0)
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
    fn a_difference_beyond_its_bound_or_a_nan_fails() {
        for difference in [2e-3, f64::NAN] {
            let mut worst = Worst::default();
            worst.add(difference, 1e-3);
            worst.add(0.0, 1e-3);
            assert!(!SelfTest { worst: worst.0, ms: 0.0 }.passed());
        }
    }
}
