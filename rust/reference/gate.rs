//! Scores of selector `attn_gate` from its definition (SeerAttention, arXiv 2410.13276), in f64 and plain loops.
//!
//! Of every number the oracle also knows the sum of the magnitudes that were added up for it, so that who compares
//! f32 sums with it can bound their rounding.

use super::{Chunk, Request, softmax};
use crate::plan::Layout;
use crate::select::{Pairing, Rope};

/// `[heads][inputs][gate_dim]`, applied as `x [inputs] . W[head]`.
pub type Weights = Vec<Vec<Vec<f64>>>;

/// One layer's gate; its published form shows in the extents of the weights.
#[derive(Clone, Debug)]
pub struct Gate {
    /// From max, min and mean of a block's keys; one matrix a query head or one a KV head.
    pub k: Weights,
    /// From the mean query: one matrix a query head, or one a KV head that reads the group's means one after the
    /// other. `None` takes the mean query as it is.
    pub q: Option<Weights>,
    /// How q and k were rotated, and how the gate's vectors are.
    pub rope: Rope,
}

/// Scores of one query head in one span.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// `[past blocks]`.
    pub scores: Vec<f64>,
    /// Blocks in the softmax.
    pub blocks: usize,
    /// The largest sum of magnitudes behind a logit.
    pub magnitude: f64,
}

/// A sum and the sum of its terms' magnitudes.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    value: f64,
    magnitude: f64,
}

/// Scores of query head `head` in the span `chunk` of `request`.
///
/// The span must see at least its own tokens: a dense one may not, and has no scores.
#[must_use]
pub fn scores(gate: &Gate, layout: &Layout, request: &Request, chunk: &Chunk, head: usize) -> Row {
    let block_size = layout.settings.block_size;
    let kv_end = request.visible(chunk.tokens.end - 1);
    let query = gate.query(layout, request, chunk, head);
    let (mut logits, mut magnitude) = (Vec::new(), 0.0_f64);
    for start in (0..kv_end).step_by(block_size) {
        let tokens = start..(start + block_size).min(kv_end);
        let key = gate.key(layout, request, tokens, head);
        let mut logit = Sum::default();
        for (q, k) in query.iter().zip(&key) {
            logit.value += q.value * k.value;
            logit.magnitude += q.magnitude * k.magnitude;
        }
        let root = (key.len() as f64).sqrt();
        logits.push(logit.value / root);
        magnitude = magnitude.max(logit.magnitude / root);
    }
    let mut scores = softmax(&logits);
    scores.truncate(request.past() / block_size);
    Row { scores, blocks: logits.len(), magnitude }
}

impl Gate {
    /// The gate vector of the span's queries.
    fn query(&self, layout: &Layout, request: &Request, chunk: &Chunk, head: usize) -> Vec<Sum> {
        let group = layout.shape.group_size();
        let kv_head = head / group;
        let mean_of = |head: usize| {
            let unrotate = |t| self.unrotate(request.visible(t) - 1, &request.q[head][t]);
            mean(&chunk.tokens.clone().map(unrotate).collect::<Vec<_>>())
        };
        let vector = match &self.q {
            None => mean_of(head),
            Some(w) if w.len() == layout.shape.num_q_heads => project(&mean_of(head), &w[head]),
            Some(w) => {
                let means: Vec<Sum> = (kv_head * group..(kv_head + 1) * group).flat_map(mean_of).collect();
                project(&means, &w[kv_head])
            }
        };
        self.rotate(request.visible(chunk.tokens.start) - 1, &vector)
    }

    /// The gate vector of the keys `tokens` of one block.
    fn key(
        &self,
        layout: &Layout,
        request: &Request,
        tokens: std::ops::Range<usize>,
        head: usize,
    ) -> Vec<Sum> {
        let kv_head = head / layout.shape.group_size();
        let position = tokens.start;
        let keys: Vec<Vec<Sum>> = tokens.map(|t| self.unrotate(t, &request.k[kv_head][t])).collect();
        let mut features = extreme(&keys, f64::max);
        features.extend(extreme(&keys, f64::min));
        features.extend(mean(&keys));
        let key_head = if self.k.len() == layout.shape.num_q_heads { head } else { kv_head };
        self.rotate(position, &project(&features, &self.k[key_head]))
    }

    /// A head vector as it was before the model's rotation.
    fn unrotate(&self, position: usize, x: &[f64]) -> Vec<Sum> {
        let x: Vec<Sum> = x.iter().map(|&value| Sum { value, magnitude: value.abs() }).collect();
        turn(self.rope.pairing, &angles(&self.rope.inv_freq, position, -1.0), 1.0 / self.scale(), &x)
    }

