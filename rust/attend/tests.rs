//! What attend and combine promise, against plain f64 attention.

use std::ops::Range;

use super::{Correction, Partials, attend};
use crate::Parallel;
use crate::combine::combine;
use crate::fixture::{Lists, Paged, Request, Store, over_e4m3, shape};
use crate::mask;
use crate::plan::Layout;
use crate::settings::{Scope, Selector, Settings};
use crate::summaries::{self, Summaries, SummariesMut, Which};
use crate::tensor::{LseMut, TokensMut};
use crate::types::Dtype;

/// `out [total_q, num_q_heads, head_dim]` and `lse [num_q_heads, total_q]`.
#[derive(Clone, Debug)]
struct Answer<T> {
    out: Vec<T>,
    lse: Vec<T>,
}

impl Answer<f32> {
    fn bits(&self) -> Vec<u32> {
        self.out.iter().chain(&self.lse).map(|x| x.to_bits()).collect()
    }
}

#[derive(Clone, Copy)]
struct How<'a> {
    splits: usize,
    threads: usize,
    correction: Option<&'a Correction<'a>>,
}

const PLAIN: How<'static> = How { splits: 1, threads: 1, correction: None };

/// attend, then combine, in the shape's dtype.
fn run(paged: &Paged, layout: &Layout, lists: &Lists, how: How) -> Answer<f32> {
    let batch = paged.batch();
    let (total_q, heads, head_dim) = (batch.total_q(), layout.shape.num_q_heads, layout.shape.head_dim);
    let mut out = vec![f32::NAN; how.splits * total_q * heads * head_dim];
    let mut lse = vec![f32::NAN; how.splits * total_q * heads];
    let mut partials = Partials { splits: how.splits, out: &mut out, lse: &mut lse };
    let parallel = Parallel::new(how.threads);
    attend(layout, &batch, &lists.table(), how.correction, &mut partials, parallel);
    let mut store = Store::dirty(layout.shape.dtype, total_q * heads * head_dim);
    let mut lse = vec![f32::NAN; heads * total_q];
    let mut tokens =
        TokensMut { elements: store.view_mut(), stride_token: heads * head_dim, stride_head: head_dim };
    let mut lse_mut = LseMut { elements: &mut lse, stride_head: total_q };
    combine(layout, &batch, &partials, &mut tokens, Some(&mut lse_mut), parallel);
    Answer { out: store.to_f32(), lse }
}

/// Every answer of plain attention in f64, with the error an f32 evaluation may make.
struct Plain {
    answer: Answer<f64>,
    /// As `answer.out`: bound on the error of f32 arithmetic.
    out_error: Vec<f64>,
    /// As `answer.lse`.
    lse_error: Vec<f64>,
}

/// f64 attention over the tokens that the lists' bits name; with `means`, over means of 512 for the others.
fn plain(paged: &Paged, layout: &Layout, bits: &[u32], means: bool) -> Plain {
    let batch = paged.batch();
    let (total_q, heads, head_dim) = (batch.total_q(), layout.shape.num_q_heads, layout.shape.head_dim);
    let n = total_q * heads;
    let answer = Answer { out: vec![0.0; n * head_dim], lse: vec![f64::NEG_INFINITY; n] };
    let mut plain = Plain { answer, out_error: vec![0.0; n * head_dim], lse_error: vec![0.0; n] };
    let spans = layout.list_spans(&batch);
    for (row, bits) in
        bits.chunks(layout.mask_words()).take(spans.len() * layout.lists_per_span()).enumerate()
    {
        let span = spans[row / layout.lists_per_span()];
        let (kv_head, q_heads) = layout.list_heads(row % layout.lists_per_span());
        for (head, token) in q_heads.flat_map(|h| (0..span.len).map(move |t| (h, t))) {
            let request = &paged.requests[span.req];
            let mut terms = listed(layout, request, kv_head, (bits, span.visible(token)));
            let past = if means { layout.geometry.past_blocks(span.past) } else { 0 };
            terms.extend(skipped(layout, request, kv_head, (bits, past)));
            let q = vector(&request.q, heads, (span.first + token, head), head_dim);
            let at = span.q_start + token;
            plain.row(layout, (at * heads + head, head * total_q + at), &q, &terms);
        }
    }
    plain
}

