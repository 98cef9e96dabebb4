//! The tokens of a span whose queries a selector scores with: most of them evenly strided, the others unusual ones.
//!
//! Even strides stand for the span's average, and meet one or none of the few tokens that ask for something far away, as
//! a question's do. Those differ from the mean query (the observation of QUOKA, arXiv 2602.08722, which scores with them
//! alone): with a quarter of the rows given to them a question's own rows lose half as much of their output, and all rows
//! together no more than before (tests/bench/record/cpu/2026-11-22-unusual-rows.txt).

use super::Input;
use crate::plan::Span;

/// `settings.sample_rows` of the span's tokens, ascending, for all query heads of `kv_head`; all of them for 0 or no
/// fewer than there are. A token may be both strided and unusual: then it stands, and counts, twice.
///
/// Strided sample `i` of `n` over `m` tokens is `floor(i * (m - 1) / (n - 1))`; a single one is the last, which sees most.
pub(super) fn tokens(input: &Input, span: &Span, kv_head: usize) -> Vec<usize> {
    let (len, count) = (span.len, input.layout.settings.sample_rows);
    if count == 0 || count >= len {
        return (0..len).collect();
    }
    let unusual = (count / UNUSUAL_SHARE).min(CANDIDATES);
    let mut tokens = match count - unusual {
        1 => vec![len - 1],
        n => (0..n).map(|i| i * (len - 1) / (n - 1)).collect(),
    };
    if unusual > 0 {
        tokens.extend(least_like_the_mean(input, span, kv_head, unusual));
        tokens.sort_unstable();
    }
    tokens
}

