//! Compares each stage with the reference, within errors derived from f32 arithmetic.

use compactattn::mask;
use compactattn::plan::Layout;
use compactattn::reference::keep::{Kept, Score};
use compactattn::reference::select::Scored;
use compactattn::reference::{Request, attend, chunks, select, select_step, table, union};
use compactattn::select::{Merge, merge_of};
use compactattn::settings::{KeepAt, Selector};
use compactattn::types::Dtype;

use super::case::Case;
use super::pipeline::{self, Attended, Selected};
use super::rng::Rng;

/// Why a case failed.
pub(crate) type Verdict = Result<(), String>;

/// Unit roundoff of f32.
const U: f64 = 1.0 / (1 << 24) as f64;

/// Rounding errors of independent signs add up like a random walk: `n` of them stay within `LAMBDA * sqrt(n) * U`
/// except with probability `2 exp(-LAMBDA^2 / 2)`, 3e-14 for 8 (Higham and Mary 2019, theorem 2.4).
const LAMBDA: f64 = 8.0;

/// Relative error of the crate's exp2 (stated beside it), with the rounding of its argument left to `logit_error`.
const EXP_ERROR: f64 = 4e-7;

/// What an implementation rounds, beyond what exact arithmetic would.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arithmetic {
    /// Error of one addition, relative to the larger operand.
    unit: f64,
    /// Relative error of an exponential, its rescaling included.
    exp: f64,
    /// Relative error of a softmax weight when it meets its value, and the same in absolute terms for a weight that is
    /// small beside the row's largest.
    weight: (f64, f64),
    /// Error of an element of a mean that stands for skipped tokens: relative, and absolute.
    stored_mean: (f64, f64),
}

impl Arithmetic {
    /// f32 throughout.
    pub(crate) const F32: Self =
        Self { unit: U, exp: EXP_ERROR, weight: (0.0, 0.0), stored_mean: (0.0, 0.0) };

    /// Tensor cores: they cut what f32 cannot hold instead of rounding it; each weight is rescaled at most twice (a new
    /// maximum, a combined split), each time by an exponential; weights are rounded to the values' type, where f16 has
    /// steps of 2^-24 below 2^-14, and the largest weight of a row is at least 1 before it is divided by their sum;
    /// means that stand for skipped tokens are such numbers, in the units of an e4m3 cache, so that f16's steps grow
    /// with its scale.
    pub(crate) fn tensor_cores(case: &Case) -> Self {
        let weight = match case.shape.dtype {
            Dtype::F16 => (1.0 / 2048.0, 1.0 / (1 << 25) as f64),
            _ => (1.0 / 256.0, 0.0),
        };
        let scale = case.pools.scales.iter().flatten().fold(1.0, |most: f64, &x| most.max(x.into()));
        Self { unit: 2.0 * U, exp: 3.0 * EXP_ERROR, weight, stored_mean: (weight.0, weight.1 * scale) }
    }
}

/// Runs one case through every stage; what was checked beyond doubt, or why it failed.
pub(crate) fn judge(case: &Case, seed: u64) -> Verdict {
    let layout = case.layout();
    let requests = Request::gather_all(&case.batch());
    let means = pipeline::means(case, &layout);
    let selected = pipeline::select(case, &layout, means.as_ref(), None);
    let mut lists = selected.lists.clone();
    if case.settings.selector == Selector::External {
        let given = made_up_scores(&mut Rng::new(seed), &layout);
        lists = pipeline::unite(case, &layout, &given).0;
        made_up_masks(case, &layout, &requests, &mut Rng::new(seed))?;
    } else {
        selection(case, (&layout, &requests), &selected, Arithmetic::F32)?;
    }
    let given = made_up_scores(&mut Rng::new(seed ^ 1), &layout);
    let (united, counts) = pipeline::unite(case, &layout, &given);
    union_of(&layout, &requests, &given, (&united, counts.selected))
        .map_err(|e| format!("made-up scores: {e}"))?;

    let attended = pipeline::attend_lists(case, &layout, means.as_ref(), &lists);
    let bits = list_bits(&layout, &requests, &lists);
    tables(case, &layout, &requests, (&bits, &attended))?;
    outputs(case, &layout, &requests, (&bits, &attended))
}

