//! batch: the engine's metadata as one checked, borrowed view. Nothing below checks it again.

use crate::error::{Error, Result, Status};
use crate::tensor::{Pool, Tokens};
use crate::types::{Dtype, Shape};

/// The engine's logical → physical map: `[num_reqs, >= pages]` int32, garbage allowed after a row's valid prefix.
#[derive(Clone, Copy, Debug)]
pub struct BlockTable<'a> {
    /// Page ids, row-major.
    pub entries: &'a [i32],
    /// From a row to the next, in entries.
    pub stride_row: usize,
    /// Entries a row holds; at most `stride_row`.
    pub width: usize,
}

/// One step's requests: prefill chunks and decode rows, ragged, in one packed `q`.
///
/// Request `r` owns queries `cu_seqlens_q[r]..cu_seqlens_q[r + 1]`, the last `q_len` of its `seq_lens[r]` KV tokens
/// (bottom-right causal). KV of the chunk is already in the pool.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    shape: Shape,
    q: Tokens<'a>,
    k: Pool<'a>,
    v: Pool<'a>,
    cu_seqlens_q: &'a [i32],
    seq_lens: &'a [i32],
    block_table: BlockTable<'a>,
}

/// The parts of a [`Batch`] before they are checked.
#[derive(Clone, Copy, Debug)]
pub struct BatchParts<'a> {
    /// `[total_q, num_q_heads, head_dim]`.
    pub q: Tokens<'a>,
    /// `[num_pages, page_size, num_kv_heads, head_dim]`.
    pub k: Pool<'a>,
    /// Same extents as `k`.
    pub v: Pool<'a>,
    /// `[num_reqs + 1]`, from 0, not decreasing, ending at `total_q`.
    pub cu_seqlens_q: &'a [i32],
    /// `[num_reqs]` KV tokens including this chunk.
    pub seq_lens: &'a [i32],
    /// `[num_reqs, pages]`.
    pub block_table: BlockTable<'a>,
    /// Query tokens in `q`.
    pub total_q: usize,
}

impl<'a> Batch<'a> {
    /// Checks every extent, length and table entry the step can touch.
    ///
    /// # Errors
    /// [`Status::Dtype`], [`Status::Stride`], [`Status::Shape`], [`Status::Value`], [`Status::SeqLen`] or
    /// [`Status::Table`], naming the argument and the request.
    pub fn new(shape: Shape, parts: BatchParts<'a>) -> Result<Self> {
        shape.check()?;
        let BatchParts { q, k, v, cu_seqlens_q, seq_lens, block_table, total_q } = parts;
        check_tokens("q", &shape, &q, total_q)?;
        check_pool("k", &shape, &k)?;
        check_pool("v", &shape, &v)?;
        if k.num_pages != v.num_pages {
            return Err(Error::new(Status::Shape, "v num_pages", k.num_pages, v.num_pages));
        }
        let batch = Self { shape, q, k, v, cu_seqlens_q, seq_lens, block_table };
        batch.check_queries(total_q)?;
        batch.check_table_extent()?;
        for req in 0..seq_lens.len() {
            batch.check_request(req)?;
        }
        Ok(batch)
    }

    fn check_queries(&self, total_q: usize) -> Result<()> {
        let cu = self.cu_seqlens_q;
        if cu.len() != self.seq_lens.len() + 1 {
            let wanted = format!("num_reqs + 1 = {} entries", self.seq_lens.len() + 1);
            return Err(Error::new(Status::Shape, "cu_seqlens_q", wanted, cu.len()));
        }
        if cu[0] != 0 {
            return Err(Error::new(Status::Value, "cu_seqlens_q[0]", 0, cu[0]));
        }
        if let Some(i) = (1..cu.len()).find(|&i| cu[i] < cu[i - 1]) {
            return Err(Error::new(
                Status::Value,
                format!("cu_seqlens_q[{i}]"),
                format!(">= {}", cu[i - 1]),
                cu[i],
            ));
        }
        let last = cu[cu.len() - 1];
        if usize::try_from(last) != Ok(total_q) {
            let name = format!("cu_seqlens_q[{}]", cu.len() - 1);
            return Err(Error::new(Status::Value, name, format!("total_q = {total_q}"), last));
        }
        Ok(())
    }

