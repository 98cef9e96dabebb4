//! The pool slots of each list's tokens, token by token, in order.

use super::{Request, chunks};
use crate::batch::Batch;
use crate::plan::Layout;

/// Tokens that each list reads, ascending: `[lists][tokens]`, from `lists [list spans * lists per span][blocks]`.
#[must_use]
pub fn tokens(layout: &Layout, requests: &[Request], lists: &[Vec<bool>]) -> Vec<Vec<usize>> {
    let spans = chunks(layout, requests, layout.settings.scope.query_span);
    let per_span = lists.len() / spans.len().max(1);
    let read = |(i, bits): (usize, &Vec<bool>)| {
        let span = &spans[i / per_span];
        let end = requests[span.req].visible(span.tokens.end - 1);
        (0..end).filter(|t| bits[t / layout.settings.block_size]).collect()
    };
    lists.iter().enumerate().map(read).collect()
}

/// Where each token of each list lies: `[lists][tokens]` of (physical page, row in the page).
#[must_use]
pub fn slots(
    layout: &Layout,
    batch: &Batch,
    requests: &[Request],
    tokens: &[Vec<usize>],
) -> Vec<Vec<(usize, usize)>> {
    let spans = chunks(layout, requests, layout.settings.scope.query_span);
    let per_span = tokens.len() / spans.len().max(1);
    let page_size = layout.shape.page_size;
    let slot = |req: usize, t: usize| (batch.page(req, t / page_size), t % page_size);
    let of =
        |(i, list): (usize, &Vec<usize>)| list.iter().map(|&t| slot(spans[i / per_span].req, t)).collect();
    tokens.iter().enumerate().map(of).collect()
}