/// (a) Scores within error, and the sets that follow; (b) the union exact given the crate's own scores.
pub(crate) fn selection(
    case: &Case,
    (layout, requests): (&Layout, &[Request]),
    got: &Selected,
    arithmetic: Arithmetic,
) -> Verdict {
    let error = score_error(case, requests, arithmetic);
    let slack = if case.settings.selector == Selector::Quoka { error.1 } else { error.0 };
    let want = select::scores(layout, requests, slack);
    union_of(layout, requests, &got.scores, (&got.lists, got.counts.selected))?;
    for (s, span) in want.iter().enumerate().filter(|(_, span)| span.certain) {
        for (head, row) in span.rows.iter().enumerate() {
            row_of_scores(row, row_of(layout, &got.scores, s, head), error)
                .map_err(|e| format!("score of span {s}, head {head}, {e}"))?;
        }
    }
    if want.iter().any(|span| !span.certain) {
        return Ok(());
    }
    let interval = |x: &f64| {
        if x.is_nan() { Score::exact(*x) } else { Score::within(*x, error.0, error.1) }
    };
    let rows = |span: &Scored| span.rows.iter().map(|row| row.iter().map(interval).collect()).collect();
    let scores: Vec<Vec<Vec<Score>>> = want.iter().map(rows).collect();
    let sets = union::lists_of_scores(layout, requests, &scores);
    between(&sets, &list_bits(layout, requests, &got.lists)).map_err(|e| format!("selection: {e}"))
}

/// One row's scores; NaN only where the reference has it.
fn row_of_scores(want: &[f64], got: &[f32], error: (f64, f64)) -> Verdict {
    for (j, (&x, &y)) in want.iter().zip(got).enumerate() {
        let y = f64::from(y);
        let wrong = if x.is_nan() { !y.is_nan() } else { off(y, x, x.abs() * error.0 + error.1) };
        if wrong {
            return Err(format!("block {j}: {y}, not {x} ({error:?})"));
        }
    }
    Ok(())
}

/// The union of given f32 scores: exact, but for the f32 mean of merged rows.
pub(crate) fn union_of(
    layout: &Layout,
    requests: &[Request],
    scores: &[f32],
    (lists, selected): (&[u32], u64),
) -> Verdict {
    let spans = chunks(layout, requests, select_step(layout));
    let averaged =
        layout.settings.keep_at == KeepAt::List && merge_of(layout.settings.selector) == Merge::Mean;
    let rows = spans.len() * layout.shape.num_q_heads;
    // A mean of n rows: a division, a rounding per addition, and 0 only of zeros.
    let error = if averaged { (rows + 2) as f64 * U } else { 0.0 };
    let row = |(s, head): (usize, usize)| -> Vec<Score> {
        let past = requests[spans[s].req].past() / layout.settings.block_size;
        let past = if spans[s].dense { 0 } else { past };
        let exact = row_of(layout, scores, s, head)[..past].iter();
        exact
            .map(|&x| if x.is_nan() { Score::exact(f64::NAN) } else { Score::within(x.into(), error, 0.0) })
            .collect()
    };
    let heads = 0..layout.shape.num_q_heads;
    let of_span = |s: usize| heads.clone().map(|head| row((s, head))).collect();
    let given: Vec<Vec<Vec<Score>>> = (0..spans.len()).map(of_span).collect();
    let want = union::lists_of_scores(layout, requests, &given);
    let bits = list_bits(layout, requests, lists);
    between(&want, &bits).map_err(|e| format!("union: {e}"))?;
    let chosen = union::candidates(layout, requests);
    let kept: usize =
        bits.iter().zip(&chosen).map(|(bits, &n)| bits[..n].iter().filter(|&&x| x).count()).sum();
    same("selected past blocks", kept as u64, selected)
}

/// Masks that a caller made: united exactly.
fn made_up_masks(case: &Case, layout: &Layout, requests: &[Request], rng: &mut Rng) -> Verdict {
    let words = layout.mask_words();
    let spans = chunks(layout, requests, select_step(layout));
    let heads = layout.shape.num_q_heads;
    let masks = sparse_bits(rng, spans.len() * heads * words);
    let mut lists = vec![!0; layout.max_list_rows() * words];
    compactattn::union::of_masks(layout, &case.batch(), &masks, &mut lists);
    union_of_masks(layout, requests, &masks, &lists)
}

/// Words with one bit in eight set.
pub(crate) fn sparse_bits(rng: &mut Rng, words: usize) -> Vec<u32> {
    (0..words).map(|_| (rng.next() & rng.next() & rng.next()) as u32).collect()
}

/// The union of given masks: exact.
pub(crate) fn union_of_masks(layout: &Layout, requests: &[Request], masks: &[u32], lists: &[u32]) -> Verdict {
    let (words, heads) = (layout.mask_words(), layout.shape.num_q_heads);
    let spans = chunks(layout, requests, select_step(layout));
    let row = |i: usize| (0..layout.max_blocks()).map(|j| mask::get(&masks[i * words..], j)).collect();
    let given: Vec<Vec<Vec<bool>>> =
        (0..spans.len()).map(|s| (0..heads).map(|h| row(s * heads + h)).collect()).collect();
    let want = union::lists_of_masks(layout, requests, &given);
    between(&want, &list_bits(layout, requests, lists)).map_err(|e| format!("union of masks: {e}"))
}

