//! A small serving engine for the soak: requests come, are prefilled in chunks, decode a little, leave or are aborted;
//! their pages come from a pool that is nearly always full. Pages that nobody owns are NaN.

use super::memory::{POISON, Part};
use super::step::{Step, store_bytes};
use crate::common::case::Case;
use crate::common::pool::{Packed, Pools, Store, Strides};
use crate::common::rng::Rng;
use compactattn::plan::Limits;
use compactattn::settings::Settings;
use compactattn::types::Shape;

/// How large the engine is.
#[derive(Clone, Copy)]
pub(crate) struct Scale {
    pub(crate) shape: Shape,
    pub(crate) limits: Limits,
    pub(crate) num_pages: usize,
    /// Query tokens of a step, at least and at most.
    pub(crate) chunk: [usize; 2],
}

pub(crate) struct Engine {
    pub(crate) rng: Rng,
    pub(crate) scale: Scale,
    /// The next step; its pool mirrors the device's.
    pub(crate) case: Case,
    free: Vec<usize>,
    running: Vec<Request>,
    /// Random elements of the cache's type.
    noise: Store,
    pub(crate) admitted: usize,
    pub(crate) aborted: usize,
    pub(crate) finished: usize,
    /// Pages in use at the fullest, and pages handed out in all.
    pub(crate) fullest: usize,
    pub(crate) handed_out: usize,
}

struct Request {
    prompt: usize,
    written: usize,
    /// Tokens it still decodes after its prompt.
    decodes: usize,
    /// Tokens after which it is aborted.
    dies_at: usize,
    pages: Vec<usize>,
    /// Never leaves: the one whose steps are timed.
    pinned: bool,
}

/// What changed in the pool: (page, first row, rows).
pub(crate) type Written = Vec<(usize, usize, usize)>;

impl Engine {
    /// An empty engine; its first request is pinned and gets all its tokens by steps of [`Engine::advance`].
    pub(crate) fn new(seed: u64, scale: Scale, settings: Settings) -> Self {
        let mut rng = Rng::new(seed);
        let (shape, limits) = (scale.shape, scale.limits);
        let strides = Strides::packed(&shape, scale.num_pages);
        let mut q = Packed::poisoned(&mut rng, &shape, limits.max_total_q);
        for (token, head) in
            (0..limits.max_total_q).flat_map(|t| (0..shape.num_q_heads).map(move |head| (t, head)))
        {
            let x: Vec<f32> = (0..shape.head_dim).map(|_| rng.normal()).collect();
            q.write(token, head, &x);
        }
        let width = limits.max_kv_len.div_ceil(shape.page_size);
        let case = Case {
            shape,
            settings,
            limits,
            splits: 2,
            q,
            pools: Pools::poisoned(&shape, strides, scale.num_pages),
            // One request with all queries: what memory is laid out for.
            cu_seqlens_q: [vec![0], vec![limits.max_total_q as i32; limits.max_num_reqs]].concat(),
            seq_lens: vec![0; limits.max_num_reqs],
            table: vec![-1; limits.max_num_reqs * width],
            table_stride: width,
            table_width: width,
        };
        let mut free: Vec<usize> = (0..scale.num_pages).collect();
        rng.shuffle(&mut free);
        let page = shape.page_size * shape.num_kv_heads * shape.head_dim;
        let mut noise = Store::filled(shape.kv_dtype, (1 << 18) + page, 0.0);
        let drawn: Vec<f32> = (0..(1 << 18) + page).map(|_| rng.normal()).collect();
        noise.put(0, &drawn);
        let mut engine = Self {
            rng,
            scale,
            case,
            free,
            running: Vec::new(),
            noise,
            admitted: 0,
            aborted: 0,
            finished: 0,
            fullest: 0,
            handed_out: 0,
        };
        engine.enter(limits.max_kv_len / 16, true);
        engine
    }

    /// Takes in what fits, chooses this step's chunks, puts their KV into the pool's mirror; what must be uploaded.
    pub(crate) fn advance(&mut self) -> Written {
        self.admit();
        let [least, most] = self.scale.chunk;
        let mut budget = self.rng.within(least, most);
        let mut order: Vec<usize> = (0..self.running.len()).collect();
        self.rng.shuffle(&mut order);
        let (mut chunks, mut written) = (Vec::new(), Written::new());
        for i in order {
            let request = &self.running[i];
            let left = request.prompt.saturating_sub(request.written);
            let pinned_done = request.pinned && left == 0;
            let q = if left == 0 { 1 } else { left.min(budget) };
            if q == 0 || pinned_done || chunks.len() == self.scale.limits.max_num_reqs || q > budget {
                continue;
            }
            budget -= q;
            self.write(i, q, &mut written);
            chunks.push((i, q));
        }
        self.describe(&chunks);
        written
    }

    /// The pinned request's last tokens once more, alone; None until it has all of them.
    pub(crate) fn probe(&mut self) -> Option<()> {
        let pinned = self.running.iter().position(|r| r.pinned && r.written == r.prompt)?;
        let q = self.scale.chunk[0].min(self.running[pinned].prompt);
        self.describe(&[(pinned, q)]);
        Some(())
    }

