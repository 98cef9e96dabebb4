//! A small engine whose pages live many lives: prefix sharing, copy on write, preemption by recomputation and by swap,
//! roll-backs, steps of another backend, chunk boundaries anywhere. Of its KV writes only those of [`History::step`] are
//! seen by the library; every page that changes hands is NaN until its new owner writes it.

use std::collections::HashMap;

use compactattn::plan::Limits;
use compactattn::settings::{DenseRules, Keep, Scope, Selector, Settings};
use compactattn::types::{Dtype, Shape};

use super::case::Case;
use super::pool::{Packed, Pools, Strides};
use super::rng::Rng;

/// The engine between two steps.
pub(crate) struct History {
    rng: Rng,
    shape: Shape,
    settings: Settings,
    pools: Pools,
    running: Vec<Sequence>,
    /// Pages that nobody owns, first freed first; their contents may still be hit.
    free: Vec<usize>,
    owners: Vec<usize>,
    /// By the identity of a page's last token, and with it of all before.
    cached: HashMap<u64, usize>,
}

/// One sequence.
struct Sequence {
    /// Identities: each follows from the token and all before it, as keys do.
    tokens: Vec<u64>,
    /// Tokens whose KV is in the pool.
    written: usize,
    pages: Vec<usize>,
}

impl History {
    /// The history of `seed`: a pool in which most pages are used again every few steps.
    pub(crate) fn new(seed: u64, selectors: &[Selector], dtypes: &[Dtype]) -> Self {
        let mut rng = Rng::new(seed);
        let num_kv_heads = rng.within(1, 2);
        let head_dim = rng.pick(&[64, 64, 128]);
        let dtype = rng.pick(dtypes);
        let shape = Shape {
            num_q_heads: num_kv_heads * rng.pick(&[1, 2, 4]),
            num_kv_heads,
            head_dim,
            page_size: rng.pick(&[16, 16, 32, 64]),
            dtype,
            kv_dtype: if rng.once_in(4) { Dtype::E4m3 } else { dtype },
            sm_scale: 1.0 / (head_dim as f32).sqrt(),
        };
        let settings = settings(&mut rng, selectors);
        let num_pages = 2 * LONGEST / shape.page_size + 3;
        let strides = Strides::random(&mut rng, &shape, num_pages);
        let mut free: Vec<usize> = (0..num_pages).collect();
        rng.shuffle(&mut free);
        let pools = Pools::poisoned(&shape, strides, num_pages);
        let owners = vec![0; num_pages];
        Self { rng, shape, settings, pools, running: Vec::new(), free, owners, cached: HashMap::new() }
    }

    /// What happens between steps, then a step of up to three sequences as the library sees it, its KV written.
    pub(crate) fn step(&mut self) -> Case {
        let done = |s: &Sequence| s.written == s.tokens.len();
        while let Some(i) = self.running.iter().position(done) {
            self.leave(i);
        }
        for _ in 0..self.rng.within(0, 3) {
            self.happen();
        }
        while self.running.is_empty() || (self.running.len() < 3 && self.rng.once_in(3)) {
            self.admit();
        }
        self.room_for_all();
        let mut chunks = Vec::new();
        for i in 0..self.running.len() {
            let left = self.running[i].tokens.len() - self.running[i].written;
            let most = left.min(MOST_QUERIES);
            let q = if self.rng.once_in(4) { 1 } else { self.rng.within(1, most) };
            if !chunks.is_empty() && self.rng.once_in(4) {
                continue;
            }
            self.advance(i, q);
            chunks.push((i, q));
        }
        self.case(&chunks)
    }

    /// One thing that a step of the library's does not show.
    fn happen(&mut self) {
        if self.running.is_empty() {
            return;
        }
        let i = self.rng.below(self.running.len());
        match self.rng.below(6) {
            0 => drop(self.leave(i)),
            1 => {
                // Recomputed from its start, or from what the prefix cache still holds.
                let tokens = self.leave(i).tokens;
                self.enter(tokens);
            }
            2 => self.swap(i),
            3 => self.roll_back(i),
            _ => {
                // Another backend's steps.
                let left = self.running[i].tokens.len() - self.running[i].written;
                let more = self.rng.within(0, left - 1);
                self.advance(i, more);
            }
        }
    }

