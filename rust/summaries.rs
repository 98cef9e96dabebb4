//! summaries: one mean key (and mean value) per whole block and KV head, kept under the page of the block's last token.
//!
//! That page is unique to the block's content *and* everything before it, so summaries stay right when an engine
//! shares prefix pages between requests; the block's first page would not be (two prompts may share it and then
//! differ). A block is summarised in the step that completes it; partial blocks lie in the open region, which is
//! attended whole, and need none. With [seals](crate::seals), [`update`] also makes anew whatever is not of the keys
//! that lie there, so before a step that reads them one `update` is all it takes to be right, whoever wrote the pages.

use crate::batch::Batch;
use crate::parallel::Parallel;
use crate::plan::Layout;
use crate::seals::Seals;
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
    /// Seals of what was written before ([`crate::seals::len`] words, zeros at first); `None` = the caller vouches that
    /// every step that wrote KV was followed by an update.
    pub seals: Option<&'a mut [u32]>,
}

/// Which blocks [`update`] summarises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Those that this step's tokens complete, and with seals those that are of other keys or were never written.
    Completed,
    /// Every whole block: after a swap-in or a prefix hit, where there are no seals.
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
    let values = out.v_mean.is_some();
    let mut seals = out.seals.as_deref_mut().map(|words| Seals { words, values });
    let blocks = blocks_to_write(layout, batch, which, seals.as_ref());
    for &(start, at) in &blocks {
        seals.iter_mut().for_each(|seals| seals.write(layout, batch, at, start / slot));
    }
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
fn blocks_to_write(
    layout: &Layout,
    batch: &Batch,
    which: Which,
    seals: Option<&Seals>,
) -> Vec<(usize, BlockAt)> {
    let mut blocks = Vec::new();
    let slot = layout.shape.num_kv_heads * layout.shape.head_dim;
    for req in (0..batch.num_reqs()).filter(|&r| batch.q_len(r) > 0) {
        let first = match which {
            Which::All => 0,
            Which::Completed => layout.geometry.past_blocks(batch.past_len(req)),
        };
        for block in 0..layout.geometry.past_blocks(batch.kv_len(req)) {
            let at = BlockAt { req, block, kv_head: 0 };
            let start = offset(layout, batch, at);
            if block >= first || seals.is_some_and(|seals| !seals.hold(layout, batch, at, start / slot)) {
                blocks.push((start, at));
            }
        }
    }
    blocks.sort_unstable_by_key(|&(start, _)| start);
    blocks.dedup_by_key(|&mut (start, _)| start);
    blocks
}

