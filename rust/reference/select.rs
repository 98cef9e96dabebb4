//! Scores of every past block, selector by selector, from the definitions in the selectors' module docs.

use super::{Chunk, Request, block_means, chunks, dot, select_step, softmax};
use crate::plan::Layout;
use crate::settings::Selector;

/// Scores `[select spans][num_q_heads][past blocks]`; a dense span's rows are empty.
pub type Scores = Vec<Vec<Vec<f64>>>;

/// Scores every request.
#[must_use]
pub fn scores(layout: &Layout, requests: &[Request]) -> Scores {
    let heads = layout.shape.num_q_heads;
    let score = |chunk: &Chunk| -> Vec<Vec<f64>> {
        if chunk.dense {
            return vec![Vec::new(); heads];
        }
        let request = &requests[chunk.req];
        let kv_heads = 0..layout.shape.num_kv_heads;
        let rows = kv_heads.flat_map(|kv_head| {
            let group = layout.shape.group_size();
            let at = At { layout, request, chunk, kv_head, heads: kv_head * group..(kv_head + 1) * group };
            at.scores()
        });
        rows.collect()
    };
    chunks(layout, requests, select_step(layout)).iter().map(score).collect()
}

/// One span of one request, for the query heads of one KV head.
pub(super) struct At<'a> {
    pub(super) layout: &'a Layout,
    pub(super) request: &'a Request,
    pub(super) chunk: &'a Chunk,
    pub(super) kv_head: usize,
    pub(super) heads: std::ops::Range<usize>,
}

impl At<'_> {
    /// `[group_size][past blocks]`.
    fn scores(&self) -> Vec<Vec<f64>> {
        let each = |score: &dyn Fn(usize) -> Vec<f64>| self.heads.clone().map(score).collect();
        match self.layout.settings.selector {
            Selector::Streaming => each(&|_| vec![0.0; self.past_blocks()]),
            Selector::FlashPrefill => each(&|head| self.flashprefill(head)),
            Selector::SampledExact => each(&|head| self.block_mass(head, &self.sampled())),
            Selector::Oracle => each(&|head| self.block_mass(head, &self.all_rows())),
            _ => each(&|_| vec![1.0; self.past_blocks()]),
        }
    }

    pub(super) fn past_blocks(&self) -> usize {
        self.request.past() / self.layout.settings.block_size
    }

    fn all_rows(&self) -> Vec<usize> {
        self.chunk.tokens.clone().collect()
    }

    /// `sample_rows` tokens, evenly from the span's first to its last.
    fn sampled(&self) -> Vec<usize> {
        let (rows, len) = (self.layout.settings.sample_rows, self.chunk.tokens.len());
        if rows == 0 || rows >= len {
            return self.all_rows();
        }
        let even = |i: usize| (i as f64 * (len - 1) as f64 / (rows - 1).max(1) as f64).round();
        (0..rows).map(|i| self.chunk.tokens.start + even(i) as usize).collect()
    }

    /// Share of exact causal attention that each past block receives, averaged over `rows`.
    fn block_mass(&self, head: usize, rows: &[usize]) -> Vec<f64> {
        let block = self.layout.settings.block_size;
        let mut mass = vec![0.0; self.past_blocks()];
        for &t in rows {
            let keys = &self.request.k[self.kv_head][..self.request.visible(t)];
            let logits: Vec<f64> = keys.iter().map(|k| self.logit(head, t, k)).collect();
            let weights = softmax(&logits);
            for (j, share) in mass.iter_mut().enumerate() {
                *share += weights[j * block..(j + 1) * block].iter().sum::<f64>() / rows.len() as f64;
            }
        }
        mass
    }

    pub(super) fn logit(&self, head: usize, t: usize, key: &[f64]) -> f64 {
        dot(&self.request.q[head][t], key) * f64::from(self.layout.shape.sm_scale)
    }

    /// Mean keys of the request's whole blocks.
    pub(super) fn mean_keys(&self) -> Vec<Vec<f64>> {
        block_means(&self.request.k[self.kv_head], self.layout.settings.block_size)
    }

    /// `S_j / max S`, where `S_j` sums `exp(q . k_mean_j * sm_scale)` over the rows at or after the block's last token.
    fn flashprefill(&self, head: usize) -> Vec<f64> {
        let block = self.layout.settings.block_size;
        let sums: Vec<f64> = self
            .mean_keys()
            .iter()
            .enumerate()
            .map(|(j, mean)| {
                let sees = |t: &usize| (j + 1) * block <= self.request.visible(*t);
                let logits = self.chunk.tokens.clone().filter(sees).map(|t| self.logit(head, t, mean));
                log_sum_exp(&logits.collect::<Vec<_>>())
            })
            .collect();
        let past = self.past_blocks();
        let relative_to = if self.layout.settings.flashprefill.relative_to_past { past } else { sums.len() };
        let max = sums[..relative_to].iter().copied().fold(f64::NEG_INFINITY, f64::max);
        sums[..past].iter().map(|sum| (sum - max).exp()).collect()
    }
}

/// `ln sum exp(x)`; −inf for an empty row.
pub(super) fn log_sum_exp(xs: &[f64]) -> f64 {
    let max = xs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY {
        return max;
    }
    max + xs.iter().map(|x| (x - max).exp()).sum::<f64>().ln()
}