/// Visible tokens whose block is listed.
fn listed(layout: &Layout, request: &Request, kv_head: usize, (bits, visible): (&[u32], usize)) -> Vec<Term> {
    let (heads, head_dim) = (layout.shape.num_kv_heads, layout.shape.head_dim);
    let of = |data: &[f32], token| vector(data, heads, (token, kv_head), head_dim);
    let tokens = (0..visible).filter(|&t| mask::get(bits, t / layout.geometry.block_size));
    tokens.map(|t| (1.0, of(&request.k, t), of(&request.v, t))).collect()
}

/// Means of 512 past tokens, where any of them is not listed.
fn skipped(layout: &Layout, request: &Request, kv_head: usize, (bits, past): (&[u32], usize)) -> Vec<Term> {
    let (heads, head_dim) = (layout.shape.num_kv_heads, layout.shape.head_dim);
    let (size, end) = (layout.geometry.block_size, past * layout.geometry.block_size);
    let mean = |data: &[f32], tokens: &Range<usize>| {
        let mut mean = vec![0.0; head_dim];
        for token in tokens.clone() {
            for (m, x) in mean.iter_mut().zip(vector(data, heads, (token, kv_head), head_dim)) {
                *m += x / tokens.len() as f64;
            }
        }
        mean
    };
    let left_out = |tokens: &Range<usize>| tokens.clone().filter(|t| !mask::get(bits, t / size)).count();
    let runs = (0..end).step_by(512).map(|first| first..end.min(first + 512));
    let skipped = runs.filter(|run| left_out(run) > 0);
    skipped.map(|run| (1.5 * left_out(&run) as f64, mean(&request.k, &run), mean(&request.v, &run))).collect()
}

/// One vector of `data [tokens, heads, head_dim]`.
fn vector(data: &[f32], heads: usize, (token, head): (usize, usize), head_dim: usize) -> Vec<f64> {
    data[(token * heads + head) * head_dim..][..head_dim].iter().map(|&x| f64::from(x)).collect()
}

/// Tokens that a term stands for, its key, its value.
type Term = (f64, Vec<f64>, Vec<f64>);