/// (b) Every row names the slots of its tokens, in order, and nothing else.
pub(crate) fn tables(
    case: &Case,
    layout: &Layout,
    requests: &[Request],
    (bits, got): (&[Vec<bool>], &Attended),
) -> Verdict {
    let tokens = table::tokens(layout, requests, bits);
    let want = table::slots(layout, &case.batch(), requests, &tokens);
    same("table rows", want.len(), got.rows)?;
    let box_tokens = layout.shape.page_size.min(layout.settings.block_size);
    let per_page = layout.shape.page_size / box_tokens;
    for (row, want) in want.iter().enumerate() {
        let at = |what: &str| format!("{what} of table row {row}");
        same(&at("tokens"), want.len(), got.stream_lens[row] as usize)?;
        same(&at("boxes"), want.len().div_ceil(box_tokens), got.counts[row] as usize)?;
        let boxes = &got.boxes[row * layout.max_boxes()..][..got.counts[row] as usize];
        let slots = boxes.iter().flat_map(|&b| {
            let (page, part) = (b as usize / per_page, b as usize % per_page);
            (0..box_tokens).map(move |i| (page, part * box_tokens + i))
        });
        // Only the last box of a row may be partial.
        if !slots.take(want.len()).eq(want.iter().copied()) {
            return Err(at("slots"));
        }
    }
    Ok(())
}

/// (c) Outputs and log-sum-exps within f32 arithmetic and one rounding to the output's type.
pub(crate) fn outputs(
    case: &Case,
    layout: &Layout,
    requests: &[Request],
    attended: (&[Vec<bool>], &Attended),
) -> Verdict {
    outputs_in(Arithmetic::F32, case, (layout, requests), attended)
}

/// (c) as above, within the errors of some arithmetic.
pub(crate) fn outputs_in(
    arithmetic: Arithmetic,
    case: &Case,
    (layout, requests): (&Layout, &[Request]),
    (bits, got): (&[Vec<bool>], &Attended),
) -> Verdict {
    let want = attend::attend(layout, requests, bits);
    for (head, rows) in want.iter().enumerate() {
        for (token, row) in rows.iter().enumerate() {
            let lse = f64::from(got.lse[head * got.lse_stride + token]);
            let out = got.out.read(token, head, layout.shape.head_dim);
            row_agrees(arithmetic, case, row, (lse, &out))
                .map_err(|e| format!("head {head}, token {token}: {e}"))?;
        }
    }
    Ok(())
}

fn row_agrees(arithmetic: Arithmetic, case: &Case, want: &attend::Row, (lse, out): (f64, &[f32])) -> Verdict {
    if want.terms == 0 {
        let empty = lse == f64::NEG_INFINITY && out.iter().all(|&x| x == 0.0);
        return if empty { Ok(()) } else { Err(format!("sees nothing, but lse {lse}, out {:?}", &out[..4])) };
    }
    // Each weight is off by its logit's error and exp's; sums of n terms by a random walk, once for the weights and
    // once for the values; splits add one more weighted sum each.
    let walk = LAMBDA * ((want.terms + 8) as f64).sqrt();
    let weight = logit_error(case, want.reach, arithmetic) + arithmetic.exp + walk * arithmetic.unit;
    // A rounded mean key moves its weight by a factor of at most 1 + shift, and the sum by that times its share.
    let means = &want.means;
    let shift = (arithmetic.stored_mean.0 * means.reach + arithmetic.stored_mean.1 * means.slope).exp_m1();
    let lse_error = weight + 2.0 * U * (want.lse.abs() + 1.0) + shift * means.share;
    if off(lse, want.lse, lse_error) {
        return Err(format!("lse {lse}, not {} (+-{lse_error:.1e})", want.lse));
    }
    let rounding = match case.shape.dtype {
        Dtype::Bf16 => 1.0 / 256.0,
        Dtype::F16 => 1.0 / 2048.0,
        _ => U,
    };
    for (x, &got) in out.iter().enumerate() {
        // A rounded weight's error grows with its value, of which none here exceeds 3.75 (3.5, rounded to 4 bits);
        // roundings are independent.
        let rounded = arithmetic.weight.0 * want.spread[x] + arithmetic.weight.1 * walk * 3.75;
        // Sum and weighted sum move by a factor of at most 1 + shift, and values are rounded too.
        let moved = shift * (1.0 + shift) * (means.spread[x] + means.share * want.out[x].abs());
        let stored = arithmetic.stored_mean.0 * means.spread[x] + arithmetic.stored_mean.1 * means.share;
        let computed = 2.0 * weight * want.spread[x] + rounded + moved + stored;
        // f16 loses relative precision below 2^-14: half of its smallest step on top.
        let error = computed + rounding * (want.out[x].abs() + computed) + 3e-8;
        if off(f64::from(got), want.out[x], error) {
            return Err(format!("out[{x}] {got}, not {} (+-{error:.1e})", want.out[x]));
        }
    }
    Ok(())
}

