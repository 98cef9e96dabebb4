//! One random step of an engine: ragged requests on a dirty, shuffled, shared pool, skewed to edges.

use compactattn::batch::{Batch, BatchParts, BlockTable};
use compactattn::plan::{Layout, Limits};
use compactattn::settings::{DenseRules, FlashPrefill, Keep, KeepAt, Scope, Selector, Settings};
use compactattn::types::{Dtype, Shape};

use super::pool::{Packed, Pools, Strides};
use super::rng::Rng;

/// Everything one step needs, owned.
#[derive(Clone)]
pub(crate) struct Case {
    pub(crate) shape: Shape,
    pub(crate) settings: Settings,
    pub(crate) limits: Limits,
    pub(crate) splits: usize,
    pub(crate) q: Packed,
    pub(crate) pools: Pools,
    pub(crate) cu_seqlens_q: Vec<i32>,
    pub(crate) seq_lens: Vec<i32>,
    pub(crate) table: Vec<i32>,
    pub(crate) table_stride: usize,
    pub(crate) table_width: usize,
}

/// Lengths of one request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lens {
    pub(crate) q: usize,
    pub(crate) kv: usize,
}

impl Lens {
    /// Pages that the request owns; one that asks nothing needs none.
    fn pages(self, page_size: usize) -> usize {
        if self.q == 0 { 0 } else { self.kv.div_ceil(page_size) }
    }
}

impl Case {
    /// The case of `seed`, over all selectors and settings.
    pub(crate) fn random(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let shape = shape(&mut rng);
        let settings = settings(&mut rng);
        let lens = lens(&mut rng, &shape, &settings);
        Self::with(&mut rng, shape, settings, &lens)
    }

    /// Random contents for given shape, settings and lengths.
    pub(crate) fn with(rng: &mut Rng, shape: Shape, settings: Settings, lens: &[Lens]) -> Self {
        let pages_of = |l: &Lens| l.pages(shape.page_size);
        let spare = rng.within(0, 3);
        let num_pages = lens.iter().map(pages_of).sum::<usize>() + spare;
        let mut free: Vec<usize> = (0..num_pages).collect();
        rng.shuffle(&mut free);
        let share = rng.once_in(3);
        let mut owned: Vec<Vec<usize>> = Vec::new();
        for (r, l) in lens.iter().enumerate() {
            let shared = if share && r > 0 { shared_pages(rng, &shape, (lens[r - 1], *l)) } else { 0 };
            let mut pages = if shared > 0 { owned[r - 1][..shared].to_vec() } else { Vec::new() };
            pages.extend((shared..pages_of(l)).filter_map(|_| free.pop()));
            owned.push(pages);
        }
        let total_q = lens.iter().map(|l| l.q).sum();
        let strides = Strides::random(rng, &shape, num_pages.max(1));
        let widest = owned.iter().map(Vec::len).max().unwrap_or(0);
        let mut case = Self {
            shape,
            settings,
            limits: limits(rng, lens),
            splits: rng.pick(&[1, 1, 2, 5]),
            q: Packed::poisoned(rng, &shape, total_q),
            pools: Pools::poisoned(&shape, strides, num_pages.max(1)),
            cu_seqlens_q: prefix_sums(lens),
            seq_lens: lens.iter().map(|l| l.kv as i32).collect(),
            table: Vec::new(),
            table_stride: 0,
            table_width: 0,
        };
        case.table_width = widest + rng.below(4);
        case.table_stride = case.table_width + rng.below(3);
        case.fill_table(rng, &owned);
        case.fill_tokens(rng, lens, &owned);
        case
    }

    /// Other lengths, pages and contents; as many requests and queries as before, within the same pool and table.
    pub(crate) fn refill(&mut self, rng: &mut Rng, lens: &[Lens]) {
        let mut free: Vec<usize> = (0..self.pools.num_pages).collect();
        rng.shuffle(&mut free);
        let owned: Vec<Vec<usize>> =
            lens.iter().map(|l| free.split_off(free.len() - l.pages(self.shape.page_size))).collect();
        self.pools = Pools::poisoned(&self.shape, self.pools.strides, self.pools.num_pages);
        self.cu_seqlens_q = prefix_sums(lens);
        self.seq_lens = lens.iter().map(|l| l.kv as i32).collect();
        self.table.clear();
        self.fill_table(rng, &owned);
        self.fill_tokens(rng, lens, &owned);
    }

