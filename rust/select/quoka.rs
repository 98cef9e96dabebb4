//! quoka: the chunk's most unusual queries judge every past key by cosine (QUOKA, arXiv 2602.08722).
//!
//! For each query head of the group, queries are ranked by their cosine to the head's mean query, lowest first and
//! ties by position, and the first `floor(quoka_query_ratio * len)`, at least one, are kept. Unit-length kept queries
//! of equal rank are averaged over the group's heads. The paper leaves that pairing open (its top-k is unsorted);
//! this order defines it. A past key's score is the largest dot product of its unit vector with an averaged query,
//! moved from [-1, 1] to [0, 1] by `(1 + x) / 2`. A block's score is that of its best token, so a block of 1 is
//! token selection and larger blocks are page scores. All heads of the group share the scores.
//!
//! The kept keys are the past only: no token of the chunk has a say in a key's norm or score beyond its query.

use super::{Input, Unit, max_or_nan};
use crate::math::{Mat, gemm, transpose};
use crate::plan::Span;

/// Scores the unit's past blocks. Reads each past key once: `2 * kept * past * head_dim` FLOP.
pub(super) fn score(input: &Input, unit: &mut Unit) {
    let head_dim = input.layout.shape.head_dim;
    let queries = unusual_queries(input, &unit.span, unit.kv_head);
    let kept = queries.len() / head_dim;
    let mut by_column = vec![0.0; queries.len()];
    transpose(&queries, kept, head_dim, &mut by_column);

    let block_size = input.layout.geometry.block_size;
    let past = unit.past_blocks * block_size;
    let mut keys = vec![0.0; TILE_TOKENS * head_dim];
    let mut dots = vec![0.0; TILE_TOKENS * kept];
    unit.scores[..unit.past_blocks].fill(0.0);
    for first in (0..past).step_by(TILE_TOKENS) {
        let tokens = TILE_TOKENS.min(past - first);
        let keys = &mut keys[..tokens * head_dim];
        input.batch.load_k(unit.span.req, unit.kv_head, first..first + tokens, keys);
        keys.chunks_exact_mut(head_dim).for_each(to_unit_length);
        let dots = &mut dots[..tokens * kept];
        dots.fill(0.0);
        gemm(Mat::new(keys, head_dim), Mat::new(&by_column, kept), dots, kept, [tokens, kept, head_dim]);
        for (i, row) in dots.chunks_exact(kept).enumerate() {
            let best = row.iter().copied().fold(f32::NEG_INFINITY, max_or_nan);
            let block = &mut unit.scores[(first + i) / block_size];
            *block = max_or_nan(*block, best.midpoint(1.0).clamp(0.0, 1.0));
        }
    }
    unit.share_first_row();
}

/// Averaged unusual queries `[kept, head_dim]`, rank by rank over the heads of the group.
fn unusual_queries(input: &Input, span: &Span, kv_head: usize) -> Vec<f32> {
    let shape = &input.layout.shape;
    let (group, head_dim) = (shape.group_size(), shape.head_dim);
    let kept = kept_queries(input.layout.settings.quoka_query_ratio, span.len);
    let mut average = vec![0.0; kept * head_dim];
    let mut queries = vec![0.0; span.len * head_dim];
    for head in kv_head * group..(kv_head + 1) * group {
        for (i, query) in queries.chunks_exact_mut(head_dim).enumerate() {
            input.batch.q().load(span.q_start + i, head, query);
        }
        let order = least_typical_first(&queries, head_dim);
        for (&i, sum) in order.iter().zip(average.chunks_exact_mut(head_dim)) {
            let query = &mut queries[i * head_dim..(i + 1) * head_dim];
            to_unit_length(query);
            for (a, x) in sum.iter_mut().zip(query) {
                *a += *x / group as f32;
            }
        }
    }
    average
}

/// Queries kept of `len`.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a share of len, between 0 and len"
)]
fn kept_queries(ratio: f32, len: usize) -> usize {
    ((f64::from(ratio) * len as f64).floor() as usize).clamp(1, len)
}

/// Indices of `queries [n, head_dim]` by their cosine to the mean query, lowest first, ties by index.
///
/// In f64, so the order (which decides what is averaged with what) does not hang on the order of summation.
fn least_typical_first(queries: &[f32], head_dim: usize) -> Vec<usize> {
    // The mean's length does not change the order of cosines: the sum does as well.
    let mut sum = vec![0.0_f64; head_dim];
    for query in queries.chunks_exact(head_dim) {
        sum.iter_mut().zip(query).for_each(|(s, &x)| *s += f64::from(x));
    }
    let cosines: Vec<f64> = queries
        .chunks_exact(head_dim)
        .map(|query| {
            let dot: f64 = query.iter().zip(&sum).map(|(&x, s)| f64::from(x) * s).sum();
            let norm: f64 = query.iter().map(|&x| f64::from(x).powi(2)).sum();
            dot / norm.sqrt().max(f64::from(SHORTEST))
        })
        .collect();
    let mut order: Vec<usize> = (0..cosines.len()).collect();
    order.sort_by(|&a, &b| cosines[a].total_cmp(&cosines[b]).then(a.cmp(&b)));
    order
}

