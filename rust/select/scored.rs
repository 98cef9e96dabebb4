//! What the tests of selectors share: score a random batch, compare with a formula, check the common laws.

use super::{GateLayer, Input};
use crate::fixture::{Paged, Request};
use crate::parallel::Parallel;
use crate::plan::{Layout, Span};
use crate::settings::{DenseRules, Selector, Settings};

/// What entries that no selector may touch hold.
const UNTOUCHED: f32 = -7.0;

/// A selector's published settings, sparse from the first past block on.
pub(super) fn settings(selector: Selector) -> Settings {
    Settings {
        dense: DenseRules { below_kv_len: 0, max_q_len: 0, prefix_tokens: 0 },
        ..Settings::of(selector)
    }
}

/// Scores of the batch, and its layout.
pub(super) fn score(paged: &Paged, settings: Settings, gate: Option<&GateLayer>) -> (Layout, Vec<f32>) {
    let (batch, layout) = (paged.batch(), paged.layout(settings));
    let mut scores = vec![UNTOUCHED; layout.score_len().unwrap()];
    let input = Input { layout: &layout, batch: &batch, summaries: None, gate };
    super::score(&input, &mut scores, Parallel::new(2));
    (layout, scores)
}

/// Scores of each sparse span and query head: `(span, head, past blocks' scores)`; the rest must be untouched.
fn rows(paged: &Paged, layout: &Layout, scores: &[f32]) -> Vec<(Span, usize, Vec<f32>)> {
    let heads = layout.shape.num_q_heads;
    let mut found = Vec::new();
    let spans = layout.select_spans(&paged.batch());
    for (i, row) in scores.chunks(layout.max_blocks()).enumerate().take(spans.len() * heads) {
        let span = spans[i / heads];
        let past = if span.dense { 0 } else { layout.geometry.past_blocks(span.past) };
        assert!(row[past..].iter().all(|&x| x == UNTOUCHED));
        if !span.dense {
            found.push((span, i % heads, row[..past].to_vec()));
        }
    }
    assert!(!found.is_empty());
    found
}

/// Every score equals `want(layout, request, span, query head)` up to `tolerance` of it.
pub(super) fn assert_equals(
    paged: &Paged,
    settings: Settings,
    gate: Option<&GateLayer>,
    tolerance: f64,
    want: impl Fn(&Layout, &Request, &Span, usize) -> Vec<f64>,
) {
    let (layout, scores) = score(paged, settings, gate);
    for (span, head, got) in rows(paged, &layout, &scores) {
        let want = want(&layout, &paged.requests[span.req], &span, head);
        assert_eq!(got.len(), want.len());
        for (j, (&got, &want)) in got.iter().zip(&want).enumerate() {
            let error = (f64::from(got) - want).abs();
            assert!(error <= tolerance * want, "{span:?} head {head} block {j}: {got}, wanted {want}");
        }
    }
}

/// Scores lie in [0, 1] (NaN of dirty slots would not) and depend neither on pages nor on neighbours, to the bit.
pub(super) fn assert_laws(paged: &Paged, settings: Settings, gate: Option<&GateLayer>) {
    let (layout, scores) = score(paged, settings, gate);
    let all = rows(paged, &layout, &scores);
    assert!(all.iter().all(|(_, _, row)| row.iter().all(|x| (0.0..=1.0).contains(x))));
    assert_eq!(score(&paged.repaged(99), settings, gate).1, scores);
    for req in 0..paged.requests.len() {
        let mine: Vec<_> = all.iter().filter(|(span, ..)| span.req == req).map(|(.., row)| row).collect();
        if mine.is_empty() {
            continue;
        }
        let alone = paged.only(req, 5);
        let (layout, scores) = score(&alone, settings, gate);
        let theirs = rows(&alone, &layout, &scores);
        assert_eq!(theirs.iter().map(|(.., row)| row).collect::<Vec<_>>(), mine);
    }
}

/// Keys from token `from` of request 0 on have no say in the scores of spans that end there or before.
///
/// Returns how many of the request's other rows did change.
pub(super) fn assert_later_keys_do_not_matter(
    paged: &Paged,
    settings: Settings,
    gate: Option<&GateLayer>,
    (from, of_span): (usize, impl Fn(&Span) -> bool),
) -> usize {
    let mut requests = paged.requests.clone();
    let token = paged.shape.num_kv_heads * paged.shape.head_dim;
    requests[0].k[from * token..].iter_mut().for_each(|x| *x = 3.0 - 2.0 * *x);
    let changed = Paged::place(8, paged.shape, requests);
    let (layout, before) = score(paged, settings, gate);
    let (_, after) = score(&changed, settings, gate);
    let pairs = rows(paged, &layout, &before).into_iter().zip(rows(&changed, &layout, &after));
    let mut others = 0;
    for ((span, _, before), (_, _, after)) in pairs.filter(|(a, _)| a.0.req == 0) {
        if of_span(&span) {
            assert_eq!(before, after, "{span:?}");
        } else {
            others += usize::from(before != after);
        }
    }
    others
}

/// The request's query vector in f64; `token` counts from the chunk's first.
pub(super) fn q<'a>(
    layout: &Layout,
    r: &'a Request,
    token: usize,
    head: usize,
) -> impl Iterator<Item = f64> + 'a {
    let at = (token * layout.shape.num_q_heads + head) * layout.shape.head_dim;
    r.q[at..at + layout.shape.head_dim].iter().map(|&x| f64::from(x))
}

/// The request's key vector in f64.
pub(super) fn k<'a>(
    layout: &Layout,
    r: &'a Request,
    token: usize,
    head: usize,
) -> impl Iterator<Item = f64> + 'a {
    let at = (token * layout.shape.num_kv_heads + head) * layout.shape.head_dim;
    r.k[at..at + layout.shape.head_dim].iter().map(|&x| f64::from(x))
}

/// Softmax in f64.
pub(super) fn softmax(logits: &[f64]) -> Vec<f64> {
    let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let terms: Vec<f64> = logits.iter().map(|x| (x - most).exp()).collect();
    let total: f64 = terms.iter().sum();
    terms.iter().map(|x| x / total).collect()
}
