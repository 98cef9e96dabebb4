//! The tokens of a span whose queries a selector scores with: most of them evenly strided, the others unusual ones, and the
//! last.
//!
//! Even strides stand for the span's average, and meet one or none of the few tokens that ask for something far away, as
//! a question's do. Those differ from the mean query (the observation of QUOKA, arXiv 2602.08722, which scores with them
//! alone): with a quarter of the rows given to them a question's own rows lose half as much of their output, and all rows
//! together hardly more (tests/bench/record/cpu/2026-11-22-unusual-rows.txt). A prompt's end is what is answered.

use super::Input;
use crate::plan::Span;

/// `settings.sample_rows` of the span's tokens, ascending, for all query heads of `kv_head`; all of them for 0 or no
/// fewer than there are. An unusual token may be one of the others, too: then it stands, and counts, twice.
///
/// Strided sample `i` of `n` over the `m` tokens before the last ones is `floor(i * (m - 1) / (n - 1))`; a single sample is
/// the last token, which sees most.
pub(super) fn tokens(input: &Input, span: &Span, kv_head: usize) -> Vec<usize> {
    let (len, count) = (span.len, input.layout.settings.sample_rows);
    if count == 0 || count >= len {
        return (0..len).collect();
    }
    let unusual = (count / UNUSUAL_SHARE).min(CANDIDATES);
    let last = count / LAST_SHARE;
    let over = len - last;
    let mut tokens: Vec<usize> = match count - unusual - last {
        1 => vec![over - 1],
        n => (0..n).map(|i| i * (over - 1) / (n - 1)).collect(),
    };
    if unusual > 0 {
        tokens.extend(over..len);
        tokens.extend(least_like_the_mean(input, span, kv_head, unusual));
        tokens.sort_unstable();
    }
    tokens
}

/// `count` of the span's candidates, those whose queries' cosines with the mean query, summed over the group's heads, are
/// lowest; of equal ones the first. The mean is a sum of whole numbers and every other step is rounded in a fixed order,
/// so that all backends take the same tokens.
fn least_like_the_mean(input: &Input, span: &Span, kv_head: usize, count: usize) -> Vec<usize> {
    let shape = &input.layout.shape;
    let (group, dim) = (shape.group_size(), shape.head_dim);
    let n = span.len.min(CANDIDATES);
    let token = |candidate: usize| candidate * span.len / n;
    let mut likeness = vec![0.0; n];
    let mut queries = vec![0.0; n * dim];
    for head in kv_head * group..(kv_head + 1) * group {
        for (i, query) in queries.chunks_exact_mut(dim).enumerate() {
            input.batch.q().load(span.q_start + token(i), head, query);
        }
        let mean = sum_of_whole_numbers(&queries, dim);
        let length = dot(&mean, &mean).sqrt();
        for (sum, query) in likeness.iter_mut().zip(queries.chunks_exact(dim)) {
            let cosine = dot(query, &mean) / (dot(query, query).sqrt() * length);
            // A query of zeros, or too small or large for its square, is like any other.
            *sum += if cosine.is_finite() { cosine } else { 1.0 };
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| likeness[a].total_cmp(&likeness[b]));
    order[..count].iter().map(|&i| token(i)).collect()
}

/// The sum of the queries in units that put the first one's largest component into `2^10..2^11`, each rounded.
fn sum_of_whole_numbers(queries: &[f32], dim: usize) -> Vec<f32> {
    let sizes = queries[..dim].iter().map(|x| x.abs()).filter(|x| x.is_finite());
    let top = sizes.fold(0.0, f32::max);
    let exponent = ((top.to_bits() >> 23).cast_signed() - 126).max(LEAST_EXPONENT);
    let scale = f32::from_bits((BITS - exponent + 127).cast_unsigned() << 23);
    let mut sums = vec![0_i32; dim];
    for query in queries.chunks_exact(dim) {
        for (sum, x) in sums.iter_mut().zip(query) {
            *sum += whole_number(x * scale);
        }
    }
    sums.iter().map(|&x| x as f32).collect()
}

/// The nearest one of at most [`MOST`]; of what is no number, the least.
#[expect(clippy::manual_clamp, reason = "clamp keeps NaN")]
#[expect(clippy::cast_possible_truncation, reason = "whole, and of 21 bits")]
fn whole_number(x: f32) -> i32 {
    x.max(-MOST).min(MOST).round_ties_even() as i32
}

/// The product of two vectors: eight elements one after the other, then those sums pair by pair.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let eights = a.chunks_exact(EIGHT).zip(b.chunks_exact(EIGHT));
    let mut sums = [0.0_f32; 32];
    for (sum, (a, b)) in sums.iter_mut().zip(eights) {
        *sum = a.iter().zip(b).fold(0.0, |sum, (x, y)| sum + x * y);
    }
    let mut width = (a.len() / EIGHT).next_power_of_two();
    while width > 1 {
        width /= 2;
        for i in 0..width {
            sums[i] = sums[2 * i] + sums[2 * i + 1];
        }
    }
    sums[0]
}

/// One sample in so many is an unusual one.
const UNUSUAL_SHARE: usize = 4;

/// And one in so many of the last ones.
const LAST_SHARE: usize = 8;

/// Most tokens of a span that are looked at; of a longer one every second, third .. is.
const CANDIDATES: usize = 512;

/// Of a whole number in the first candidate's query, beside its sign.
const BITS: i32 = 11;

/// Of the first candidate's largest component; of smaller ones the sum is of what they round to.
const LEAST_EXPONENT: i32 = -100;

/// Of a whole number: so many candidates' fit 32 bits.
const MOST: f32 = (1 << 20) as f32;

/// Elements of 16 bytes.
const EIGHT: usize = 8;

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
        assert_eq!(sampled(100, 8, &[41, 42]), [0, 24, 41, 42, 49, 73, 98, 99]);
        assert_eq!(sampled(100, 16, &[9, 41, 99])[11..], [86, 97, 98, 99, 99]);
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
        let found = sampled(1024, 8, &[600, 801]);
        assert!(found.contains(&600) && !found.contains(&801), "{found:?}");
    }

    #[test]
    fn sums_are_of_whole_numbers() {
        let huge = [1.0, -0.5, 0.25, 3e-4, 0.0, 0.0, 0.0, 0.0];
        let other = [f32::NAN, 1e30, -1e30, 3e-4, f32::INFINITY, 0.0, 0.0, 0.0];
        let most = 1_048_576.0;
        let sums = sum_of_whole_numbers(&[huge, other].concat(), 8);
        assert_eq!(sums, [1024.0 - most, most - 512.0, 256.0 - most, 0.0, most, 0.0, 0.0, 0.0]);
        assert_eq!(sum_of_whole_numbers(&[0.0; 8], 8), [0.0; 8]);
        assert_eq!(sum_of_whole_numbers(&[1e-40; 8], 8), [0.0; 8]);
    }

    #[test]
    fn a_product_is_summed_pair_by_pair() {
        let (mut a, b) = ([1.0; 96], [1.0; 96]);
        assert_eq!(dot(&a, &b), 96.0);
        // What one half cannot hold any more the other adds before they meet.
        (a[0], a[8]) = (1.0e8, -1.0e8);
        assert_eq!(dot(&a, &b), 80.0);
    }
}