/// Scales `x` to length 1; the zero vector stays zero.
fn to_unit_length(x: &mut [f32]) {
    let norm = x.iter().map(|v| v * v).sum::<f32>().sqrt().max(SHORTEST);
    x.iter_mut().for_each(|v| *v /= norm);
}

/// Keys a tile of dot products holds: with 256 kept queries the tile fits a core's second-level cache.
const TILE_TOKENS: usize = 256;

/// Vectors shorter than this count as zero: they are like nothing.
const SHORTEST: f32 = 1e-12;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Paged, Request, shape};
    use crate::plan::Layout;
    use crate::select::scored::{
        assert_equals, assert_later_keys_do_not_matter, assert_laws, k, q, score, settings,
    };
    use crate::settings::{Selector, Settings};
    use crate::types::Dtype;

    fn unit(x: Vec<f64>) -> Vec<f64> {
        let norm = x.iter().map(|v| v * v).sum::<f64>().sqrt();
        x.into_iter().map(|v| v / norm).collect()
    }

    fn dot(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(x, y)| x * y).sum()
    }

    /// The definition, a query, a rank and a key at a time.
    fn formula(layout: &Layout, r: &Request, span: &Span, head: usize) -> Vec<f64> {
        let group = layout.shape.group_size();
        let kv_head = head / group;
        assert_eq!(layout.settings.quoka_query_ratio, 0.25);
        let kept = (span.len / 4).max(1);
        let mut averaged = vec![vec![0.0; layout.shape.head_dim]; kept];
        for h in kv_head * group..(kv_head + 1) * group {
            let all: Vec<Vec<f64>> =
                (0..span.len).map(|i| q(layout, r, span.first + i, h).collect()).collect();
            let mean = (0..layout.shape.head_dim).map(|x| all.iter().map(|v| v[x]).sum()).collect();
            let mean = unit(mean);
            let mut units: Vec<Vec<f64>> = all.into_iter().map(unit).collect();
            units.sort_by(|a, b| dot(a, &mean).total_cmp(&dot(b, &mean)));
            for (sum, query) in averaged.iter_mut().zip(units) {
                sum.iter_mut().zip(query).for_each(|(s, x)| *s += x / group as f64);
            }
        }
        let size = layout.geometry.block_size;
        let token = |t: usize| {
            let key = unit(k(layout, r, t, kv_head).collect());
            averaged.iter().map(|query| (1.0 + dot(query, &key)) / 2.0).fold(0.0, f64::max)
        };
        (0..span.past / size).map(|j| (j * size..(j + 1) * size).map(token).fold(0.0, f64::max)).collect()
    }

    fn paged() -> Paged {
        Paged::random(3, shape(2, 3, 64, 16, Dtype::Bf16), &[(40, 333), (3, 20), (130, 400)])
    }

    #[test]
    fn scores_are_the_best_cosine_of_a_kept_query() {
        // A dot product of two vectors no longer than 1 over n terms errs by at most n * eps / 2, here halved again by
        // (1 + x) / 2; normalising adds another n / 2 for each vector. Scores of the best queries exceed 1/2.
        let tolerance = 2.0 * 64.0 * f64::from(f32::EPSILON);
        for block_size in [1, 16] {
            let settings = Settings { block_size, ..settings(Selector::Quoka) };
            assert_equals(&paged(), settings, None, tolerance, formula);
        }
    }

    #[test]
    fn scores_ignore_pages_neighbours_and_dirty_slots() {
        assert_laws(&paged(), settings(Selector::Quoka), None);
    }

    #[test]
    fn keys_of_the_chunk_never_matter_and_those_of_the_past_do() {
        let settings = settings(Selector::Quoka);
        assert_later_keys_do_not_matter(&paged(), settings, None, (293, |_| true));
        assert!(assert_later_keys_do_not_matter(&paged(), settings, None, (292, |_| false)) > 0);
    }

    #[test]
    fn a_key_along_the_odd_query_out_scores_one_whatever_its_length() {
        let shape = shape(1, 1, 64, 16, Dtype::F32);
        let mut request = Request::random(1, &shape, 8, 108);
        request.q.fill(1.0);
        let (odd, needle) = (5 * 64, 77 * 64);
        for x in 0..64 {
            let value = if x % 2 == 0 { 1.0 } else { -1.0 };
            request.q[odd + x] = value;
            request.k[needle + x] = 1e-3 * value;
        }
        let (_, scores) = score(&Paged::place(2, shape, vec![request]), settings(Selector::Quoka), None);
        // 0.25 of 8 queries are kept: the odd one first. Two normalisations round.
        assert!((scores[77] - 1.0).abs() < 1e-5, "{}", scores[77]);
        assert!(scores[..100].iter().enumerate().all(|(j, &x)| j == 77 || x < 0.9));
    }
}