    pub(crate) fn batch(&self) -> Batch<'_> {
        let parts = BatchParts {
            q: self.q.view(),
            k: self.pools.view(false),
            v: self.pools.view(true),
            cu_seqlens_q: &self.cu_seqlens_q,
            seq_lens: &self.seq_lens,
            block_table: BlockTable {
                entries: &self.table,
                stride_row: self.table_stride,
                width: self.table_width,
            },
            total_q: self.cu_seqlens_q.last().map_or(0, |&x| x as usize),
        };
        Batch::new(self.shape, parts).expect("a valid batch")
    }

    pub(crate) fn layout(&self) -> Layout {
        Layout::new(self.shape, self.settings, self.limits).expect("valid settings")
    }

    /// Valid page ids, then ids that must never be followed: negative, huge, or another request's.
    fn fill_table(&mut self, rng: &mut Rng, owned: &[Vec<usize>]) {
        for pages in owned {
            for i in 0..self.table_stride {
                let other = rng.below(self.pools.num_pages) as i32;
                let garbage = rng.pick(&[-1, i32::MIN, i32::MAX, other, other]);
                self.table.push(pages.get(i).map_or(garbage, |&page| page as i32));
            }
        }
    }

    /// Keys and queries lean, block by block, to a direction of their head, so that attention has something to find.
    fn fill_tokens(&mut self, rng: &mut Rng, lens: &[Lens], owned: &[Vec<usize>]) {
        let (dim, size) = (self.shape.head_dim, self.shape.page_size);
        let lean = rng.pick(&[0.0, 0.3, 1.0]);
        // In some steps most of the attention falls on the chunk itself.
        let hot_chunk = rng.once_in(3);
        for kv_head in 0..self.shape.num_kv_heads {
            let direction: Vec<f32> = (0..dim).map(|_| rng.normal()).collect();
            for (l, pages) in lens.iter().zip(owned).filter(|(l, _)| l.q > 0) {
                let lean = |rng: &mut Rng, t: usize| lean * block_gain(rng, hot_chunk && t + l.q >= l.kv);
                let slots: Vec<(usize, usize)> = (0..l.kv).map(|t| (pages[t / size], t % size)).collect();
                self.fill_kv(rng, (kv_head, &slots), &direction, lean);
            }
            self.fill_queries(rng, kv_head, lean, &direction);
        }
        // A request without queries may have lengths that its table row cannot hold.
        for r in (0..lens.len()).filter(|&r| lens[r].q == 0) {
            self.seq_lens[r] = rng.pick(&[self.seq_lens[r], 1_000_000]);
        }
    }

    fn fill_kv(
        &mut self,
        rng: &mut Rng,
        (kv_head, slots): (usize, &[(usize, usize)]),
        direction: &[f32],
        lean: impl Fn(&mut Rng, usize) -> f32,
    ) {
        let mut gain = 0.0;
        for (t, &slot) in slots.iter().enumerate() {
            if t % 16 == 0 {
                gain = lean(rng, t);
            }
            let k: Vec<f32> = direction.iter().map(|d| gain * d + rng.normal()).collect();
            let v: Vec<f32> = direction.iter().map(|_| rng.normal()).collect();
            self.pools.write(false, slot, kv_head, &k);
            self.pools.write(true, slot, kv_head, &v);
        }
    }

    fn fill_queries(&mut self, rng: &mut Rng, kv_head: usize, lean: f32, direction: &[f32]) {
        let group = self.shape.group_size();
        let total_q = self.cu_seqlens_q.last().map_or(0, |&x| x as usize);
        for token in 0..total_q {
            for head in kv_head * group..(kv_head + 1) * group {
                let q: Vec<f32> = direction.iter().map(|d| lean * d + rng.normal()).collect();
                self.q.write(token, head, &q);
            }
        }
    }
}

/// How far the keys of a run of 16 tokens lean: a few of them far, a hot run as far as any.
fn block_gain(rng: &mut Rng, hot: bool) -> f32 {
    let gain = rng.normal() * if rng.once_in(8) { 2.0 } else { 0.5 };
    if hot { 1.5 } else { gain }
}

/// Whole pages that the request can take over from the one before it.
fn shared_pages(rng: &mut Rng, shape: &Shape, (before, this): (Lens, Lens)) -> usize {
    if before.q == 0 || this.q == 0 {
        return 0;
    }
    let past = |l: Lens| l.kv.saturating_sub(l.q) / shape.page_size;
    rng.within(0, past(before).min(past(this)))
}

fn prefix_sums(lens: &[Lens]) -> Vec<i32> {
    let mut sums = vec![0];
    for l in lens {
        sums.push(sums[sums.len() - 1] + l.q as i32);
    }
    sums
}

fn limits(rng: &mut Rng, lens: &[Lens]) -> Limits {
    let slack = if rng.once_in(2) { 0 } else { rng.within(1, 100) };
    let kv = lens.iter().filter(|l| l.q > 0).map(|l| l.kv).max().unwrap_or(0);
    Limits {
        max_num_reqs: lens.len().max(1) + slack / 30,
        max_total_q: lens.iter().map(|l| l.q).sum::<usize>().max(1) + slack,
        max_kv_len: kv.max(1) + slack,
    }
}