    fn check_table_extent(&self) -> Result<()> {
        let BlockTable { entries, stride_row, width } = self.block_table;
        let rows = self.seq_lens.len();
        if rows > 1 && stride_row < width {
            return Err(Error::new(
                Status::Stride,
                "block_table row stride",
                format!(">= {width}"),
                stride_row,
            ));
        }
        let needed = extent("block_table", &[(rows, stride_row)], width)?;
        if entries.len() < needed {
            return Err(Error::new(Status::Shape, "block_table", format!("{needed} entries"), entries.len()));
        }
        Ok(())
    }

    /// Lengths and the valid prefix of one table row; entries after it are never looked at.
    fn check_request(&self, req: usize) -> Result<()> {
        let len = self.seq_lens[req];
        let most = self.block_table.width * self.shape.page_size;
        let Ok(kv_len) = usize::try_from(len) else {
            return Err(Error::new(Status::SeqLen, format!("seq_lens[{req}]"), ">= 0", len));
        };
        if self.q_len(req) > 0 && kv_len > most {
            let wanted = format!("at most {most} (block_table width x page_size)");
            return Err(Error::new(Status::SeqLen, format!("seq_lens[{req}]"), wanted, len));
        }
        if self.q_len(req) == 0 {
            return Ok(());
        }
        let row = &self.block_table.entries[req * self.block_table.stride_row..];
        let pages = kv_len.div_ceil(self.shape.page_size);
        match (0..pages).find(|&i| usize::try_from(row[i]).map_or(true, |page| page >= self.k.num_pages)) {
            None => Ok(()),
            Some(i) => {
                let wanted = format!("0..{} (pages in the pool)", self.k.num_pages);
                Err(Error::new(Status::Table, format!("block_table[{req}][{i}]"), wanted, row[i]))
            }
        }
    }

    /// Heads, page size, dtype.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Queries, packed.
    #[must_use]
    pub fn q(&self) -> &Tokens<'a> {
        &self.q
    }

    /// The key pool.
    #[must_use]
    pub fn k(&self) -> &Pool<'a> {
        &self.k
    }

    /// The value pool.
    #[must_use]
    pub fn v(&self) -> &Pool<'a> {
        &self.v
    }

    /// `[num_reqs + 1]` first queries, and their end.
    #[must_use]
    pub fn cu_seqlens_q(&self) -> &'a [i32] {
        self.cu_seqlens_q
    }

    /// `[num_reqs]` KV tokens.
    #[must_use]
    pub fn seq_lens(&self) -> &'a [i32] {
        self.seq_lens
    }

    /// The engine's map.
    #[must_use]
    pub fn block_table(&self) -> &BlockTable<'a> {
        &self.block_table
    }

    /// Requests in the step.
    #[must_use]
    pub fn num_reqs(&self) -> usize {
        self.seq_lens.len()
    }

    /// Query tokens in the step.
    #[must_use]
    pub fn total_q(&self) -> usize {
        index(self.cu_seqlens_q[self.cu_seqlens_q.len() - 1])
    }

    /// The request's first query token within `q`.
    #[must_use]
    pub fn q_start(&self, req: usize) -> usize {
        index(self.cu_seqlens_q[req])
    }

    /// The request's query tokens.
    #[must_use]
    pub fn q_len(&self, req: usize) -> usize {
        index(self.cu_seqlens_q[req + 1]) - index(self.cu_seqlens_q[req])
    }

    /// The request's KV tokens, this chunk included.
    #[must_use]
    pub fn kv_len(&self, req: usize) -> usize {
        index(self.seq_lens[req])
    }

    /// KV tokens before the chunk; 0 where the chunk is longer than the KV.
    #[must_use]
    pub fn past_len(&self, req: usize) -> usize {
        self.kv_len(req).saturating_sub(self.q_len(req))
    }

    /// KV tokens that the request's chunk token `token` sees: all up to its own position.
    #[must_use]
    pub fn visible(&self, req: usize, token: usize) -> usize {
        (self.kv_len(req) + token + 1).saturating_sub(self.q_len(req))
    }

    /// Physical page of the request's logical page, which must lie in its valid prefix.
    #[must_use]
    pub fn page(&self, req: usize, logical: usize) -> usize {
        index(self.block_table.entries[req * self.block_table.stride_row + logical])
    }

    /// Loads keys of tokens `range` of the request; `into` is `[range.len(), head_dim]`.
    pub fn load_k(&self, req: usize, kv_head: usize, range: std::ops::Range<usize>, into: &mut [f32]) {
        self.load(&self.k, (req, kv_head), range, into);
    }

    /// Loads values of tokens `range` of the request; `into` is `[range.len(), head_dim]`.
    pub fn load_v(&self, req: usize, kv_head: usize, range: std::ops::Range<usize>, into: &mut [f32]) {
        self.load(&self.v, (req, kv_head), range, into);
    }

    fn load(
        &self,
        pool: &Pool,
        (req, head): (usize, usize),
        range: std::ops::Range<usize>,
        into: &mut [f32],
    ) {
        let page_size = self.shape.page_size;
        for (token, vector) in range.zip(into.chunks_exact_mut(self.shape.head_dim)) {
            pool.load(self.page(req, token / page_size), token % page_size, head, vector);
        }
    }
}