    /// A new sequence; half of them start as another did.
    fn admit(&mut self) {
        let len = self.rng.within(LONGEST / 4, LONGEST);
        let shared = if self.rng.once_in(2) { self.rng.below(len) } else { 0 };
        let of_document = 1 + self.rng.below(2) as u64;
        let mut tokens: Vec<u64> = Vec::new();
        for t in 0..len {
            let symbol = if t < shared { of_document + t as u64 } else { self.rng.next() };
            tokens.push(follow(tokens.last().copied(), symbol));
        }
        self.enter(tokens);
    }

    /// Takes over the whole pages that the prefix cache still holds; one token at least is left to compute.
    fn enter(&mut self, tokens: Vec<u64>) {
        let size = self.shape.page_size;
        let mut pages = Vec::new();
        while (pages.len() + 1) * size < tokens.len() {
            let Some(&page) = self.cached.get(&tokens[(pages.len() + 1) * size - 1]) else { break };
            self.owners[page] += 1;
            self.free.retain(|&free| free != page);
            pages.push(page);
        }
        self.running.push(Sequence { tokens, written: pages.len() * size, pages });
    }

    fn leave(&mut self, i: usize) -> Sequence {
        let sequence = self.running.swap_remove(i);
        // The end of a sequence is used again first.
        sequence.pages.iter().rev().for_each(|&page| self.release(page));
        sequence
    }

    fn release(&mut self, page: usize) {
        self.owners[page] -= 1;
        if self.owners[page] == 0 {
            self.free.push(page);
        }
    }

    /// Out of the pool, and back to other pages.
    fn swap(&mut self, i: usize) {
        let Sequence { tokens, written, .. } = self.leave(i);
        self.running.push(Sequence { tokens, written: 0, pages: Vec::new() });
        self.advance(self.running.len() - 1, written);
    }

    /// Forgets some tokens and goes on with others; a shared last page is copied before it is written.
    fn roll_back(&mut self, i: usize) {
        let size = self.shape.page_size;
        let kept = self.rng.within(0, self.running[i].written);
        let len = self.running[i].tokens.len();
        self.running[i].tokens.truncate(kept);
        for _ in kept..len {
            let symbol = self.rng.next();
            let token = follow(self.running[i].tokens.last().copied(), symbol);
            self.running[i].tokens.push(token);
        }
        let dropped = self.running[i].pages.split_off(kept.div_ceil(size));
        dropped.iter().rev().for_each(|&page| self.release(page));
        self.running[i].written = kept / size * size;
        if !kept.is_multiple_of(size) {
            // The rest of the page is written anew, on a page of its own where others read the old one.
            let page = self.running[i].pages.pop().expect("holds the last tokens");
            self.release(page);
            self.advance(i, kept % size);
        }
    }

    /// Sends sequences away until any step fits the pool.
    fn room_for_all(&mut self) {
        let wanted = |s: &Sequence, size: usize| s.tokens.len().div_ceil(size) - s.pages.len();
        while self.running.iter().map(|s| wanted(s, self.shape.page_size)).sum::<usize>() > self.free.len() {
            self.leave(0);
        }
    }

    /// Writes the KV of the sequence's next `count` tokens.
    fn advance(&mut self, i: usize, count: usize) {
        let size = self.shape.page_size;
        for _ in 0..count {
            let t = self.running[i].written;
            if t == self.running[i].pages.len() * size {
                let Some(page) = self.allocate() else { return };
                self.running[i].pages.push(page);
            }
            let (token, page) = (self.running[i].tokens[t], self.running[i].pages[t / size]);
            let start = self.running[i].tokens[t - t % 16];
            self.write((page, t % size), token, start);
            self.running[i].written += 1;
            if (t + 1).is_multiple_of(size) {
                self.cached.entry(token).or_insert(page);
            }
        }
    }

