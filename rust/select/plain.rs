//! The selectors' formulas in plain f64, one row and one key at a time, for tests to compare with.

use super::{Input, sample, score};
use crate::fixture::{Paged, k_scales, over_e4m3, round, scale_of, shape};
use crate::parallel::Parallel;
use crate::plan::{Layout, Span};
use crate::settings::{DenseRules, Selector, Settings};
use crate::summaries::{self, Summaries, SummariesMut, Which};
use crate::types::Dtype;

/// What entries that no selector may touch hold.
pub(super) const UNTOUCHED: f32 = -7.0;

/// Settings of `selector` that leave no request dense.
pub(super) fn settings(selector: Selector, block_size: usize) -> Settings {
    let dense = DenseRules { below_kv_len: 0, max_q_len: 0, prefix_tokens: 0 };
    Settings { block_size, dense, sample_rows: 5, ..Settings::of(selector) }
}

/// Ragged batches over dtypes of q and of keys, group sizes 1, 4 and 8, head sizes, and blocks smaller and larger than pages.
pub(super) fn batches() -> Vec<(Paged, usize)> {
    let bf16 = shape(2, 4, 64, 16, Dtype::Bf16);
    let f32 = shape(1, 1, 96, 64, Dtype::F32);
    let f16 = shape(1, 8, 128, 32, Dtype::F16);
    vec![
        (Paged::random(1, bf16, &[(40, 203), (1, 100), (3, 3), (0, 0)]), 32),
        (Paged::random(2, f32, &[(33, 96 + 33)]), 16),
        (Paged::random(3, f16, &[(130, 419), (17, 81)]), 64),
        (Paged::random(4, over_e4m3(bf16), &[(50, 230), (1, 70)]), 16),
    ]
}

/// The selector's scores, `[select spans, num_q_heads, max_blocks]`.
pub(super) fn scores(paged: &Paged, settings: Settings) -> (Layout, Vec<f32>) {
    let (layout, batch) = (paged.layout(settings), paged.batch());
    let mut k_mean = vec![f32::NAN; summaries::len(&layout, paged.num_pages)];
    let mut out = SummariesMut { k_mean: &mut k_mean, v_mean: None, seals: None };
    summaries::update(&layout, &batch, Which::All, &mut out, Parallel::new(1));
    let summaries = Some(Summaries { k_mean: &k_mean, v_mean: None });
    let mut scores = vec![UNTOUCHED; layout.score_len().unwrap()];
    score(&Input { layout: &layout, batch: &batch, summaries, gate: None }, &mut scores, Parallel::new(2));
    (layout, scores)
}

/// One row of scores: a query head over a span.
pub(super) struct Row<'a> {
    pub(super) paged: &'a Paged,
    pub(super) layout: &'a Layout,
    pub(super) span: Span,
    pub(super) head: usize,
}

