//! Our lists in the forms other paged kernels take: whole engine pages, padded or CSR.
//!
//! A kernel that reads whole pages needs every page that holds a selected token. Where blocks are smaller than pages
//! that is more than the list asks for; never less. Rows keep their order: pages ascend in the sequence, the chunk
//! is last, so the kernel's own bottom-right causal mask stays right.

use crate::batch::Batch;
use crate::error::{Error, Result, Status};
use crate::mask;
use crate::plan::{Layout, Span};

/// Padded tables (FlashAttention's `block_table` and `seqused_k`, cuDNN's padded layout).
#[derive(Debug)]
pub struct PaddedMut<'a> {
    /// `[rows]` pages a row holds.
    pub counts: &'a mut [i32],
    /// `[rows]` KV tokens in those pages; the last page may be partial.
    pub seq_lens: &'a mut [i32],
    /// `[rows, width]` page ids; entries at and after `counts[row]` become 0.
    pub pages: &'a mut [i32],
    /// Entries of a row: at least the pages of the longest request.
    pub width: usize,
}

/// CSR tables (FlashInfer's `paged_kv_indptr`, `paged_kv_indices`, `paged_kv_last_page_len`).
#[derive(Debug)]
pub struct CsrMut<'a> {
    /// `[rows + 1]`.
    pub indptr: &'a mut [i32],
    /// `[nnz]` page ids.
    pub indices: &'a mut [i32],
    /// `[rows]` tokens in each row's last page, 1..=page_size; 0 for an empty row.
    pub last_page_len: &'a mut [i32],
}

/// Writes `lists [list spans, lists per span, mask_words]` as padded tables; the row count.
///
/// # Errors
/// [`Status::Shape`] naming the short buffer; nothing is written then.
pub fn padded(layout: &Layout, batch: &Batch, lists: &[u32], out: &mut PaddedMut) -> Result<usize> {
    let rows = rows(layout, batch, lists)?;
    let longest = rows.iter().map(|(span, _)| span.kv_end).max().unwrap_or(0);
    let widest = longest.div_ceil(layout.shape.page_size);
    for (name, len, needed) in [
        ("width", out.width, widest),
        ("counts", out.counts.len(), rows.len()),
        ("seq_lens", out.seq_lens.len(), rows.len()),
        ("pages", out.pages.len(), rows.len() * out.width),
    ] {
        check(name, len, needed)?;
    }
    for (i, (span, bits)) in rows.iter().enumerate() {
        let row = &mut out.pages[i * out.width..][..out.width];
        row.fill(0);
        let (mut count, mut tokens) = (0, 0);
        each_page(layout, span, bits, |logical, held| {
            row[count] = to_i32(batch.page(span.req, logical));
            count += 1;
            tokens += held;
        });
        out.counts[i] = to_i32(count);
        out.seq_lens[i] = to_i32(tokens);
    }
    Ok(rows.len())
}

/// Writes `lists` as CSR; rows and page ids written.
///
/// # Errors
/// [`Status::Shape`] naming the short buffer and what it needs; nothing is written then.
pub fn csr(layout: &Layout, batch: &Batch, lists: &[u32], out: &mut CsrMut) -> Result<(usize, usize)> {
    let rows = rows(layout, batch, lists)?;
    let mut nnz = 0;
    for (span, bits) in &rows {
        each_page(layout, span, bits, |_, _| nnz += 1);
    }
    check("indptr", out.indptr.len(), rows.len() + 1)?;
    check("last_page_len", out.last_page_len.len(), rows.len())?;
    check("indices", out.indices.len(), nnz)?;
    let mut next = 0;
    out.indptr[0] = 0;
    for (i, (span, bits)) in rows.iter().enumerate() {
        out.last_page_len[i] = 0;
        each_page(layout, span, bits, |logical, held| {
            out.indices[next] = to_i32(batch.page(span.req, logical));
            out.last_page_len[i] = to_i32(held);
            next += 1;
        });
        out.indptr[i + 1] = to_i32(next);
    }
    Ok((rows.len(), nnz))
}

/// Each list with its span.
fn rows<'a>(layout: &Layout, batch: &Batch, lists: &'a [u32]) -> Result<Vec<(Span, &'a [u32])>> {
    let spans = layout.list_spans(batch);
    let (per_span, words) = (layout.lists_per_span(), layout.mask_words());
    check("lists", lists.len(), spans.len() * per_span * words)?;
    let bits = lists.chunks(words).take(spans.len() * per_span);
    Ok(bits.enumerate().map(|(i, bits)| (spans[i / per_span], bits)).collect())
}

/// Calls `page(logical page, tokens the span sees in it)` for every page with a selected token, ascending, once.
fn each_page(layout: &Layout, span: &Span, bits: &[u32], mut page: impl FnMut(usize, usize)) {
    let (page_size, block_size) = (layout.shape.page_size, layout.geometry.block_size);
    let mut next = 0;
    for block in mask::ones(bits, layout.geometry.blocks(span.kv_end)) {
        let first = block * block_size / page_size;
        let end = ((block + 1) * block_size).min(span.kv_end).div_ceil(page_size);
        for logical in first.max(next)..end {
            page(logical, page_size.min(span.kv_end - logical * page_size));
        }
        next = next.max(end);
    }
}

