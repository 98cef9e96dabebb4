//! The model's rotary embedding, forwards and back: the `attn_gate` selector reads q and k as they were before it.

use crate::error::{Error, Result, Status};
use crate::types::Shape;

/// Which elements of a head vector rotate together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// `x[i]` with `x[i + head_dim / 2]`: Llama and Qwen as Hugging Face stores them.
    HalfSplit,
    /// `x[2i]` with `x[2i + 1]`.
    Interleaved,
}

/// The model's rotary embedding: pair `i` at position `p` turns by `p * inv_freq[i]`, computed in f32 as engines do.
///
/// A token's position is its index in the request's KV.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// `[head_dim / 2]`, any length scaling (Llama 3, `YaRN`) already in it.
    pub inv_freq: Vec<f32>,
    /// `[gate_dim / 2]`; needed only where the gate's width is not `head_dim`.
    pub gate_inv_freq: Option<Vec<f32>>,
    /// Which elements turn together.
    pub pairing: Pairing,
    /// Factor on cosine and sine: 1 except under `YaRN` and its like. Finite and > 0.
    pub scale: f32,
}

impl Rope {
    pub(super) fn check(&self, shape: &Shape) -> Result<()> {
        frequencies("rope.inv_freq", &self.inv_freq, shape.head_dim)?;
        if !self.scale.is_finite() || self.scale <= 0.0 {
            return Err(Error::new(Status::Value, "rope.scale", "finite and > 0", self.scale));
        }
        Ok(())
    }

    pub(super) fn check_gate(&self, head_dim: usize, gate_dim: usize) -> Result<()> {
        match &self.gate_inv_freq {
            Some(freq) => frequencies("rope.gate_inv_freq", freq, gate_dim),
            None if gate_dim == head_dim => Ok(()),
            None => {
                let wanted = format!(
                    "{} frequencies, as gate_dim {gate_dim} is not head_dim {head_dim}",
                    gate_dim / 2
                );
                Err(Error::new(Status::Config, "rope.gate_inv_freq", wanted, "none"))
            }
        }
    }

    /// Undoes the model's rotation of a head vector at `position`; exact up to rounding.
    pub(super) fn unrotate(&self, turns: &[[f32; 2]], x: &mut [f32]) {
        self.turn(turns, x, |[cos, sin]| [cos / self.scale, -sin / self.scale]);
    }

    /// Rotates a gate vector.
    pub(super) fn rotate_gate(&self, position: usize, x: &mut [f32]) {
        let freq = self.gate_inv_freq.as_ref().unwrap_or(&self.inv_freq);
        let turns: Vec<_> = turns_of(freq, position).collect();
        self.turn(&turns, x, |[cos, sin]| [cos * self.scale, sin * self.scale]);
    }

    /// Cosine and sine of each pair of a head vector at `position`.
    pub(super) fn turns(&self, position: usize) -> impl Iterator<Item = [f32; 2]> {
        turns_of(&self.inv_freq, position)
    }

    fn turn(&self, turns: &[[f32; 2]], x: &mut [f32], way: impl Fn([f32; 2]) -> [f32; 2]) {
        let half = turns.len();
        for (i, &turn) in turns.iter().enumerate() {
            let (a, b) = match self.pairing {
                Pairing::HalfSplit => (i, i + half),
                Pairing::Interleaved => (2 * i, 2 * i + 1),
            };
            let [cos, sin] = way(turn);
            (x[a], x[b]) = (x[a] * cos - x[b] * sin, x[b] * cos + x[a] * sin);
        }
    }
}

fn turns_of(freq: &[f32], position: usize) -> impl Iterator<Item = [f32; 2]> {
    freq.iter().map(move |freq| {
        let (sin, cos) = (position as f32 * freq).sin_cos();
        [cos, sin]
    })
}

fn frequencies(name: &str, freq: &[f32], dim: usize) -> Result<()> {
    if freq.len() * 2 != dim || !freq.iter().all(|f| f.is_finite()) {
        let got = format!("{} values", freq.len());
        return Err(Error::new(Status::Shape, name, format!("{} finite values", dim / 2), got));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::Pairing;
    use crate::fixture::Rng;
    use crate::select::gate_weights::tests::rope;

    #[test]
    fn unrotate_undoes_the_models_rotation_in_either_pairing() {
        for (pairing, partner) in [(Pairing::HalfSplit, 32), (Pairing::Interleaved, 1)] {
            let rope = rope(64, 64, pairing);
            let mut rng = Rng::new(2);
            let x: Vec<f32> = (0..64).map(|_| rng.normal()).collect();
            let mut y = x.clone();
            rope.rotate_gate(1234, &mut y);
            // The first pair turns by the position itself.
            let angle = 1234.0_f64;
            let want = f64::from(x[0]) * angle.cos() - f64::from(x[partner]) * angle.sin();
            // |x| < 3.5: two products, a sum, cosine and sine, each within an eps.
            assert!((f64::from(y[0]) - 1.25 * want).abs() < 5.0 * 3.5 * 1.25 * f64::from(f32::EPSILON));
            let turns: Vec<_> = rope.turns(1234).collect();
            rope.unrotate(&turns, &mut y);
            assert!(x.iter().zip(&y).all(|(a, b)| (a - b).abs() < 12.0 * 3.5 * f32::EPSILON));
        }
    }
}