    /// Requests that are done or give up leave; their pages, for the next owner to find as NaN.
    pub(crate) fn leave(&mut self) -> Vec<usize> {
        let mut left = Vec::new();
        let mut i = 0;
        while i < self.running.len() {
            let r = &self.running[i];
            let (done, dead) = (r.written >= r.prompt + r.decodes, r.written >= r.dies_at);
            if r.pinned || !(done || dead) {
                i += 1;
                continue;
            }
            self.aborted += usize::from(dead);
            self.finished += usize::from(!dead);
            left.extend(self.running.swap_remove(i).pages);
        }
        for &page in &left {
            for v in [false, true] {
                let range = self.elements((page, 0), self.scale.shape.page_size, v);
                self.case.pools.store.poison(range);
            }
        }
        self.free.extend(&left);
        self.rng.shuffle(&mut self.free);
        left
    }

    /// Uploads the step and what changed in the pool.
    pub(crate) fn upload(step: &mut Step, written: &Written) {
        let (case, parts) = (step.case, step.parts);
        for &(page, row, rows) in written {
            for v in [false, true] {
                let range = elements(case, (page, row), rows, v);
                let size = case.shape.kv_dtype.size_bytes();
                let bytes = &store_bytes(&case.pools.store)[range.start * size..range.end * size];
                step.memory.set_at(parts.kv, range.start * size, bytes);
            }
        }
        step.memory.set(parts.cu, bytemuck::cast_slice(&case.cu_seqlens_q));
        step.memory.set(parts.lens, bytemuck::cast_slice(&case.seq_lens));
        step.memory.set(parts.table, bytemuck::cast_slice(&case.table));
    }

    /// NaN on the device where the mirror has it.
    pub(crate) fn poison(step: &Step, kv: Part, pages: &[usize]) {
        for &page in pages {
            for v in [false, true] {
                let range = elements(step.case, (page, 0), step.case.shape.page_size, v);
                let size = step.case.shape.kv_dtype.size_bytes();
                step.memory.fill_at(kv, range.start * size, POISON, range.len() * size);
            }
        }
    }

    /// Pages in use.
    pub(crate) fn used(&self) -> usize {
        self.scale.num_pages - self.free.len()
    }

    /// Requests of any length, while there is room; short ones where long ones do not fit.
    fn admit(&mut self) {
        for _ in 0..4 {
            if self.running.len() == self.scale.limits.max_num_reqs {
                break;
            }
            let most = self.scale.limits.max_kv_len - 32;
            let doublings = most.ilog2() as usize;
            let prompt = 1_usize << self.rng.within(doublings.saturating_sub(7), doublings);
            let drawn = self.rng.within(prompt / 2 + 1, prompt.min(most));
            // Every other one takes what is left, so that the pool stays full.
            let room = (self.free.len() * self.scale.shape.page_size).saturating_sub(32).min(most);
            let prompt = if self.rng.once_in(2) && room > 0 { room } else { drawn };
            if (prompt + 32).div_ceil(self.scale.shape.page_size) <= self.free.len() {
                self.enter(prompt, false);
            }
        }
        self.fullest = self.fullest.max(self.used());
    }

    fn enter(&mut self, prompt: usize, pinned: bool) {
        let pages = (prompt + 32).div_ceil(self.scale.shape.page_size);
        let pages = self.free.split_off(self.free.len() - pages);
        self.handed_out += pages.len();
        let dies = !pinned && self.rng.below(10) < 3;
        let dies_at = if dies { self.rng.within(1, prompt) } else { usize::MAX };
        let decodes = self.rng.below(24);
        self.running.push(Request { prompt, written: 0, decodes, dies_at, pages, pinned });
        self.admitted += 1;
    }

    /// `q` more tokens of request `i`, page by page.
    fn write(&mut self, i: usize, q: usize, written: &mut Written) {
        let size = self.scale.shape.page_size;
        let (mut at, end) = (self.running[i].written, self.running[i].written + q);
        while at < end {
            let (page, row) = (self.running[i].pages[at / size], at % size);
            let rows = (size - row).min(end - at);
            for v in [false, true] {
                let range = self.elements((page, row), rows, v);
                let from = self.rng.below(1 << 18);
                self.case.pools.store.copy(range, &self.noise, from);
            }
            written.push((page, row, rows));
            at += rows;
        }
        self.running[i].written = end;
    }

    /// The step of these `(request, query tokens)`; rows without a request ask nothing.
    fn describe(&mut self, chunks: &[(usize, usize)]) {
        let case = &mut self.case;
        case.table.fill(-1);
        case.seq_lens.fill(0);
        let mut total = 0;
        for at in 0..case.seq_lens.len() {
            if let Some(&(i, q)) = chunks.get(at) {
                let request = &self.running[i];
                case.seq_lens[at] = request.written as i32;
                let used = request.written.div_ceil(case.shape.page_size);
                let row = &mut case.table[at * case.table_stride..][..used];
                row.iter_mut().zip(&request.pages).for_each(|(entry, &page)| *entry = page as i32);
                total += q;
            }
            case.cu_seqlens_q[at + 1] = total as i32;
        }
    }

    fn elements(&self, at: (usize, usize), rows: usize, v: bool) -> std::ops::Range<usize> {
        elements(&self.case, at, rows, v)
    }
}

/// Where rows of a page lie in the store.
fn elements(case: &Case, (page, row): (usize, usize), rows: usize, v: bool) -> std::ops::Range<usize> {
    let start = case.pools.offset(v, (page, row), 0);
    start..start + rows * case.shape.num_kv_heads * case.shape.head_dim
}