/// The pieces of `len` elements of `all` at `starts`, which ascend without overlap.
fn pieces(
    all: &mut [f32],
    len: usize,
    starts: impl Iterator<Item = usize>,
) -> impl Iterator<Item = &mut [f32]> {
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
            pool.load_stored((page, token % page_size), kv_head, &mut vector);
            for (sum, &x) in sums.iter_mut().zip(&vector) {
                *sum += f64::from(x);
            }
        }
    }
    let head_dim = layout.shape.head_dim;
    for (kv_head, (sums, into)) in
        sums.chunks_exact(head_dim).zip(into.chunks_exact_mut(head_dim)).enumerate()
    {
        store_means(sums, f64::from(pool.scale(kv_head)) / block_size as f64, into);
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a mean is stored as f32")]
fn store_means(sums: &[f64], share: f64, into: &mut [f32]) {
    for (mean, sum) in into.iter_mut().zip(sums) {
        *mean = (sum * share) as f32;
    }
}

/// Elements to read above which threads repay their start, some 50 us: about 200 us of work on one core.
const MIN_PARALLEL_ELEMENTS: usize = 1 << 18;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Paged, Request, shape};
    use crate::settings::{Selector, Settings};
    use crate::types::Dtype;

    /// Page and block sizes, block > page and block < page among them.
    const SIZES: [(usize, usize); 3] = [(16, 64), (64, 16), (32, 32)];

    fn layout(paged: &Paged, block_size: usize) -> Layout {
        paged.layout(Settings { block_size, ..Settings::of(Selector::FlashPrefill) })
    }

    /// Buffers of NaN: what no update writes cannot be mistaken for a mean.
    fn empty(layout: &Layout, paged: &Paged) -> (Vec<f32>, Vec<f32>) {
        let n = len(layout, paged.num_pages);
        (vec![f32::NAN; n], vec![f32::NAN; n])
    }

    fn run(layout: &Layout, paged: &Paged, which: Which, (k, v): &mut (Vec<f32>, Vec<f32>)) {
        let mut out = SummariesMut { k_mean: k, v_mean: Some(v), seals: None };
        update(layout, &paged.batch(), which, &mut out, Parallel::new(2));
    }

    /// `paged` as the engine sees it when request 0 has only `kv_len` tokens, the last `q_len` of them new.
    fn step(paged: &Paged, q_len: usize, kv_len: usize) -> Paged {
        let mut step = paged.clone();
        let width = paged.shape.num_q_heads * paged.shape.head_dim;
        step.requests[0].q = vec![0.0; q_len * width];
        step.q = crate::fixture::Store::dirty(paged.shape.dtype, q_len * (width + 8));
        step.cu_seqlens_q = vec![0, i32::try_from(q_len).unwrap()];
        step.seq_lens = vec![i32::try_from(kv_len).unwrap()];
        step
    }

    /// Mean of `values [tokens, heads, head_dim]` over one block, in f64.
    fn plain_mean(values: &[f32], paged: &Paged, block_size: usize, at: BlockAt) -> Vec<f32> {
        let (heads, dim) = (paged.shape.num_kv_heads, paged.shape.head_dim);
        let tokens = at.block * block_size..(at.block + 1) * block_size;
        let mean = |x: usize| {
            let values = tokens.clone().map(|t| f64::from(values[(t * heads + at.kv_head) * dim + x]));
            values.sum::<f64>() / block_size as f64
        };
        #[expect(clippy::cast_possible_truncation, reason = "means are stored as f32")]
        (0..dim).map(|x| mean(x) as f32).collect()
    }

    fn assert_means(paged: &Paged, block_size: usize, (k, v): &(Vec<f32>, Vec<f32>)) {
        let (layout, batch) = (layout(paged, block_size), paged.batch());
        let summaries = Summaries { k_mean: k, v_mean: Some(v) };
        for (req, request) in paged.requests.iter().enumerate() {
            for block in 0..batch.kv_len(req) / block_size {
                for kv_head in 0..paged.shape.num_kv_heads {
                    let at = BlockAt { req, block, kv_head };
                    // Equal to the bit: f64 sums of 64 bf16 values are exact, so order does not matter.
                    assert_eq!(
                        summaries.k(&layout, &batch, at),
                        plain_mean(&request.k, paged, block_size, at)
                    );
                    let v_mean = plain_mean(&request.v, paged, block_size, at);
                    assert_eq!(summaries.v(&layout, &batch, at), Some(&v_mean[..]));
                }
            }
        }
    }

    #[test]
    fn any_write_schedule_gives_the_recomputed_means() {
        for (page_size, block_size) in SIZES {
            let paged = Paged::random(4, shape(2, 1, 64, page_size, Dtype::Bf16), &[(1, 333)]);
            let layout = paged.layout(Settings { block_size, ..Settings::of(Selector::FlashPrefill) });
            let layout =
                Layout { limits: crate::plan::Limits { max_total_q: 333, ..layout.limits }, ..layout };
            let mut first = None;
            for schedule in [vec![333], vec![100, 7, 93, 128, 5], vec![1; 333]] {
                let mut means = empty(&layout, &paged);
                let mut kv_len = 0;
                for q_len in schedule {
                    kv_len += q_len;
                    run(&layout, &step(&paged, q_len, kv_len), Which::Completed, &mut means);
                }
                assert_means(&paged, block_size, &means);
                let bits: Vec<u32> = means.0.iter().chain(&means.1).map(|x| x.to_bits()).collect();
                assert_eq!(first.get_or_insert_with(|| bits.clone()), &bits);
            }
        }
    }

    #[test]
    fn ragged_batches_are_summarised_request_by_request() {
        for (page_size, block_size) in SIZES {
            let shape = shape(2, 2, 64, page_size, Dtype::Bf16);
            let paged = Paged::random(8, shape, &[(3, 200), (70, 70), (2, 1), (64, 256)]);
            let layout = layout(&paged, block_size);
            let mut means = empty(&layout, &paged);
            run(&layout, &paged, Which::All, &mut means);
            assert_means(&paged, block_size, &means);
        }
    }

    #[test]
    fn threads_change_nothing_and_large_steps_use_them() {
        let paged = Paged::random(6, shape(4, 1, 128, 16, Dtype::Bf16), &[(640, 640), (100, 700)]);
        let layout = layout(&paged, 64);
        const { assert!(2 * 640 * 4 * 128 >= MIN_PARALLEL_ELEMENTS) };
        let mut means = empty(&layout, &paged);
        run(&layout, &paged, Which::All, &mut means);
        assert_means(&paged, 64, &means);
    }

    /// Requests 0 and 1 share their first two pages, in which no block of 64 ends; then they differ.
    #[test]
    fn requests_that_share_a_prefix_keep_their_own_means() {
        for (page_size, block_size) in SIZES {
            let shape = shape(2, 1, 64, page_size, Dtype::Bf16);
            let width = 2 * 64;
            let requests: Vec<Request> = (0..2).map(|seed| Request::random(seed, &shape, 9, 200)).collect();
            let mut requests = requests;
            let shared = 2 * page_size;
            let (k, v) = (requests[0].k[..shared * width].to_vec(), requests[0].v[..shared * width].to_vec());
            requests[1].k[..shared * width].copy_from_slice(&k);
            requests[1].v[..shared * width].copy_from_slice(&v);
            let mut paged = Paged::place(3, shape, requests);
            let row = paged.block_table.len() / 2;
            let (first, second) = paged.block_table.split_at_mut(row);
            second[..2].copy_from_slice(&first[..2]);
            let layout = layout(&paged, block_size);
            let mut means = empty(&layout, &paged);
            run(&layout, &paged, Which::All, &mut means);
            assert_means(&paged, block_size, &means);
        }
    }

    #[test]
    fn pages_reused_for_other_tokens_get_the_means_of_the_new_ones() {
        for (page_size, block_size) in SIZES {
            let shape = shape(2, 1, 64, page_size, Dtype::Bf16);
            let old = Paged::random(11, shape, &[(150, 150)]);
            let new = Paged::random(12, shape, &[(150, 150)]);
            // The same pages: placement depends on the seed alone.
            let new = Paged::place(11, shape, new.requests);
            let layout = layout(&new, block_size);
            let (mut reused, mut fresh) = (empty(&layout, &new), empty(&layout, &new));
            run(&layout, &old, Which::Completed, &mut reused);
            run(&layout, &new, Which::Completed, &mut reused);
            run(&layout, &new, Which::Completed, &mut fresh);
            let bits = |x: &(Vec<f32>, Vec<f32>)| -> Vec<u32> {
                x.0.iter().chain(&x.1).map(|x| x.to_bits()).collect()
            };
            assert_eq!(bits(&reused), bits(&fresh));
            assert_means(&new, block_size, &reused);
        }
    }

    #[test]
    fn completed_touches_only_the_blocks_that_this_step_completes() {
        let paged = Paged::random(2, shape(1, 1, 64, 16, Dtype::Bf16), &[(40, 150)]);
        let layout = layout(&paged, 32);
        let mut means = empty(&layout, &paged);
        run(&layout, &paged, Which::Completed, &mut means);
        let (batch, summaries) = (paged.batch(), Summaries { k_mean: &means.0, v_mean: None });
        let written = |block| {
            let k = summaries.k(&layout, &batch, BlockAt { req: 0, block, kv_head: 0 });
            k.iter().all(|x| x.is_finite())
        };
        // 110 tokens were there: block 3 (96..128) is completed, block 4 (128..160) is not.
        assert_eq!([0, 1, 2, 3].map(written), [false, false, false, true]);
        assert_eq!(means.0.iter().filter(|x| x.is_finite()).count(), 64);
    }
}
