//! The selectors that look at single tokens: QUOKA's cosines and XAttention's antidiagonals.

use super::select::{At, Scored};
use super::{dot, softmax};

impl At<'_> {
    /// Best cosine of each block's keys to the span's least typical queries, averaged over the group rank by rank.
    pub(super) fn quoka(&self, slack: f64) -> Scored {
        let len = self.chunk.tokens.len();
        let ratio = f64::from(self.layout.settings.quoka_query_ratio);
        // floor(ratio * len), but one at least.
        let kept = (1..=len).rfind(|&n| n as f64 <= ratio * len as f64).unwrap_or(1);
        let group = self.heads.len() as f64;
        let mut average = vec![vec![0.0; self.layout.shape.head_dim]; kept];
        let mut certain = true;
        for head in self.heads.clone() {
            let queries = &self.request.q[head][self.chunk.tokens.clone()];
            let typical = |i: usize| cosine_to_mean(queries, i);
            let cosines: Vec<f64> = (0..len).map(typical).collect();
            let mut order: Vec<usize> = (0..len).collect();
            order.sort_by(|&a, &b| cosines[a].total_cmp(&cosines[b]).then(a.cmp(&b)));
            let ties = order.windows(2).take(kept).any(|w| cosines[w[1]] - cosines[w[0]] <= slack);
            certain &= !ties;
            for (sum, &i) in average.iter_mut().zip(&order) {
                for (sum, x) in sum.iter_mut().zip(unit(&queries[i])) {
                    *sum += x / group;
                }
            }
        }
        let token = |key: &Vec<f64>| {
            let key = unit(key);
            let best = average.iter().map(|q| dot(q, &key)).fold(f64::NEG_INFINITY, f64::max);
            (1.0 + best) / 2.0
        };
        let blocks = self.request.k[self.kv_head].chunks_exact(self.layout.settings.block_size);
        let best = |block: &[Vec<f64>]| block.iter().map(token).fold(0.0, f64::max);
        let row: Vec<f64> = blocks.take(self.past_blocks()).map(best).collect();
        Scored { rows: vec![row; self.heads.len()], certain }
    }

    /// Each past block's share of a softmax over groups of `stride` keys, one antidiagonal of logits per group pair.
    pub(super) fn xattention(&self, head: usize) -> Vec<f64> {
        let stride = self.layout.settings.xattention_stride;
        let per_block = self.layout.settings.block_size / stride;
        let tokens: Vec<usize> = self.chunk.tokens.clone().collect();
        let mut mass = vec![0.0; self.past_blocks()];
        for rows in tokens.chunks(stride) {
            let r = rows.len();
            let keys = &self.request.k[self.kv_head][..self.request.visible(rows[r - 1])];
            // Row r - 1 - t % r meets key t of each group; the last group may hold fewer keys, and weighs less.
            let groups: Vec<&[Vec<f64>]> = keys.chunks(stride).collect();
            let logit = |group: &&[Vec<f64>]| {
                let each =
                    group.iter().enumerate().map(|(t, key)| self.logit(head, rows[r - 1 - t % r], key));
                each.sum::<f64>() / group.len() as f64 + (group.len() as f64 / stride as f64).ln()
            };
            let weights = softmax(&groups.iter().map(logit).collect::<Vec<_>>());
            for (j, share) in mass.iter_mut().enumerate() {
                let held: f64 = weights[j * per_block..(j + 1) * per_block].iter().sum();
                *share += held * r as f64 / tokens.len() as f64;
            }
        }
        mass
    }
}

fn cosine_to_mean(queries: &[Vec<f64>], i: usize) -> f64 {
    let mean: Vec<f64> = (0..queries[i].len()).map(|x| queries.iter().map(|q| q[x]).sum()).collect();
    dot(&unit(&queries[i]), &unit(&mean))
}

/// The vector at length 1; a vector of zeros stays one.
fn unit(x: &[f64]) -> Vec<f64> {
    let length = dot(x, x).sqrt();
    x.iter().map(|x| if length > 0.0 { x / length } else { 0.0 }).collect()
}
