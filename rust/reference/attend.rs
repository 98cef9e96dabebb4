//! Softmax attention of each query over the tokens its list reads and causality allows.

use super::{Request, chunks, dot, mean};
use crate::plan::Layout;

/// One output row.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// `[head_dim]`; 0 where nothing is visible.
    pub out: Vec<f64>,
    /// Natural log-sum-exp; −inf where nothing is visible.
    pub lse: f64,
    /// `[head_dim]` weighted mean of |v|: what relative errors of the weights scale with.
    pub spread: Vec<f64>,
    /// Keys (and mean keys) that took part.
    pub terms: usize,
    /// `|q| |k| sm_scale` with the longest key of the request: what absolute errors of the logits scale with.
    pub reach: f64,
    /// The part of mean keys and values in it.
    pub means: MeanPart,
}

/// What of a row comes from means: what the errors of stored means scale with.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MeanPart {
    /// Of the row's weights.
    pub share: f64,
    /// `[head_dim]`: as [`Row::spread`], summed over means alone.
    pub spread: Vec<f64>,
    /// `|q| |k| sm_scale` with the longest mean key that takes part.
    pub reach: f64,
    /// `|q|_1 sm_scale`: a logit's error for an error of 1 in each element of a mean key.
    pub slope: f64,
}

/// Rows `[num_q_heads][total_q]` of the batch, each attending to `lists [list spans * lists per span][blocks]`.
///
/// With mean correction, each run of 512 past tokens of which a list skips `n` adds
/// `1.5 n exp(q . k_mean * sm_scale)` of weight with value `v_mean`, means over all of the run.
#[must_use]
pub fn attend(layout: &Layout, requests: &[Request], lists: &[Vec<bool>]) -> Vec<Vec<Row>> {
    let shape = &layout.shape;
    let group = shape.num_q_heads / shape.num_kv_heads;
    let means: Vec<Vec<Means>> = requests.iter().map(|r| Means::of(layout, r)).collect();
    let most = |rows: &Vec<Vec<f64>>| rows.iter().map(|k| length(k)).fold(0.0, f64::max);
    let longest: Vec<Vec<f64>> = requests.iter().map(|r| r.k.iter().map(most).collect()).collect();
    let spans = chunks(layout, requests, layout.settings.scope.query_span);
    let per_span = lists.len() / spans.len().max(1);
    let lists_per_kv_head = per_span / shape.num_kv_heads;
    let run = match layout.settings.scope.heads_per_list {
        0 => group,
        n => n,
    };
    let row = |head: usize, s: usize, t: usize| {
        let kv_head = head / group;
        let list = s * per_span + kv_head * lists_per_kv_head + head % group / run;
        let request = &requests[spans[s].req];
        let longest_key = longest[spans[s].req][kv_head];
        let at = At { layout, request, means: &means[spans[s].req][kv_head], kv_head, longest_key };
        at.row(&request.q[head][t], request.visible(t), &lists[list])
    };
    let rows = |head: usize| {
        let tokens = spans.iter().enumerate().flat_map(|(s, span)| span.tokens.clone().map(move |t| (s, t)));
        tokens.map(|(s, t)| row(head, s, t)).collect()
    };
    (0..shape.num_q_heads).map(rows).collect()
}

/// Tokens that one mean stands for.
const STAND_IN: usize = 512;

/// Means of one KV head, over all tokens of past blocks.
struct Means {
    past: usize,
    k: Vec<Vec<f64>>,
    v: Vec<Vec<f64>>,
}

impl Means {
    fn of(layout: &Layout, request: &Request) -> Vec<Self> {
        let size = layout.settings.block_size;
        let past = if layout.settings.mean_correction { request.past() / size * size } else { 0 };
        let of = |rows: &[Vec<f64>]| rows[..past].chunks(STAND_IN).map(mean).collect();
        request.k.iter().zip(&request.v).map(|(k, v)| Self { past, k: of(k), v: of(v) }).collect()
    }
}

struct At<'a> {
    layout: &'a Layout,
    request: &'a Request,
    means: &'a Means,
    kv_head: usize,
    longest_key: f64,
}

impl At<'_> {
    fn row(&self, q: &[f64], visible: usize, list: &[bool]) -> Row {
        let block_size = self.layout.settings.block_size;
        let (keys, values) = (&self.request.k[self.kv_head], &self.request.v[self.kv_head]);
        let tokens = (0..visible).filter(|t| list[t / block_size]).map(|t| (1.0, &keys[t], &values[t]));
        let skipped = |g: usize| {
            let tokens = g * STAND_IN..((g + 1) * STAND_IN).min(self.means.past);
            tokens.filter(|t| !list[t / block_size]).count() as f64
        };
        let all = (0..self.means.k.len()).map(|g| (1.5 * skipped(g), &self.means.k[g], &self.means.v[g]));
        let stands = all.filter(|(n, _, _)| *n > 0.0);
        let terms: Vec<(f64, &Vec<f64>, &Vec<f64>)> = tokens.chain(stands).collect();
        let scale = f64::from(self.layout.shape.sm_scale);
        Row { reach: length(q) * self.longest_key * scale, ..weighted_mean(q, scale, &terms) }
    }
}

/// `sum_i n_i exp(q . k_i * scale) v_i / sum_i n_i exp(q . k_i * scale)` over `terms (n, k, v)`.
fn weighted_mean(q: &[f64], scale: f64, terms: &[(f64, &Vec<f64>, &Vec<f64>)]) -> Row {
    let zero = vec![0.0; q.len()];
    let means = MeanPart { spread: zero.clone(), ..MeanPart::default() };
    let empty = Row { out: zero.clone(), lse: f64::NEG_INFINITY, spread: zero, terms: 0, reach: 0.0, means };
    if terms.is_empty() {
        return empty;
    }
    let logits: Vec<f64> = terms.iter().map(|(_, k, _)| dot(q, k) * scale).collect();
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = terms.iter().zip(&logits).map(|((n, _, _), x)| n * (x - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut row = Row { lse: max + sum.ln(), terms: terms.len(), ..empty };
    row.means.slope = q.iter().map(|x| x.abs()).sum::<f64>() * scale;
    for ((n, k, v), w) in terms.iter().zip(&weights) {
        let share = w / sum;
        for ((out, spread), value) in row.out.iter_mut().zip(&mut row.spread).zip(v.iter()) {
            *out += share * value;
            *spread += share * value.abs();
        }
        // A mean stands for at least 16 tokens.
        if *n > 1.0 {
            row.means.add(share, v);
            row.means.reach = row.means.reach.max(length(q) * length(k) * scale);
        }
    }
    row
}

impl MeanPart {
    fn add(&mut self, share: f64, v: &[f64]) {
        self.share += share;
        for (spread, value) in self.spread.iter_mut().zip(v) {
            *spread += share * value.abs();
        }
    }
}

fn length(x: &[f64]) -> f64 {
    dot(x, x).sqrt()
}
