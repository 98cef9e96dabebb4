//! One set of blocks per list: masks united, or scores merged and then kept.

use super::keep::{Kept, Score, forced, keep};
use super::{Chunk, Request, chunks, select_step};
use crate::plan::Layout;
use crate::settings::{KeepAt, Selector};

/// What each list reads: `[list spans * lists per span]`, over blocks `0..blocks(span end)`.
pub type Lists = Vec<Kept>;

/// Rows of scores, `[select spans][num_q_heads][past blocks]`, to lists.
#[must_use]
pub fn lists_of_scores(layout: &Layout, requests: &[Request], scores: &[Vec<Vec<Score>>]) -> Lists {
    each_list(layout, requests, |spans, heads, past| match layout.settings.keep_at {
        KeepAt::Row => {
            let mut kept = Kept::all(past, false);
            for (span, head) in rows(spans, &heads) {
                kept.or(&keep(&layout.settings, &scores[span][head]));
            }
            kept
        }
        KeepAt::List => {
            let rows: Vec<&[Score]> = rows(spans, &heads).map(|(s, h)| &scores[s][h][..]).collect();
            let merged: Vec<Score> = (0..past).map(|j| merge(layout, &rows, j)).collect();
            keep(&layout.settings, &merged)
        }
    })
}

/// Rows of bits, `[select spans][num_q_heads][blocks]`, to lists.
#[must_use]
pub fn lists_of_masks(layout: &Layout, requests: &[Request], masks: &[Vec<Vec<bool>>]) -> Lists {
    each_list(layout, requests, |spans, heads, past| {
        let any = |j: usize| rows(spans, &heads).any(|(span, head)| masks[span][head][j]);
        let bits: Vec<bool> = (0..past).map(any).collect();
        Kept { must: bits.clone(), may: bits }
    })
}

fn rows<'a>(
    spans: &'a [usize],
    heads: &'a std::ops::Range<usize>,
) -> impl Iterator<Item = (usize, usize)> + 'a {
    spans.iter().flat_map(|&span| heads.clone().map(move |head| (span, head)))
}

/// Block `j` of a list: shares of mass by their mean, relative scores by their maximum.
fn merge(layout: &Layout, rows: &[&[Score]], j: usize) -> Score {
    let by_max = matches!(
        layout.settings.selector,
        Selector::FlashPrefill | Selector::AttnGate | Selector::Quoka | Selector::External
    );
    let nan = rows.iter().any(|row| row[j].lo.is_nan());
    let of = |end: fn(&Score) -> f64| {
        let column = rows.iter().map(|row| end(&row[j]));
        match (nan, by_max) {
            (true, _) => f64::NAN,
            (_, true) => column.fold(f64::NEG_INFINITY, f64::max),
            (_, false) => column.sum::<f64>() / rows.len() as f64,
        }
    };
    Score { lo: of(|s| s.lo), hi: of(|s| s.hi) }
}

/// Calls `past_kept(voting select spans, query heads, past blocks)` for every sparse list, then adds what is always
/// read; a list that no span votes for reads all.
fn each_list(
    layout: &Layout,
    requests: &[Request],
    past_kept: impl Fn(&[usize], std::ops::Range<usize>, usize) -> Kept,
) -> Lists {
    let select = chunks(layout, requests, select_step(layout));
    let mut lists = Vec::new();
    for chunk in chunks(layout, requests, layout.settings.scope.query_span) {
        let request = &requests[chunk.req];
        let total = request.visible(chunk.tokens.end - 1).div_ceil(layout.settings.block_size);
        let past = request.past() / layout.settings.block_size;
        let spans = voting(layout, &select, &chunk);
        for heads in heads_of_lists(layout) {
            if chunk.dense || spans.is_empty() {
                lists.push(Kept::all(total, true));
                continue;
            }
            let kept = always(layout, past_kept(&spans, heads, past));
            let open = Kept::all(total - past, true);
            lists.push(Kept { must: [kept.must, open.must].concat(), may: [kept.may, open.may].concat() });
        }
    }
    lists
}

/// Past blocks that each list chooses from: none where it is dense by policy or for want of a voting span.
#[must_use]
pub fn candidates(layout: &Layout, requests: &[Request]) -> Vec<usize> {
    let select = chunks(layout, requests, select_step(layout));
    let mut lists = Vec::new();
    for chunk in chunks(layout, requests, layout.settings.scope.query_span) {
        let chooses = !chunk.dense && !voting(layout, &select, &chunk).is_empty();
        let past = requests[chunk.req].past() / layout.settings.block_size;
        lists.extend(heads_of_lists(layout).iter().map(|_| if chooses { past } else { 0 }));
    }
    lists
}

/// Query heads of each list of a span: KV head by KV head, its group cut into runs of `heads_per_list`.
fn heads_of_lists(layout: &Layout) -> Vec<std::ops::Range<usize>> {
    let group = layout.shape.num_q_heads / layout.shape.num_kv_heads;
    let wanted = layout.settings.scope.heads_per_list;
    let run = if wanted == 0 || wanted > group { group } else { wanted };
    let mut lists = Vec::new();
    for kv_head in 0..layout.shape.num_kv_heads {
        let (mut head, end) = (kv_head * group, (kv_head + 1) * group);
        while head < end {
            lists.push(head..(head + run).min(end));
            head += run;
        }
    }
    lists
}

/// Select spans within `chunk` whose rows count.
fn voting(layout: &Layout, select: &[Chunk], chunk: &Chunk) -> Vec<usize> {
    let inside = |s: &Chunk| {
        s.req == chunk.req && s.tokens.start >= chunk.tokens.start && s.tokens.end <= chunk.tokens.end
    };
    let silent = match layout.settings.selector {
        Selector::FlashPrefill => layout.settings.flashprefill.non_voting_spans,
        _ => 0,
    };
    // The request's last `silent` spans are quiet, but its first always speaks.
    let of_request: Vec<usize> = (0..select.len()).filter(|&i| select[i].req == chunk.req).collect();
    let loud = of_request.len().saturating_sub(silent).max(1);
    of_request.into_iter().take(loud).filter(|&i| inside(&select[i])).collect()
}

/// Adds sink and local blocks; a list above the density guard reads all.
fn always(layout: &Layout, mut kept: Kept) -> Kept {
    let n = kept.must.len();
    for j in (0..n).filter(|&j| forced(&layout.settings, j, n)) {
        kept.must[j] = true;
        kept.may[j] = true;
    }
    // The guard is a decimal too: 9 of 10 are not more than 0.9.
    let limit = f64::from(layout.settings.density_guard) * (1.0 + f64::from(f32::EPSILON)) * n as f64;
    let count = |bits: &[bool]| bits.iter().filter(|&&bit| bit).count() as f64;
    Kept {
        must: if count(&kept.must) > limit { vec![true; n] } else { kept.must },
        may: if count(&kept.may) > limit { vec![true; n] } else { kept.may },
    }
}