pub(crate) fn shape(rng: &mut Rng) -> Shape {
    let group = rng.pick(&[1, 1, 2, 3, 4, 4, 7, 8, 16]);
    let num_kv_heads = if group > 4 { rng.within(1, 2) } else { rng.within(1, 3) };
    let head_dim = rng.pick(&[64, 64, 64, 64, 96, 128, 128, 256]);
    let dtype = rng.pick(&[Dtype::Bf16, Dtype::F16, Dtype::F32]);
    Shape {
        num_q_heads: group * num_kv_heads,
        num_kv_heads,
        head_dim,
        page_size: rng.pick(&[16, 16, 16, 32, 64, 128, 256]),
        dtype,
        kv_dtype: if rng.once_in(4) { Dtype::E4m3 } else { dtype },
        sm_scale: rng.pick(&[1.0, 1.0, 0.5]) / (head_dim as f32).sqrt(),
    }
}

/// Lengths at edges: one token, empty, longer than the KV, on and beside page and block borders.
pub(crate) fn lens(rng: &mut Rng, shape: &Shape, settings: &Settings) -> Vec<Lens> {
    let count = rng.pick(&[1, 1, 2, 3, 4, 6]);
    let budget = if rng.once_in(20) { 12_000_000 } else { 2_500_000 };
    let each = budget / count / (shape.num_q_heads * shape.head_dim);
    (0..count).map(|_| one_lens(rng, shape, settings, each)).collect()
}

/// One request of at most about `work = q * kv`.
fn one_lens(rng: &mut Rng, shape: &Shape, settings: &Settings, work: usize) -> Lens {
    if rng.once_in(10) {
        return Lens { q: 0, kv: rng.below(100) };
    }
    let longest = if settings.block_size == 1 { 300 } else { rng.pick(&[40, 200, 500, 500, 900, 1500]) };
    let unit = rng.pick(&[1, shape.page_size, settings.block_size]);
    // On a border, or one token beside it.
    let near = |rng: &mut Rng, x: usize| (x / unit * unit + rng.below(3)).saturating_sub(1);
    let drawn = rng.below(longest);
    let past = if rng.once_in(8) { 0 } else { near(rng, drawn) };
    let most = (work / (past + 1)).clamp(1, 600);
    let q = match rng.below(8) {
        0 | 1 => 1,
        2 => rng.within(2, 17.min(most).max(2)),
        3 => most,
        4 => near(rng, most).max(1),
        _ => rng.within(1, most),
    };
    // A chunk longer than its KV: its first tokens lie before position 0 and see nothing.
    let kv = if rng.once_in(25) { rng.below(q + 1) } else { past + q };
    Lens { q, kv }
}

pub(crate) fn settings(rng: &mut Rng) -> Settings {
    let selector = Selector::ALL[rng.below(Selector::ALL.len())].0;
    let block_size = match selector {
        Selector::Quoka => rng.pick(&[1, 1, 16, 64]),
        Selector::External => rng.pick(&[1, 16, 32, 128]),
        _ => rng.pick(&[16, 16, 16, 32, 32, 64, 128, 256]),
    };
    let min_density = rng.pick(&[0.0, 0.0, 0.04, 0.3]);
    Settings {
        selector,
        block_size,
        scope: Scope {
            query_span: rng.pick(&[0, 0, 128, 256, 512, 1024]),
            heads_per_list: rng.pick(&[0, 0, 1, 1, 2, 3, 100]),
        },
        keep: keep(rng),
        keep_at: rng.pick(&[KeepAt::Row, KeepAt::List]),
        min_density,
        max_density: rng.pick(&[1.0_f32, 1.0, 0.35, 0.1]).max(min_density),
        sink_blocks: rng.pick(&[0, 1, 2]),
        local_blocks: rng.pick(&[0, 1, 3]),
        density_guard: rng.pick(&[1.0, 0.9, 0.5]),
        mean_correction: block_size > 1 && rng.once_in(3),
        dense: DenseRules {
            below_kv_len: rng.pick(&[0, 0, 0, 0, 0, 300]),
            max_q_len: rng.pick(&[0, 0, 0, 0, 1, 16]),
            prefix_tokens: rng.pick(&[0, 0, 0, 0, 0, 200]),
        },
        sample_rows: rng.pick(&[0, 1, 2, 3, 9, 32]),
        flashprefill: FlashPrefill {
            non_voting_spans: rng.pick(&[0, 0, 1, 2]),
            min_budget: rng.pick(&[0, 0, 3]),
            relative_to_past: rng.once_in(2),
        },
        quoka_query_ratio: rng.pick(&[0.25, 0.25, 1.0, 0.01]),
        xattention_stride: rng.pick(&[16, 8, 4, 2, 1]),
        two_level_factor: rng.pick(&[1.0, 2.5, 100.0]),
    }
}

fn keep(rng: &mut Rng) -> Keep {
    match rng.below(3) {
        0 => Keep::Threshold(rng.pick(&[0.001, 0.02, 0.1, 0.5, 1.0])),
        1 => Keep::Mass(rng.pick(&[0.3, 0.6, 0.9, 0.97, 1.0])),
        _ => Keep::Density(rng.pick(&[0.05, 0.1, 0.25, 0.5, 1.0])),
    }
}