/// A length or id that [`Batch::new`] has shown to be non-negative.
fn index(x: i32) -> usize {
    usize::try_from(x).unwrap_or(0)
}

/// Elements from a view's first to its last, for extents and strides from the largest dimension down.
///
/// # Errors
/// [`Status::Overflow`] where the product leaves 63 bits.
pub(crate) fn extent(name: &str, dims: &[(usize, usize)], head_dim: usize) -> Result<usize> {
    if dims.iter().any(|&(count, _)| count == 0) {
        return Ok(0);
    }
    let sum = dims.iter().try_fold(head_dim, |sum, &(count, stride)| {
        sum.checked_add((count - 1).checked_mul(stride)?).filter(|&x| i64::try_from(x).is_ok())
    });
    sum.ok_or_else(|| Error::new(Status::Overflow, name, "an extent within 63 bits", "more"))
}

fn check_tokens(name: &str, shape: &Shape, x: &Tokens, total_q: usize) -> Result<()> {
    let needed =
        extent(name, &[(total_q, x.stride_token), (shape.num_q_heads, x.stride_head)], shape.head_dim)?;
    check_elements(name, shape.dtype, x.elements.dtype(), (x.elements.len(), needed))
}

fn check_pool(name: &str, shape: &Shape, x: &Pool) -> Result<()> {
    let dims = [
        (x.num_pages, x.stride_page),
        (shape.page_size, x.stride_token),
        (shape.num_kv_heads, x.stride_head),
    ];
    let needed = extent(name, &dims, shape.head_dim)?;
    check_elements(name, shape.kv_dtype, x.elements.dtype(), (x.elements.len(), needed))?;
    check_scales(&format!("{name}_scale"), shape, x.scales)
}

/// None, one or one for each KV head, and those of an e4m3 pool only; each finite and above 0.
fn check_scales(name: &str, shape: &Shape, scales: &[f32]) -> Result<()> {
    if scales.is_empty() {
        return Ok(());
    }
    if shape.kv_dtype != Dtype::E4m3 {
        let wanted = format!("none, for a KV cache of {}", shape.kv_dtype.name());
        return Err(Error::new(Status::Dtype, name, wanted, format!("{} of them", scales.len())));
    }
    if scales.len() != 1 && scales.len() != shape.num_kv_heads {
        let wanted = format!("1 or {} (num_kv_heads) of them", shape.num_kv_heads);
        return Err(Error::new(Status::Shape, name, wanted, scales.len()));
    }
    match scales.iter().position(|&x| !(x.is_finite() && x > 0.0)) {
        None => Ok(()),
        Some(i) => Err(Error::new(Status::Value, format!("{name}[{i}]"), "finite and > 0", scales[i])),
    }
}

