//! Scores of every past block, selector by selector, from the definitions in the selectors' module docs.

use half::{bf16, f16};

use super::{Chunk, Request, block_means, chunks, dot, select_step, softmax};
use crate::plan::Layout;
use crate::settings::Selector;
use crate::types::Dtype;

/// One span's scores, `[num_q_heads][past blocks]`; empty rows for a dense span.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// One row a query head.
    pub rows: Vec<Vec<f64>>,
    /// False where a choice on the way was a tie within the slack, so that rounding may decide it differently.
    pub certain: bool,
}

/// Scores every request: `[select spans]`.
///
/// `slack` is the relative error up to which a selector's inner choices (the queries of `quoka`, the candidates of
/// `two_level`) count as ties. Without a gate, `attn_gate` scores NaN; an external mask's scores are not ours: NaN.
#[must_use]
pub fn scores(layout: &Layout, requests: &[Request], slack: f64) -> Vec<Scored> {
    let score = |chunk: &Chunk| -> Scored {
        if chunk.dense {
            return Scored { rows: vec![Vec::new(); layout.shape.num_q_heads], certain: true };
        }
        let group = layout.shape.group_size();
        let mut all = Scored { rows: Vec::new(), certain: true };
        for kv_head in 0..layout.shape.num_kv_heads {
            let (request, heads) = (&requests[chunk.req], kv_head * group..(kv_head + 1) * group);
            let group = At { layout, request, chunk, kv_head, heads }.scores(slack);
            all.rows.extend(group.rows);
            all.certain &= group.certain;
        }
        all
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
    fn scores(&self, slack: f64) -> Scored {
        let each = |score: &dyn Fn(usize) -> Vec<f64>| Scored {
            rows: self.heads.clone().map(score).collect(),
            certain: true,
        };
        match self.layout.settings.selector {
            Selector::Dense => each(&|_| vec![1.0; self.past_blocks()]),
            Selector::Streaming => each(&|_| vec![0.0; self.past_blocks()]),
            Selector::External | Selector::AttnGate => each(&|_| vec![f64::NAN; self.past_blocks()]),
            Selector::FlashPrefill => each(&|head| self.flashprefill(head)),
            Selector::SampledExact => {
                let (tokens, certain) = self.sampled();
                Scored { certain, ..each(&|head| self.block_mass(head, &tokens)) }
            }
            Selector::Oracle => each(&|head| self.block_mass(head, &self.all_rows())),
            Selector::PooledMass => {
                let (tokens, certain) = self.sampled();
                Scored { certain, ..each(&|head| self.pooled_mass(head, &tokens)) }
            }
            Selector::XAttention => each(&|head| self.xattention(head)),
            Selector::TwoLevel => self.two_level(slack),
            Selector::Quoka => self.quoka(slack),
        }
    }

    pub(super) fn past_blocks(&self) -> usize {
        self.request.past() / self.layout.settings.block_size
    }

    pub(super) fn all_rows(&self) -> Vec<usize> {
        self.chunk.tokens.clone().collect()
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

    /// Mean keys of the request's whole blocks: kept as f32, and rounded to the queries' dtype, as FlashPrefill's are.
    pub(super) fn mean_keys(&self) -> Vec<Vec<f64>> {
        let means = block_means(&self.request.k[self.kv_head], self.layout.settings.block_size);
        let round = |x: f64| rounded(self.layout.shape.dtype, x);
        means.into_iter().map(|mean| mean.into_iter().map(round).collect()).collect()
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

/// `x` as f32, then as `dtype`, to nearest.
#[expect(clippy::cast_possible_truncation, reason = "means are stored as f32")]
fn rounded(dtype: Dtype, x: f64) -> f64 {
    let stored = x as f32;
    match dtype {
        Dtype::Bf16 => bf16::from_f32(stored).to_f64(),
        Dtype::F16 => f16::from_f32(stored).to_f64(),
        _ => stored.into(),
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