impl Plain {
    fn row(&mut self, layout: &Layout, (out_row, lse_row): (usize, usize), q: &[f64], terms: &[Term]) {
        let head_dim = layout.shape.head_dim;
        let scale = f64::from(layout.shape.sm_scale);
        let dot = |k: &[f64]| q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>() * scale;
        let scores: Vec<f64> = terms.iter().map(|(_, k, _)| dot(k)).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if terms.is_empty() {
            return;
        }
        let weights: Vec<f64> = scores.iter().zip(terms).map(|(s, (n, ..))| n * (s - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        // u = 2^-24. A score sums head_dim products: error (head_dim + 4) u sum|q k| (scale, subtraction and the
        // rounding of block means included). exp2 adds 4e-7. A weight's relative error is their sum, and twice that
        // after the division by the sum of weights. Sums run over 64 terms, then tile by tile, then split by split;
        // the factors between tiles multiply sum and values alike, but are rounded: 3 u a tile.
        let u = 2.0_f64.powi(-24);
        let absolute = |k: &[f64]| q.iter().zip(k).map(|(a, b)| (a * b).abs()).sum::<f64>() * scale;
        let largest = terms.iter().map(|(_, k, _)| absolute(k)).fold(0.0, f64::max);
        let weight_error = (head_dim as f64 + 6.0) * u * (largest + max.abs()) + 4e-7;
        let tiles = terms.len() as f64 / 64.0 + 8.0;
        let relative = 2.0 * weight_error + 2.0 * (64.0 + 4.0 * tiles) * u;
        self.answer.lse[lse_row] = max + sum.ln();
        self.lse_error[lse_row] = relative + 4.0 * u * (max.abs() + sum.ln().abs());
        for x in 0..head_dim {
            let mean = |f: fn(f64) -> f64| {
                terms.iter().zip(&weights).map(|((_, _, v), w)| f(v[x]) * w / sum).sum::<f64>()
            };
            self.answer.out[out_row * head_dim + x] = mean(|v| v);
            self.out_error[out_row * head_dim + x] = relative * mean(f64::abs);
        }
    }

    /// Compares, with half a unit in the last place of `dtype` for rounding out.
    fn check(&self, got: &Answer<f32>, dtype: Dtype) {
        let unit = match dtype {
            Dtype::Bf16 => 2.0_f64.powi(-8),
            Dtype::F16 => 2.0_f64.powi(-11),
            _ => 2.0_f64.powi(-24),
        };
        // Half the spacing of f16's subnormals.
        let tiny = 2.0_f64.powi(-25);
        for (i, (&got, &want)) in got.out.iter().zip(&self.answer.out).enumerate() {
            let error = self.out_error[i] + unit * (want.abs() + self.out_error[i]) + tiny;
            assert!((f64::from(got) - want).abs() <= error, "out[{i}]: {got}, wanted {want} +- {error}");
        }
        for (i, (&got, &want)) in got.lse.iter().zip(&self.answer.lse).enumerate() {
            let close = (f64::from(got) - want).abs() <= self.lse_error[i];
            assert!(
                close || f64::from(got) == want,
                "lse[{i}]: {got}, wanted {want} +- {}",
                self.lse_error[i]
            );
        }
    }
}

fn settings(scope: Scope, block_size: usize) -> Settings {
    let mut settings = Settings { scope, block_size, ..Settings::of(Selector::External) };
    settings.dense.below_kv_len = 0;
    settings.dense.max_q_len = 0;
    settings
}

const SCOPES: [Scope; 4] = [
    Scope::GROUP_CHUNK,
    Scope::HEAD_CHUNK,
    Scope { query_span: 128, heads_per_list: 0 },
    Scope { query_span: 128, heads_per_list: 2 },
];

/// Chunks with an unaligned past and a partial last page, longer than their KV, without KV, and decode.
const LENS: [(usize, usize); 6] = [(70, 213), (1, 100), (150, 97), (5, 0), (0, 30), (33, 33)];

#[test]
fn full_lists_are_plain_attention_for_every_shape_and_dtype() {
    let dtypes = [Dtype::Bf16, Dtype::F16, Dtype::F32];
    for (i, head_dim) in [64, 96, 128, 256].into_iter().enumerate() {
        for (j, group) in [1, 3, 7].into_iter().enumerate() {
            let dtype = dtypes[(i + j) % 3];
            let page_size = [16, 64, 256][(i + 2 * j) % 3];
            let shape = shape(2, group, head_dim, page_size, dtype);
            for shape in [shape, over_e4m3(shape)] {
                let paged = Paged::random(i as u64, shape, &LENS);
                let layout = paged.layout(settings(SCOPES[(i + j) % 4], [128, 16, 64, 1][i]));
                let lists = Lists::random(1, &layout, &paged.batch(), 1.0);
                plain(&paged, &layout, &lists.bits, false).check(&run(&paged, &layout, &lists, PLAIN), dtype);
            }
        }
    }
}

#[test]
fn sparse_lists_are_plain_attention_over_their_blocks() {
    for (i, scope) in SCOPES.into_iter().enumerate() {
        for (page_size, block_size) in [(16, 64), (128, 16), (32, 1), (64, 64)] {
            let paged =
                Paged::random(i as u64, shape(2, 3, 64, page_size, Dtype::F32), &[(40, 700), (140, 333)]);
            let layout = paged.layout(settings(scope, block_size));
            let lists = Lists::random(7, &layout, &paged.batch(), 0.3);
            plain(&paged, &layout, &lists.bits, false)
                .check(&run(&paged, &layout, &lists, PLAIN), Dtype::F32);
        }
    }
}

#[test]
fn splits_agree_with_plain_attention_whatever_their_number() {
    let paged = Paged::random(3, shape(2, 3, 64, 16, Dtype::F32), &LENS);
    let layout = paged.layout(settings(Scope::GROUP_CHUNK, 32));
    let lists = Lists::random(5, &layout, &paged.batch(), 0.6);
    let plain = plain(&paged, &layout, &lists.bits, false);
    for splits in [1, 2, 7, 40] {
        plain.check(&run(&paged, &layout, &lists, How { splits, ..PLAIN }), Dtype::F32);
    }
}

#[test]
fn means_stand_in_for_skipped_blocks_in_one_split_only() {
    let spans_of_groups = Scope { query_span: 128, heads_per_list: 0 };
    for (splits, scope, block_size) in
        [(1, Scope::HEAD_CHUNK, 16), (3, spans_of_groups, 64), (1, spans_of_groups, 256)]
    {
        let shape = shape(2, 3, 128, 64, Dtype::Bf16);
        let shape = if splits == 1 { over_e4m3(shape) } else { shape };
        let paged = Paged::random(9, shape, &[(130, 1500), (20, 410), (9, 4)]);
        let layout = paged.layout(settings(scope, block_size));
        let batch = paged.batch();
        let lists = Lists::random(5, &layout, &batch, 0.3);
        let mut k_mean = vec![f32::NAN; summaries::len(&layout, paged.num_pages)];
        let mut v_mean = k_mean.clone();
        let mut out = SummariesMut { k_mean: &mut k_mean, v_mean: Some(&mut v_mean), seals: None };
        summaries::update(&layout, &batch, Which::All, &mut out, Parallel::new(1));
        let means = Summaries { k_mean: &k_mean, v_mean: Some(&v_mean) };
        let correction = Correction::new(&lists.bits, means).unwrap();
        let got = run(&paged, &layout, &lists, How { splits, threads: 2, correction: Some(&correction) });
        plain(&paged, &layout, &lists.bits, true).check(&got, Dtype::Bf16);
        assert!(Correction::new(&lists.bits, Summaries { v_mean: None, ..means }).is_err());
    }
}

#[test]
fn threads_pages_and_neighbours_change_no_bit() {
    let paged = Paged::random(4, shape(2, 3, 64, 16, Dtype::Bf16), &[(70, 213), (9, 500), (150, 97)]);
    let layout = paged.layout(settings(Scope::GROUP_CHUNK, 32));
    let bits = Lists::random(5, &layout, &paged.batch(), 0.5).bits;
    let lists = |paged: &Paged, bits: &[u32]| Lists::of_bits(&layout, &paged.batch(), bits.to_vec());
    let want = run(&paged, &layout, &lists(&paged, &bits), How { splits: 2, ..PLAIN });
    let threads =
        run(&paged, &layout, &lists(&paged, &bits), How { splits: 2, threads: 4, correction: None });
    assert_eq!(want.bits(), threads.bits());
    let moved = paged.repaged(99);
    assert_ne!(paged.block_table, moved.block_table);
    let moved = run(&moved, &layout, &lists(&moved, &bits), How { splits: 2, ..PLAIN });
    assert_eq!(want.bits(), moved.bits());
    let row = layout.lists_per_span() * layout.mask_words();
    let alone = paged.only(1, 5);
    let alone = run(&alone, &layout, &lists(&alone, &bits[row..2 * row]), How { splits: 2, ..PLAIN });
    assert_eq!(want.out[70 * 6 * 64..79 * 6 * 64], alone.out);
}

/// The request's answer after `change` to its contents.
fn changed(paged: &Paged, layout: &Layout, bits: &[u32], change: impl Fn(&mut Request)) -> Answer<f32> {
    let mut requests = paged.requests.clone();
    change(&mut requests[0]);
    let paged = Paged::place(77, paged.shape, requests);
    run(&paged, layout, &Lists::of_bits(layout, &paged.batch(), bits.to_vec()), PLAIN)
}

#[test]
fn what_no_list_names_is_never_read() {
    let shape = shape(1, 3, 64, 16, Dtype::F32);
    for shape in [shape, over_e4m3(shape)] {
        let paged = Paged::random(4, shape, &[(40, 600)]);
        let layout = paged.layout(settings(Scope::GROUP_CHUNK, 32));
        let lists = Lists::random(5, &layout, &paged.batch(), 0.4);
        let want = run(&paged, &layout, &lists, PLAIN);
        let poisoned = changed(&paged, &layout, &lists.bits, |request| {
            for t in (0..600).filter(|t| !mask::get(&lists.bits, t / 32)) {
                request.k[t * 64..][..64].fill(f32::NAN);
                request.v[t * 64..][..64].fill(if t % 2 == 0 { f32::NAN } else { f32::INFINITY });
            }
        });
        assert_eq!(want.bits(), poisoned.bits());
    }
}

#[test]
fn nan_reaches_the_rows_that_see_it_and_no_other() {
    let paged = Paged::random(4, shape(1, 3, 64, 16, Dtype::F32), &[(100, 333)]);
    let layout = paged.layout(settings(Scope::GROUP_CHUNK, 32));
    let lists = Lists::random(5, &layout, &paged.batch(), 1.0);
    let want = run(&paged, &layout, &lists, PLAIN);
    let row = |answer: &Answer<f32>, i: usize| answer.out[i * 64..][..64].to_vec();
    let poison: [&dyn Fn(&mut Request); 3] =
        [&|r| r.k[290 * 64 + 5] = f32::NAN, &|r| r.v[290 * 64..][..64].fill(f32::NAN), &|r| {
            r.v[290 * 64..][..64].fill(f32::INFINITY)
        }];
    for change in poison {
        let got = changed(&paged, &layout, &lists.bits, change);
        for i in 0..300 {
            let sees = 233 + i / 3 >= 290;
            assert_eq!(row(&got, i).iter().all(|x| !x.is_finite()), sees, "row {i}");
            assert!(sees || row(&got, i) == row(&want, i), "row {i}");
        }
    }
    let got = changed(&paged, &layout, &lists.bits, |r| r.q[100 * 64] = f32::NAN);
    for i in 0..300 {
        assert_eq!(row(&got, i).iter().all(|x| x.is_nan()), i == 100, "row {i}");
        assert!(i == 100 || row(&got, i) == row(&want, i), "row {i}");
    }
}

#[test]
fn scores_of_minus_infinity_weigh_nothing() {
    let paged = Paged::random(4, shape(1, 1, 64, 16, Dtype::F32), &[(2, 20)]);
    let layout = paged.layout(settings(Scope::GROUP_CHUNK, 16));
    let bits = Lists::random(5, &layout, &paged.batch(), 1.0).bits;
    let got = changed(&paged, &layout, &bits, |r| {
        r.q.fill(1.0);
        r.k.chunks_mut(64).for_each(|k| k[0] = f32::NEG_INFINITY);
    });
    assert!(got.out.iter().all(|&x| x == 0.0) && got.lse == [f32::NEG_INFINITY; 2]);
}

#[test]
#[ignore = "a timing, not a law"]
fn attend_rate() {
    let shape = shape(3, 3, 64, 16, Dtype::Bf16);
    let paged = Paged::random(4, shape, &[(1024, 8187)]);
    for (name, scope, density) in [
        ("dense", Scope::GROUP_CHUNK, 1.0),
        ("group", Scope::GROUP_CHUNK, 0.3),
        ("head", Scope::HEAD_CHUNK, 0.3),
        ("head_128", Scope::HEAD_128, 0.3),
    ] {
        let layout = paged.layout(settings(scope, 128));
        let lists = Lists::random(5, &layout, &paged.batch(), density);
        for threads in [1, 2] {
            let start = std::time::Instant::now();
            let answer = run(&paged, &layout, &lists, How { threads, ..PLAIN });
            println!("{name} {threads} threads: {:.3} s {}", start.elapsed().as_secs_f64(), answer.out[0]);
        }
    }
}