    /// A gate vector, rotated.
    fn rotate(&self, position: usize, x: &[Sum]) -> Vec<Sum> {
        let freq = self.rope.gate_inv_freq.as_ref().unwrap_or(&self.rope.inv_freq);
        turn(self.rope.pairing, &angles(freq, position, 1.0), self.scale(), x)
    }

    fn scale(&self) -> f64 {
        f64::from(self.rope.scale)
    }
}

/// The angle of each pair: a product in f32, by definition.
fn angles(inv_freq: &[f32], position: usize, sign: f64) -> Vec<f64> {
    inv_freq.iter().map(|freq| sign * f64::from(position as f32 * freq)).collect()
}

/// Turns each pair `(a, b)` to `scale * (a cos - b sin, b cos + a sin)`.
fn turn(pairing: Pairing, angles: &[f64], scale: f64, x: &[Sum]) -> Vec<Sum> {
    let mut turned = vec![Sum::default(); x.len()];
    for (i, angle) in angles.iter().enumerate() {
        let (a, b) = match pairing {
            Pairing::HalfSplit => (i, i + angles.len()),
            Pairing::Interleaved => (2 * i, 2 * i + 1),
        };
        let (cos, sin) = (scale * angle.cos(), scale * angle.sin());
        let magnitude = x[a].magnitude * cos.abs() + x[b].magnitude * sin.abs();
        turned[a] = Sum { value: x[a].value * cos - x[b].value * sin, magnitude };
        let magnitude = x[b].magnitude * cos.abs() + x[a].magnitude * sin.abs();
        turned[b] = Sum { value: x[b].value * cos + x[a].value * sin, magnitude };
    }
    turned
}

/// Elementwise mean of rows.
fn mean(rows: &[Vec<Sum>]) -> Vec<Sum> {
    let mut mean = vec![Sum::default(); rows[0].len()];
    for row in rows {
        for (m, x) in mean.iter_mut().zip(row) {
            m.value += x.value / rows.len() as f64;
            m.magnitude += x.magnitude / rows.len() as f64;
        }
    }
    mean
}

/// Elementwise max or min of rows; it errs by no more than the row that errs most.
fn extreme(rows: &[Vec<Sum>], of: fn(f64, f64) -> f64) -> Vec<Sum> {
    let mut found = rows[0].clone();
    for row in rows {
        for (f, x) in found.iter_mut().zip(row) {
            f.value = of(f.value, x.value);
            f.magnitude = f.magnitude.max(x.magnitude);
        }
    }
    found
}

/// `x [inputs] . weights [inputs][gate_dim]`.
fn project(x: &[Sum], weights: &[Vec<f64>]) -> Vec<Sum> {
    let mut out = vec![Sum::default(); weights[0].len()];
    for (x, row) in x.iter().zip(weights) {
        for (o, w) in out.iter_mut().zip(row) {
            o.value += x.value * w;
            o.magnitude += x.magnitude * w.abs();
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sums(x: &[f64]) -> Vec<Sum> {
        x.iter().map(|&value| Sum { value, magnitude: value.abs() }).collect()
    }

    fn values(x: &[Sum]) -> Vec<f64> {
        x.iter().map(|x| x.value).collect()
    }

    #[test]
    fn a_quarter_turn_swaps_the_partners_of_either_pairing() {
        let quarter = [std::f64::consts::FRAC_PI_2, 0.0];
        let turned = |pairing| values(&turn(pairing, &quarter, 2.0, &sums(&[1.0, 2.0, 3.0, 4.0])));
        let near = |got: Vec<f64>, want: [f64; 4]| got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-14);
        assert!(near(turned(Pairing::HalfSplit), [-6.0, 4.0, 2.0, 8.0]));
        assert!(near(turned(Pairing::Interleaved), [-4.0, 2.0, 6.0, 8.0]));
    }

    #[test]
    fn features_and_projection_are_the_textbooks() {
        let rows = [sums(&[1.0, -4.0]), sums(&[3.0, 2.0])];
        assert_eq!(values(&mean(&rows)), [2.0, -1.0]);
        assert_eq!(values(&extreme(&rows, f64::max)), [3.0, 2.0]);
        assert_eq!(values(&extreme(&rows, f64::min)), [1.0, -4.0]);
        let out = project(&rows[0], &[vec![1.0, 2.0], vec![0.5, -1.0]]);
        assert_eq!(values(&out), [-1.0, 6.0]);
        assert_eq!(out[0].magnitude, 3.0);
    }
}