fn check(name: &str, len: usize, needed: usize) -> Result<()> {
    if len >= needed {
        Ok(())
    } else {
        Err(Error::new(Status::Shape, name, format!("at least {needed}"), len))
    }
}

/// Counts and page ids fit: lengths are bounded by 2^31, page ids came as int32.
fn to_i32(x: usize) -> i32 {
    i32::try_from(x).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Lists, Paged, shape};
    use crate::settings::{Scope, Selector, Settings};
    use crate::types::Dtype;

    /// Pages with a selected token, and the tokens the span sees in them, token by token.
    fn plain(layout: &Layout, batch: &Batch, span: &Span, bits: &[u32]) -> (Vec<i32>, usize) {
        let page_size = layout.shape.page_size;
        let selected = (0..span.kv_end).filter(|t| mask::get(bits, t / layout.geometry.block_size));
        let mut logical: Vec<_> = selected.map(|t| t / page_size).collect();
        logical.dedup();
        let tokens = (0..span.kv_end).filter(|t| logical.contains(&(t / page_size))).count();
        (logical.iter().map(|&page| to_i32(batch.page(span.req, page))).collect(), tokens)
    }

    #[test]
    fn both_exports_name_every_page_with_a_selected_token_once_in_order() {
        for (page_size, block_size) in [(16, 64), (128, 32), (64, 64)] {
            let paged =
                Paged::random(5, shape(2, 3, 64, page_size, Dtype::Bf16), &[(70, 700), (3, 50), (0, 9)]);
            let batch = paged.batch();
            let mut settings =
                Settings { block_size, scope: Scope::GROUP_CHUNK, ..Settings::of(Selector::External) };
            settings.dense.below_kv_len = 0;
            let layout = paged.layout(settings);
            let lists = Lists::random(4, &layout, &batch, 0.3);
            let width = 60;
            let (mut counts, mut seq_lens, mut pages) = ([-1; 4], [-1; 4], [-1; 4 * 60]);
            let mut out =
                PaddedMut { counts: &mut counts, seq_lens: &mut seq_lens, pages: &mut pages, width };
            assert_eq!(padded(&layout, &batch, &lists.bits, &mut out), Ok(4));
            let (mut indptr, mut indices, mut last_page_len) = ([-1; 5], [-1; 240], [-1; 4]);
            let mut out =
                CsrMut { indptr: &mut indptr, indices: &mut indices, last_page_len: &mut last_page_len };
            let (rows, nnz) = csr(&layout, &batch, &lists.bits, &mut out).unwrap();
            assert_eq!((rows, i32::try_from(nnz)), (4, Ok(indptr[4])));
            for row in 0..4 {
                let span = layout.list_spans(&batch)[row / 2];
                let (want, tokens) = plain(&layout, &batch, &span, &lists.bits[row * layout.mask_words()..]);
                let count = usize::try_from(counts[row]).unwrap();
                assert_eq!(pages[row * width..][..count], want);
                assert!(pages[row * width + count..(row + 1) * width].iter().all(|&page| page == 0));
                assert_eq!(usize::try_from(seq_lens[row]), Ok(tokens));
                let [from, to] = [indptr[row], indptr[row + 1]].map(|x| usize::try_from(x).unwrap());
                assert_eq!(indices[from..to], want);
                let last = usize::try_from(last_page_len[row]).unwrap();
                assert_eq!((want.len() - 1) * page_size + last, tokens);
            }
        }
    }

    #[test]
    fn a_request_that_asks_nothing_does_not_widen_the_table() {
        let paged = Paged::random(5, shape(1, 1, 64, 16, Dtype::Bf16), &[(20, 200), (0, 5000)]);
        let batch = paged.batch();
        let layout = paged.layout(Settings::of(Selector::Dense));
        let lists = Lists::random(4, &layout, &batch, 1.0);
        let (mut counts, mut seq_lens, mut pages) = ([-1; 1], [-1; 1], [-1; 13]);
        let mut out =
            PaddedMut { counts: &mut counts, seq_lens: &mut seq_lens, pages: &mut pages, width: 13 };
        assert_eq!(padded(&layout, &batch, &lists.bits, &mut out), Ok(1));
        assert_eq!((counts, seq_lens), ([13], [200]));
    }

    #[test]
    fn a_short_buffer_is_named_and_nothing_is_written() {
        let paged = Paged::random(5, shape(1, 1, 64, 16, Dtype::Bf16), &[(20, 200)]);
        let batch = paged.batch();
        let layout = paged.layout(Settings::of(Selector::Dense));
        let lists = Lists::random(4, &layout, &batch, 1.0);
        let (mut indptr, mut indices, mut last_page_len) = ([-1; 2], [-1; 3], [-1; 1]);
        let mut out =
            CsrMut { indptr: &mut indptr, indices: &mut indices, last_page_len: &mut last_page_len };
        let error = csr(&layout, &batch, &lists.bits, &mut out).unwrap_err();
        assert!(error.to_string().contains("indices: wanted at least 13, got 3"), "{error}");
        assert_eq!((indptr, indices, last_page_len), ([-1; 2], [-1; 3], [-1; 1]));
    }
}
