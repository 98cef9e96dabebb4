//! summaries: one mean key (and mean value) per whole block and KV head, kept under the page of the block's last token.
//!
//! That page is unique to the block's content *and* everything before it, so summaries stay right when an engine
//! shares prefix pages between requests; the block's first page would not be (two prompts may share it and then
//! differ). A block is summarised once, in the step that completes it; partial blocks lie in the open region, which
//! is attended whole, and need none. Whoever reuses a page for other tokens must write its blocks' summaries again,
//! which [`update`] at every KV write does.

use crate::batch::Batch;
use crate::parallel::Parallel;
use crate::plan::Layout;

/// Block means to read: `[num_pages * summary_slots_per_page, num_kv_heads, head_dim]`, f32, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Summaries<'a> {
    /// Mean key of each block.
    pub k_mean: &'a [f32],
    /// Mean value of each block; needed for mean correction only.
    pub v_mean: Option<&'a [f32]>,
}

/// Block means to write; laid out as [`Summaries`].
#[derive(Debug)]
pub struct SummariesMut<'a> {
    /// Mean key of each block.
    pub k_mean: &'a mut [f32],
    /// Mean value of each block.
    pub v_mean: Option<&'a mut [f32]>,
}

/// Which blocks [`update`] summarises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Those that this step's tokens complete: the hook at KV write.
    Completed,
    /// Every whole block: after a swap-in or a prefix hit whose summaries are not there.
    All,
}

/// Elements of one summary buffer for a pool of `num_pages`.
#[must_use]
pub fn len(layout: &Layout, num_pages: usize) -> usize {
    num_pages * layout.geometry.summary_slots_per_page() * layout.shape.num_kv_heads * layout.shape.head_dim
}

impl<'a> Summaries<'a> {
    /// Mean key of whole block `block` of the request; `[head_dim]`.
    #[must_use]
    pub fn k(&self, layout: &Layout, batch: &Batch, at: BlockAt) -> &'a [f32] {
        vector(self.k_mean, layout, batch, at)
    }

    /// Mean value of whole block `block` of the request; `[head_dim]`, or `None` without values.
    #[must_use]
    pub fn v(&self, layout: &Layout, batch: &Batch, at: BlockAt) -> Option<&'a [f32]> {
        self.v_mean.map(|v| vector(v, layout, batch, at))
    }
}

/// One block of one request and KV head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockAt {
    /// The request.
    pub req: usize,
    /// The block.
    pub block: usize,
    /// The KV head.
    pub kv_head: usize,
}

fn vector<'a>(data: &'a [f32], layout: &Layout, batch: &Batch, at: BlockAt) -> &'a [f32] {
    let offset = offset(layout, batch, at);
    &data[offset..offset + layout.shape.head_dim]
}

/// Where the block's vector starts.
fn offset(layout: &Layout, batch: &Batch, at: BlockAt) -> usize {
    let page = batch.page(at.req, layout.geometry.last_page_of(at.block));
    let slot = layout.geometry.summary_slot(page, at.block);
    (slot * layout.shape.num_kv_heads + at.kv_head) * layout.shape.head_dim
}

/// Writes the means of `which` blocks, summed in f64.
pub fn update(layout: &Layout, batch: &Batch, which: Which, out: &mut SummariesMut, _parallel: Parallel) {
    let head_dim = layout.shape.head_dim;
    let block_size = layout.geometry.block_size;
    let mut rows = vec![0.0; block_size * head_dim];
    for req in (0..batch.num_reqs()).filter(|&r| batch.q_len(r) > 0) {
        let first = match which {
            Which::All => 0,
            Which::Completed => layout.geometry.past_blocks(batch.past_len(req)),
        };
        for block in first..layout.geometry.past_blocks(batch.kv_len(req)) {
            for kv_head in 0..layout.shape.num_kv_heads {
                let tokens = block * block_size..(block + 1) * block_size;
                let at = offset(layout, batch, BlockAt { req, block, kv_head });
                batch.load_k(req, kv_head, tokens.clone(), &mut rows);
                mean(&rows, &mut out.k_mean[at..at + head_dim]);
                if let Some(v_mean) = &mut out.v_mean {
                    batch.load_v(req, kv_head, tokens, &mut rows);
                    mean(&rows, &mut v_mean[at..at + head_dim]);
                }
            }
        }
    }
}

/// Mean of the rows of `rows [n, into.len()]`.
#[expect(clippy::cast_possible_truncation, reason = "the mean is stored as f32")]
fn mean(rows: &[f32], into: &mut [f32]) {
    let head_dim = into.len();
    let n = (rows.len() / head_dim) as f64;
    for (x, y) in into.iter_mut().enumerate() {
        let sum: f64 = rows[x..].iter().step_by(head_dim).map(|&v| f64::from(v)).sum();
        *y = (sum / n) as f32;
    }
}
