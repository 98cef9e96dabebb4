//! Two results over disjoint KV to the result over both, weighted by their log-sum-exps.

use crate::tensor::{LseMut, Tokens, TokensMut};
use crate::types::Shape;

/// One side: its output rows and `lse [num_q_heads, total_q]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Side<'a> {
    /// `[total_q, num_q_heads, head_dim]`.
    pub(super) out: Tokens<'a>,
    /// Natural log; -inf where the side saw nothing.
    pub(super) lse: &'a [f32],
    /// From a head to the next, in elements.
    pub(super) stride_head: usize,
}

/// Writes the union of `a` and `b`; a row that neither saw gets 0 and -inf.
pub(super) fn merge(
    shape: &Shape,
    total_q: usize,
    (a, b): (&Side, &Side),
    out: &mut TokensMut,
    mut lse: Option<&mut LseMut>,
) {
    let (mut row_a, mut row_b) = (vec![0.0; shape.head_dim], vec![0.0; shape.head_dim]);
    for head in 0..shape.num_q_heads {
        for token in 0..total_q {
            let (lse_a, lse_b) = (a.lse[head * a.stride_head + token], b.lse[head * b.stride_head + token]);
            let (share_a, share_b, both) = shares(lse_a, lse_b);
            a.out.load(token, head, &mut row_a);
            b.out.load(token, head, &mut row_b);
            for (x, &y) in row_a.iter_mut().zip(&row_b) {
                *x = weighed(share_a, *x) + weighed(share_b, y);
            }
            out.elements.store(token * out.stride_token + head * out.stride_head, &row_a);
            if let Some(lse) = &mut lse {
                lse.elements[head * lse.stride_head + token] = both;
            }
        }
    }
}

/// Each side's share of the weight, and the log of their sum.
fn shares(a: f32, b: f32) -> (f32, f32, f32) {
    // Of a row that went wrong on one side nothing is right, though `max` would prefer the other side.
    if a.is_nan() || b.is_nan() {
        return (f32::NAN, f32::NAN, f32::NAN);
    }
    let most = a.max(b);
    if most == f32::NEG_INFINITY {
        return (0.0, 0.0, most);
    }
    let (weight_a, weight_b) = ((a - most).exp(), (b - most).exp());
    let sum = weight_a + weight_b;
    (weight_a / sum, weight_b / sum, most + sum.ln())
}

/// A side without weight adds nothing, whatever its row holds.
fn weighed(share: f32, x: f32) -> f32 {
    if share == 0.0 { 0.0 } else { share * x }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_follow_the_weights() {
        let (a, b, both) = shares(3.0_f32.ln(), 1.0_f32.ln());
        // One rounding each in ln, exp, + and /: a few eps of 1.
        assert!((a - 0.75).abs() < 1e-6 && (b - 0.25).abs() < 1e-6 && (both - 4.0_f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn an_empty_side_leaves_the_other_as_it_is() {
        assert_eq!(shares(f32::NEG_INFINITY, 0.5), (0.0, 1.0, 0.5));
        assert_eq!(shares(f32::NEG_INFINITY, f32::NEG_INFINITY), (0.0, 0.0, f32::NEG_INFINITY));
        assert_eq!(weighed(0.0, f32::NAN), 0.0);
    }

    #[test]
    fn a_side_that_went_wrong_is_seen() {
        for (a, b) in [(f32::NAN, f32::NEG_INFINITY), (0.5, f32::NAN), (f32::NAN, f32::NAN)] {
            let (share_a, share_b, both) = shares(a, b);
            assert!(share_a.is_nan() && share_b.is_nan() && both.is_nan());
        }
    }
}