fn check_elements(name: &str, wanted: Dtype, dtype: Dtype, (len, needed): (usize, usize)) -> Result<()> {
    if dtype != wanted {
        return Err(Error::new(Status::Dtype, name, wanted.name(), dtype.name()));
    }
    if len < needed {
        return Err(Error::new(Status::Shape, name, format!("storage of {needed} elements"), len));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Paged, shape};

    fn paged() -> Paged {
        Paged::random(2, shape(2, 2, 64, 16, Dtype::Bf16), &[(5, 40), (0, 3), (7, 2)])
    }

    /// The error of the batch after `change`.
    fn refused(change: impl Fn(&mut Paged)) -> Error {
        let mut paged = paged();
        change(&mut paged);
        Batch::new(paged.shape, paged.parts()).unwrap_err()
    }

    #[test]
    fn lengths_and_entries_are_refused_by_name() {
        type Change = fn(&mut Paged);
        let cases: [(Change, Status, &str); 9] = [
            (|p| p.cu_seqlens_q[0] = 1, Status::Value, "cu_seqlens_q[0]"),
            (|p| p.cu_seqlens_q[1] = 99, Status::Value, "cu_seqlens_q[2]"),
            (|p| p.cu_seqlens_q[3] = 13, Status::Value, "cu_seqlens_q[3]"),
            (|p| p.cu_seqlens_q.truncate(3), Status::Shape, "cu_seqlens_q"),
            (|p| p.seq_lens[0] = -1, Status::SeqLen, "seq_lens[0]"),
            (|p| p.seq_lens[2] = 1000, Status::SeqLen, "seq_lens[2]"),
            (|p| p.block_table[1] = -1, Status::Table, "block_table[0][1]"),
            (|p| p.block_table[2] = i32::MAX, Status::Table, "block_table[0][2]"),
            (|p| p.num_pages += 100, Status::Shape, "k: wanted storage"),
        ];
        for (change, status, name) in cases {
            let error = refused(change);
            assert_eq!(error.status(), status, "{error}");
            assert!(error.to_string().contains(name), "{error}");
        }
    }

    #[test]
    fn scales_that_cannot_be_meant_are_refused_by_name() {
        let shape = Shape { kv_dtype: Dtype::E4m3, ..shape(2, 2, 64, 16, Dtype::Bf16) };
        let cases: [(&[f32], Status, &str); 4] = [
            (&[1.0; 3], Status::Shape, "k_scale: wanted 1 or 2"),
            (&[1.0, 0.0], Status::Value, "k_scale[1]"),
            (&[f32::NAN], Status::Value, "k_scale[0]"),
            (&[f32::INFINITY], Status::Value, "k_scale[0]"),
        ];
        let paged = Paged::random(2, shape, &[(5, 40)]);
        for (scales, status, name) in cases {
            let mut parts = paged.parts();
            parts.k.scales = scales;
            let error = Batch::new(shape, parts).unwrap_err();
            assert_eq!(error.status(), status, "{error}");
            assert!(error.to_string().contains(name), "{error}");
        }
        let plain = self::paged();
        let mut parts = plain.parts();
        parts.v.scales = &[2.0];
        let error = Batch::new(plain.shape, parts).unwrap_err();
        assert_eq!(error.status(), Status::Dtype);
        assert!(error.to_string().contains("v_scale"), "{error}");
    }

    #[test]
    fn a_table_stride_beyond_any_memory_is_an_overflow() {
        let paged = paged();
        let mut parts = paged.parts();
        parts.block_table.stride_row = usize::MAX;
        assert_eq!(Batch::new(paged.shape, parts).unwrap_err().status(), Status::Overflow);
    }

    #[test]
    fn garbage_after_a_valid_prefix_is_never_looked_at() {
        let paged = paged();
        assert!(paged.block_table.iter().any(|&page| page < 0), "the fixture leaves garbage in the tails");
        assert_eq!(paged.batch().visible(2, 0), 0);
        assert_eq!(paged.batch().visible(0, 4), 40);
    }

    #[test]
    fn an_extent_that_leaves_63_bits_is_an_overflow() {
        assert_eq!(extent("k", &[(3, usize::MAX / 2)], 64).unwrap_err().status(), Status::Overflow);
        assert_eq!(extent("k", &[(0, usize::MAX)], 64), Ok(0));
    }
}