/// Absolute error of an f32 logit whose `|q| |k| sm_scale` is at most `reach`: a dot product of `head_dim` terms, the
/// scale, the change of base, and the rounding of a mean key. A key of an e4m3 pool is rounded once more where it is
/// multiplied by its scale, term by term.
fn logit_error(case: &Case, reach: f64, arithmetic: Arithmetic) -> f64 {
    let terms =
        if case.shape.kv_dtype == Dtype::E4m3 { 2 * case.shape.head_dim } else { case.shape.head_dim };
    LAMBDA * ((terms + 8) as f64).sqrt() * arithmetic.unit * reach
}

/// Relative and absolute error of a score.
fn score_error(case: &Case, requests: &[Request], arithmetic: Arithmetic) -> (f64, f64) {
    let longest = |x: &Vec<Vec<Vec<f64>>>| {
        let squares = x.iter().flatten().map(|v| v.iter().map(|x| x * x).sum::<f64>());
        squares.fold(0.0, f64::max).sqrt()
    };
    let reach = |r: &Request| longest(&r.q) * longest(&r.k) * f64::from(case.shape.sm_scale);
    let reach = requests.iter().map(reach).fold(0.0, f64::max);
    let terms = requests.iter().map(|r| r.kv_len.max(r.q_len)).max().unwrap_or(0);
    if case.settings.selector == Selector::Quoka {
        // Cosines: unit vectors, so a dot product's error is absolute.
        return (0.0, 4.0 * LAMBDA * ((case.shape.head_dim + terms) as f64).sqrt() * U);
    }
    // Numerator and denominator each carry the weights' error and a sum's; 1e-37: weights that f32 cannot hold.
    let sums = LAMBDA * ((terms + 8) as f64).sqrt() * arithmetic.unit;
    let weight = logit_error(case, reach, arithmetic) + arithmetic.exp + sums;
    (2.0 * weight, 1e-37)
}

/// Scores with many ties, some NaN: what no selector of ours makes, and a caller may.
pub(crate) fn made_up_scores(rng: &mut Rng, layout: &Layout) -> Vec<f32> {
    let len = layout.score_len().expect("checked by Layout::new");
    let steps = rng.pick(&[1, 4, 64]);
    let nan = rng.once_in(3);
    let one = |rng: &mut Rng| {
        let x = rng.below(steps + 1) as f32 / steps as f32;
        if nan && rng.once_in(50) { f32::NAN } else { x }
    };
    (0..len).map(|_| one(rng)).collect()
}

fn row_of<'a>(layout: &Layout, scores: &'a [f32], span: usize, head: usize) -> &'a [f32] {
    let stride = layout.max_blocks();
    &scores[(span * layout.shape.num_q_heads + head) * stride..][..stride]
}

/// Bits of each list, up to the blocks of its span's end.
pub(crate) fn list_bits(layout: &Layout, requests: &[Request], lists: &[u32]) -> Vec<Vec<bool>> {
    let spans = chunks(layout, requests, layout.settings.scope.query_span);
    let per_span = layout.lists_per_span();
    let bits = |i: usize| {
        let span = &spans[i / per_span];
        let end = requests[span.req].visible(span.tokens.end - 1);
        let row = &lists[i * layout.mask_words()..];
        (0..end.div_ceil(layout.settings.block_size)).map(|j| mask::get(row, j)).collect()
    };
    (0..spans.len() * per_span).map(bits).collect()
}

/// Every list holds what it must and nothing that it may not.
fn between(want: &[Kept], got: &[Vec<bool>]) -> Verdict {
    same("lists", want.len(), got.len())?;
    for (i, (want, got)) in want.iter().zip(got).enumerate() {
        same(&format!("blocks of list {i}"), want.must.len(), got.len())?;
        for j in 0..got.len() {
            if want.must[j] && !got[j] {
                return Err(format!("list {i} of {} lacks block {j} of {}", got.len(), want.must.len()));
            }
            if got[j] && !want.may[j] {
                return Err(format!("list {i} has block {j} of {}", want.must.len()));
            }
        }
    }
    Ok(())
}

/// Whether `got` is farther than `error` from `want`; NaN is.
fn off(got: f64, want: f64, error: f64) -> bool {
    got.is_nan() || (got - want).abs() > error
}

#[expect(clippy::needless_pass_by_value, reason = "counts and the like, made for the call")]
fn same<T: PartialEq + std::fmt::Debug>(what: &str, want: T, got: T) -> Verdict {
    if want == got { Ok(()) } else { Err(format!("{what}: {got:?}, not {want:?}")) }
}
