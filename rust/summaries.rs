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
use crate::tensor::Pool;

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

/// Writes the means of `which` blocks, summed in f64 in token order: the same bits whatever the schedule.
pub fn update(layout: &Layout, batch: &Batch, which: Which, out: &mut SummariesMut, parallel: Parallel) {
    let slot = layout.shape.num_kv_heads * layout.shape.head_dim;
    let blocks = blocks_to_write(layout, batch, which);
    let pools = if out.v_mean.is_some() { 2 } else { 1 };
    let worth_threads = blocks.len() * layout.geometry.block_size * slot * pools >= MIN_PARALLEL_ELEMENTS;
    let parallel = if worth_threads { parallel } else { Parallel::new(1) };
    let starts = || blocks.iter().map(|&(start, _)| start);
    let k = pieces(out.k_mean, slot, starts());
    let v = out.v_mean.as_deref_mut().map(|v| pieces(v, slot, starts()));
    let mut v = v.into_iter().flatten();
    let work = blocks.iter().zip(k).map(|(&(_, at), k)| (at, k, v.next()));
    parallel.for_each(work, |(at, k, v)| {
        write_means(layout, batch, at, (batch.k(), k));
        if let Some(v) = v {
            write_means(layout, batch, at, (batch.v(), v));
        }
    });
}

/// Blocks to summarise with the offset of their slot, ascending and each slot once: requests that share a prefix
/// share its slots, and their content.
fn blocks_to_write(layout: &Layout, batch: &Batch, which: Which) -> Vec<(usize, BlockAt)> {
    let mut blocks = Vec::new();
    for req in (0..batch.num_reqs()).filter(|&r| batch.q_len(r) > 0) {
        let first = match which {
            Which::All => 0,
            Which::Completed => layout.geometry.past_blocks(batch.past_len(req)),
        };
        for block in first..layout.geometry.past_blocks(batch.kv_len(req)) {
            let at = BlockAt { req, block, kv_head: 0 };
            blocks.push((offset(layout, batch, at), at));
        }
    }
    blocks.sort_unstable_by_key(|&(start, _)| start);
    blocks.dedup_by_key(|&mut (start, _)| start);
    blocks
}

/// The pieces of `len` elements of `all` at `starts`, which ascend without overlap.
fn pieces<'a>(
    all: &'a mut [f32],
    len: usize,
    starts: impl Iterator<Item = usize>,
) -> impl Iterator<Item = &'a mut [f32]> {
    let (mut rest, mut passed) = (all, 0);
    starts.map(move |start| {
        let (piece, after) = std::mem::take(&mut rest)[start - passed..].split_at_mut(len);
        (rest, passed) = (after, start + len);
        piece
    })
}

/// Means of one block for every KV head, into `[num_kv_heads, head_dim]`.
fn write_means(layout: &Layout, batch: &Batch, at: BlockAt, (pool, into): (&Pool, &mut [f32])) {
    let (page_size, block_size) = (layout.geometry.page_size, layout.geometry.block_size);
    let mut sums = vec![0.0_f64; into.len()];
    let mut vector = vec![0.0_f32; layout.shape.head_dim];
    for token in at.block * block_size..(at.block + 1) * block_size {
        let page = batch.page(at.req, token / page_size);
        for (kv_head, sums) in sums.chunks_exact_mut(vector.len()).enumerate() {
            pool.load(page, token % page_size, kv_head, &mut vector);
            for (sum, &x) in sums.iter_mut().zip(&vector) {
                *sum += f64::from(x);
            }
        }
    }
    store_means(&sums, block_size, into);
}

#[expect(clippy::cast_possible_truncation, reason = "a mean is stored as f32")]
fn store_means(sums: &[f64], tokens: usize, into: &mut [f32]) {
    for (mean, sum) in into.iter_mut().zip(sums) {
        *mean = (sum / tokens as f64) as f32;
    }
}

/// Elements to read above which threads repay their start, some 50 us: about 200 us of work on one core.
const MIN_PARALLEL_ELEMENTS: usize = 1 << 18;