    /// The page freed longest ago, or any; nothing of its past is left but what the library keeps of it.
    fn allocate(&mut self) -> Option<usize> {
        if self.free.is_empty() {
            return None;
        }
        let at = if self.rng.once_in(4) { self.rng.below(self.free.len()) } else { 0 };
        let page = self.free.remove(at);
        self.owners[page] = 1;
        self.cached.retain(|_, &mut cached| cached != page);
        let nan = vec![f32::NAN; self.shape.head_dim];
        for row in 0..self.shape.page_size {
            for head in 0..self.shape.num_kv_heads {
                [false, true].iter().for_each(|&v| self.pools.write(v, (page, row), head, &nan));
            }
        }
        Some(page)
    }

    /// Keys lean, 16 tokens at a time, so that blocks differ in what they are worth.
    fn write(&mut self, slot: (usize, usize), token: u64, start: u64) {
        let (mut rng, mut of_run) = (Rng::new(token), Rng::new(start));
        let gain = of_run.normal() * 1.5;
        for head in 0..self.shape.num_kv_heads {
            let k: Vec<f32> = (0..self.shape.head_dim).map(|_| gain * 0.3 + rng.normal()).collect();
            let v: Vec<f32> = (0..self.shape.head_dim).map(|_| rng.normal()).collect();
            self.pools.write(false, slot, head, &k);
            self.pools.write(true, slot, head, &v);
        }
    }

    fn case(&mut self, chunks: &[(usize, usize)]) -> Case {
        let limits = Limits { max_num_reqs: 3, max_total_q: 3 * MOST_QUERIES, max_kv_len: LONGEST };
        let mut cu_seqlens_q = vec![0];
        let width = LONGEST / self.shape.page_size + 1;
        let (mut seq_lens, mut table) = (Vec::new(), Vec::new());
        for &(i, q) in chunks {
            let sequence = &self.running[i];
            cu_seqlens_q.push(cu_seqlens_q[cu_seqlens_q.len() - 1] + q as i32);
            seq_lens.push(sequence.written as i32);
            let pages = sequence.pages.iter().map(|&page| page as i32);
            table.extend(pages.chain(std::iter::repeat(-1)).take(width));
        }
        let total_q = chunks.iter().map(|&(_, q)| q).sum();
        let mut q = Packed::poisoned(&mut self.rng, &self.shape, total_q);
        for token in 0..total_q {
            for head in 0..self.shape.num_q_heads {
                let x: Vec<f32> = (0..self.shape.head_dim).map(|_| 0.3 + self.rng.normal()).collect();
                q.write(token, head, &x);
            }
        }
        Case {
            shape: self.shape,
            settings: self.settings,
            limits,
            splits: 1,
            q,
            pools: self.pools.clone(),
            cu_seqlens_q,
            seq_lens,
            table,
            table_stride: width,
            table_width: width,
        }
    }
}

/// Always sparse, and few blocks kept, so that a stale mean is likely to move one.
fn settings(rng: &mut Rng, selectors: &[Selector]) -> Settings {
    let selector = rng.pick(selectors);
    let scope = Scope { query_span: rng.pick(&[0, 128]), heads_per_list: rng.pick(&[0, 1]) };
    let base = Settings::of(selector);
    Settings {
        block_size: rng.pick(&[16, 32, 64, 128]),
        scope,
        keep: Keep::Density(rng.pick(&[0.2, 0.4])),
        min_density: 0.0,
        max_density: 1.0,
        sink_blocks: 0,
        local_blocks: 0,
        density_guard: 1.0,
        mean_correction: !compactattn::select::needs_summaries(selector),
        dense: DenseRules { below_kv_len: 0, max_q_len: 0, prefix_tokens: 0 },
        ..base
    }
}

fn follow(before: Option<u64>, symbol: u64) -> u64 {
    Rng::new(before.unwrap_or(7).rotate_left(17) ^ symbol).next()
}

/// Tokens of the longest sequence.
const LONGEST: usize = 384;
const MOST_QUERIES: usize = 90;