impl Row<'_> {
    fn block_size(&self) -> usize {
        self.layout.geometry.block_size
    }

    /// The span's tokens that are scored, by this layout.
    pub(super) fn sampled(&self) -> Vec<usize> {
        let batch = self.paged.batch();
        let input = Input { layout: self.layout, batch: &batch, summaries: None, gate: None };
        sample::tokens(&input, &self.span, self.head / self.layout.shape.group_size())
    }

    pub(super) fn past_blocks(&self) -> usize {
        self.span.past / self.block_size()
    }

    fn key(&self, token: usize) -> Vec<f64> {
        let shape = &self.paged.shape;
        let kv_head = self.head / shape.group_size();
        let at = token * shape.num_kv_heads + kv_head;
        let k = &self.paged.requests[self.span.req].k[at * shape.head_dim..][..shape.head_dim];
        // What the cache holds times its scale, exactly: rounding decides what a mean is.
        let scale = scale_of(k_scales(shape), kv_head);
        let stored = |&x: &f32| f64::from(round(shape.kv_dtype, x / scale));
        k.iter().map(|x| stored(x) * f64::from(scale)).collect()
    }

    /// As the summaries keep it, rounded to the queries' dtype.
    #[expect(clippy::cast_possible_truncation, reason = "means are stored as f32")]
    fn mean_key(&self, block: usize) -> Vec<f64> {
        let n = self.block_size();
        let keys: Vec<_> = (block * n..(block + 1) * n).map(|t| self.key(t)).collect();
        let mean = |x: usize| keys.iter().map(|k| k[x]).sum::<f64>() / n as f64;
        (0..keys[0].len()).map(|x| round(self.paged.shape.dtype, mean(x) as f32).into()).collect()
    }

    /// `exp(q_i . key * sm_scale)` for the span's token `i`.
    fn weight(&self, i: usize, key: &[f64]) -> f64 {
        let shape = &self.paged.shape;
        let at = (self.span.first + i) * shape.num_q_heads + self.head;
        let q = &self.paged.requests[self.span.req].q[at * shape.head_dim..][..shape.head_dim];
        let dot: f64 = q.iter().zip(key).map(|(&q, k)| f64::from(q) * k).sum();
        (dot * f64::from(shape.sm_scale)).exp()
    }

    /// Weight of the part of `block` that token `i` sees, by its keys.
    pub(super) fn exact(&self, i: usize, block: usize) -> f64 {
        let end = ((block + 1) * self.block_size()).min(self.span.visible(i));
        (block * self.block_size()..end).map(|t| self.weight(i, &self.key(t))).sum()
    }

    /// Weight of `block` by its mean key, or by its keys where token `i` does not see it whole.
    pub(super) fn pooled(&self, i: usize, block: usize) -> f64 {
        if !self.sees(i, block) {
            return self.exact(i, block);
        }
        self.block_size() as f64 * self.weight(i, &self.mean_key(block))
    }

    /// Whether token `i` sees the whole block.
    fn sees(&self, i: usize, block: usize) -> bool {
        (block + 1) * self.block_size() <= self.span.visible(i)
    }

    /// Each past block's share of the weights `cell(token, block)`, averaged over `tokens`.
    pub(super) fn mass(&self, tokens: &[usize], cell: impl Fn(usize, usize) -> f64) -> Vec<f64> {
        let mut mass = vec![0.0; self.past_blocks()];
        for &i in tokens {
            let cells: Vec<f64> =
                (0..self.span.visible(i).div_ceil(self.block_size())).map(|j| cell(i, j)).collect();
            let total: f64 = cells.iter().sum();
            for (mass, cell) in mass.iter_mut().zip(cells) {
                *mass += cell / total / tokens.len() as f64;
            }
        }
        mass
    }

    /// FlashPrefill's relative scores; the best block is looked for among the first `blocks`.
    pub(super) fn relative(&self, blocks: usize) -> Vec<f64> {
        let sum = |j: usize| -> f64 {
            let rows = (0..self.span.len).filter(|&i| self.sees(i, j));
            let key = self.mean_key(j);
            rows.map(|i| self.weight(i, &key)).sum()
        };
        let sums: Vec<f64> = (0..blocks).map(sum).collect();
        let best = sums.iter().copied().fold(0.0, f64::max);
        sums[..self.past_blocks()].iter().map(|s| s / best).collect()
    }
}

/// Checks every row of scores against `want`, and that nothing else was written.
///
/// Tolerance: a logit sums `head_dim <= 128` products in f32, off by at most `128 * 2^-24 * sum |q k| * sm_scale`.
/// The sum is below 12 for these normal vectors, so a weight is off by 1e-4 relative and a share, a quotient of two,
/// by twice that.
pub(super) fn assert_scores(paged: &Paged, settings: Settings, want: impl Fn(&Row) -> Vec<f64>) {
    let (layout, scores) = scores(paged, settings);
    let mut rows = scores.chunks(layout.max_blocks());
    for span in layout.select_spans(&paged.batch()) {
        for head in 0..paged.shape.num_q_heads {
            let got = rows.next().unwrap();
            let row = Row { paged, layout: &layout, span, head };
            let want = if span.dense { Vec::new() } else { want(&row) };
            for (j, (&got, want)) in got.iter().zip(&want).enumerate() {
                let off = (f64::from(got) - want).abs();
                assert!(off <= 2e-4 * want, "{span:?} head {head} block {j}: {got}, not {want}");
            }
            assert!(got[want.len()..].iter().all(|&x| x == UNTOUCHED), "{span:?} head {head}");
        }
    }
    assert!(rows.all(|row| row.iter().all(|&x| x == UNTOUCHED)));
}