/// `count` of the span's candidates, those whose queries' cosines with the mean query, summed over the group's heads, are
/// lowest; of equal ones the first. All in whole numbers but the last steps, so that every backend takes the same tokens.
fn least_like_the_mean(input: &Input, span: &Span, kv_head: usize, count: usize) -> Vec<usize> {
    let shape = &input.layout.shape;
    let (group, dim) = (shape.group_size(), shape.head_dim);
    let n = span.len.min(CANDIDATES);
    let token = |candidate: usize| candidate * span.len / n;
    let mut likeness = vec![0.0; n];
    let (mut vector, mut rows) = (vec![0.0; dim], vec![0; n * dim]);
    for head in kv_head * group..(kv_head + 1) * group {
        let mut mean = vec![0; dim];
        for (i, row) in rows.chunks_exact_mut(dim).enumerate() {
            input.batch.q().load(span.q_start + token(i), head, &mut vector);
            whole_numbers(&vector, row);
            mean.iter_mut().zip(&*row).for_each(|(sum, x)| *sum += x);
        }
        narrow(&mut mean);
        for (sum, row) in likeness.iter_mut().zip(rows.chunks_exact(dim)) {
            *sum += cosine(dot(row, &mean), dot(row, row), dot(&mean, &mean));
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| likeness[a].total_cmp(&likeness[b]));
    order[..count].iter().map(|&i| token(i)).collect()
}

/// A vector times the power of two that puts its largest component into `2^10..2^11`, rounded; what is no number is 0.
fn whole_numbers(vector: &[f32], into: &mut [i32]) {
    let top = vector.iter().map(|x| x.abs()).filter(|x| x.is_finite()).fold(0.0, f32::max);
    let exponent = ((top.to_bits() >> 23).cast_signed() - 126).max(LEAST_EXPONENT);
    let scale = f32::from_bits((BITS - exponent + 127).cast_unsigned() << 23);
    let largest = ((1 << BITS) - 1) as f32;
    for (to, x) in into.iter_mut().zip(vector) {
        let scaled = (x * scale).round_ties_even();
        *to = if scaled.is_nan() { 0 } else { scaled.clamp(-largest, largest) as i32 };
    }
}

/// Halves all, rounded down, as often as the largest needs to come below `2^BITS`; what is negative may end at it.
fn narrow(sums: &mut [i32]) {
    let top = sums.iter().map(|x| x.unsigned_abs()).max().unwrap_or(0);
    let shift = (32 - top.leading_zeros()).saturating_sub(BITS.cast_unsigned());
    sums.iter_mut().for_each(|x| *x >>= shift);
}

/// At most 256 products below `2^22`.
fn dot(a: &[i32], b: &[i32]) -> i32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// Of vectors with these products; a vector of zeros is like any other.
fn cosine(product: i32, a: i32, b: i32) -> f32 {
    if a == 0 || b == 0 { 1.0 } else { product as f32 / ((a as f32).sqrt() * (b as f32).sqrt()) }
}

/// One sample in so many is an unusual one.
const UNUSUAL_SHARE: usize = 4;

/// Most tokens of a span that are looked at; of a longer one every second, third .. is.
const CANDIDATES: usize = 1024;

/// Of a whole number, beside its sign.
const BITS: i32 = 11;

/// Of a vector's largest component; smaller vectors become zeros.
const LEAST_EXPONENT: i32 = -100;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Paged, shape};
    use crate::settings::{Selector, Settings};
    use crate::types::Dtype;

    /// The tokens of a chunk of `len` with 2 heads, whose queries are all alike but for those of `odd` tokens.
    fn sampled(len: usize, sample_rows: usize, odd: &[usize]) -> Vec<usize> {
        let mut paged = Paged::random(7, shape(2, 1, 64, 16, Dtype::F32), &[(len, len + 64)]);
        for (i, query) in paged.requests[0].q.chunks_exact_mut(2 * 64).enumerate() {
            // Noise of a hundredth, so that no two are equal.
            query.iter_mut().for_each(|x| *x = x.mul_add(0.01, 1.0));
            if odd.contains(&i) {
                query[..32].iter_mut().for_each(|x| *x *= -3.0);
            }
        }
        let paged = paged.repaged(2);
        let layout = paged.layout(Settings { sample_rows, ..Settings::of(Selector::SampledExact) });
        let batch = paged.batch();
        let input = Input { layout: &layout, batch: &batch, summaries: None, gate: None };
        tokens(&input, &layout.list_spans(&batch)[0], 0)
    }

    #[test]
    fn a_quarter_are_the_unusual_ones_and_the_others_even() {
        assert_eq!(sampled(100, 8, &[41, 42]), [0, 19, 39, 41, 42, 59, 79, 99]);
        assert_eq!(sampled(100, 3, &[41]), [0, 49, 99]);
        assert_eq!(sampled(100, 1, &[41]), [99]);
        assert_eq!(sampled(9, 4, &[4]), [0, 4, 4, 8]);
    }

    #[test]
    fn no_count_or_too_large_a_count_takes_every_token() {
        for count in [0, 5, 6] {
            assert_eq!(sampled(5, count, &[1]), [0, 1, 2, 3, 4]);
        }
    }

    #[test]
    fn of_a_long_span_every_second_token_is_a_candidate() {
        let found = sampled(2048, 8, &[600, 1201]);
        assert!(found.contains(&600) && !found.contains(&1201), "{found:?}");
    }

    #[test]
    fn whole_numbers_keep_a_vectors_direction() {
        let mut out = [0; 5];
        whole_numbers(&[1.0, -0.5, f32::NAN, f32::INFINITY, 0.0], &mut out);
        assert_eq!(out, [1024, -512, 0, 2047, 0]);
        whole_numbers(&[1.999_999, 3e-4, 0.0, 0.0, 0.0], &mut out);
        assert_eq!(out, [2047, 0, 0, 0, 0]);
        whole_numbers(&[0.0, 1e-40, 0.0, 0.0, -0.0], &mut out);
        assert_eq!(out, [0; 5]);
    }

    #[test]
    fn sums_are_narrowed_together() {
        let mut sums = [1 << 20, -5, -(1 << 12), 0];
        narrow(&mut sums);
        assert_eq!(sums, [1 << 10, -1, -4, 0]);
    }
}
