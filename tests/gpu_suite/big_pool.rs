//! Pools of more than 2^31 elements, with pages at both ends and on both sides of every 32-bit border.
//!
//! Each case runs in a small pool first, judged by the oracle; then the same contents on pages of the large one: the
//! same bits. On a CPU context the large pool is address space of which only the pages in use exist.

use compactattn::capi::*;
use compactattn::settings::Selector;
use compactattn::types::{Dtype, Shape};

use super::abi::{F32, NONE, Refusal, tensor};
use super::bad_input::results;
use super::cases;
use super::check::Worker;
use super::device::{Device, struct_size};
use super::memory::POISON;
use super::rounds::Rounds;
use super::scenes;
use super::step::{Done, Given, Step, ok, store_bytes};
use crate::common::case::{Case, Lens};
use crate::common::pool::Strides;
use crate::common::rng::Rng;
use crate::common::tenants;

const SELECTORS: [Selector; 4] =
    [Selector::Dense, Selector::SampledExact, Selector::XAttention, Selector::FlashPrefill];
/// Bytes of keys and values together: in 16-bit types 2^31 elements and more each, of e4m3 twice as many.
const BYTES: usize = 4 * ((1 << 31) + (1 << 28));

pub(crate) fn run(device: &Device, rounds: &Rounds) -> bool {
    device.enter();
    let Some(large) = Large::new(device) else {
        println!("  not run: no room for {BYTES} bytes");
        return false;
    };
    // One pool, so one thread.
    let rounds = Rounds { threads: 1, ..*rounds };
    println!("  pools of {} elements each or twice as many, {BYTES} bytes together", BYTES / 4);
    rounds.run(device, |worker, rng, index| one(worker, rng, (&large, index)))
}

fn one(worker: &mut Worker, rng: &mut Rng, (large, index): (&Large, u64)) -> Result<(), Refusal> {
    let selector = SELECTORS[(index % 4) as usize];
    let dtype = rng.pick(&[Dtype::Bf16, Dtype::F16]);
    let page = rng.pick(&[16, 64, 128]);
    let heads = rng.pick(&[[4, 2], [8, 8], [8, 1]]);
    let mut shape = scenes::shape(heads, rng.pick(&[64, 128]), page, dtype);
    if selector != Selector::XAttention && rng.once_in(3) {
        shape.kv_dtype = Dtype::E4m3;
    }
    let settings = scenes::settings(selector, rng.pick(&[16, 32, 64]));
    let lens: Vec<Lens> = (0..rng.within(1, 3))
        .map(|_| (rng.within(1, 60), rng.below(400)))
        .map(|(q, past)| Lens { q, kv: q + past })
        .collect();
    let case = Case { splits: 1, ..Case::with(rng, shape, settings, &lens) };
    worker.judged(&case, &Given::Nothing)?;
    let device = worker.device;
    let step = Step::new(device, &mut worker.memory, &case, &Given::Nothing, worker.stream)?;
    on_large(device, &step, rng, large)
        .map_err(|e| Refusal::Fault(format!("{}: {e}", cases::describe(&case))))
}

/// The same bits from both pools.
fn on_large(device: &Device, step: &Step, rng: &mut Rng, large: &Large) -> Done {
    step.update_summaries()?;
    let wanted = results(step, compactattn_status::COMPACTATTN_OK, &|_, _| {})?;
    let pool = Pool::new(large, &step.case.shape, rng);
    let to = pool.pages_for(step.case, rng);
    pool.fill(device, step.case, &to);
    let means = Means::new(device, step, pool.pages);
    let table = moved_table(step.case, &to);
    let entries = device.allocate((table.len() * 4).max(1));
    device.write(entries, bytemuck::cast_slice(&table));
    let got = run_there(step, &pool, &means, entries);
    device.release(entries, (table.len() * 4).max(1));
    means.release(device);
    pool.clear(device, &to);
    if got? == wanted {
        return Ok(());
    }
    let used: Vec<usize> = to.iter().flatten().copied().collect();
    Err(format!("other bits on pages {used:?} of {} than on those of a small pool", pool.pages))
}

fn run_there(step: &Step, pool: &Pool, means: &Means, entries: u64) -> Result<[Vec<u8>; 2], String> {
    let place = |batch: &mut compactattn_batch| {
        (batch.k, batch.v) = (pool.tensor(false), pool.tensor(true));
        batch.block_table.data = pointer(entries).cast();
    };
    let summaries = means.summaries(step, pool.pages);
    if step.needs_summaries() {
        let mut batch = step.batch();
        place(&mut batch);
        let which = compactattn_which::COMPACTATTN_WHICH_ALL as i32;
        // SAFETY: the structs describe live memory of the sizes they say.
        ok("summaries_update", unsafe {
            compactattn_summaries_update(step.plan.handle, 0, &raw const batch, which, &raw const summaries)
        })?;
    }
    results(step, compactattn_status::COMPACTATTN_OK, &|batch, args| {
        place(batch);
        if step.needs_summaries() {
            args.summaries = &raw const summaries;
        }
    })
}

/// The buffer of both pools.
struct Large {
    base: u64,
}

// SAFETY: an address; threads write to parts of their own.
unsafe impl Sync for Large {}

impl Large {
    fn new(device: &Device) -> Option<Self> {
        let bytes = BYTES;
        if let Some(cuda) = &device.cuda {
            if cuda.free_bytes() < bytes + (4 << 30) {
                return None;
            }
            let base = cuda.alloc(bytes);
            // NaN everywhere: what must not be read shows.
            cuda.fill(base, POISON, bytes);
            return Some(Self { base });
        }
        // SAFETY: new address space at an address of the system's choice; pages appear as they are written.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        (base != libc::MAP_FAILED).then(|| Self { base: base.expose_provenance() as u64 })
    }
}

/// Pools of one shape in the large buffer.
struct Pool {
    base: u64,
    shape: Shape,
    pages: usize,
    /// Elements from one page to the next, and from keys to values.
    page: usize,
    v_from: usize,
    /// Bytes of an element.
    size: usize,
}

impl Pool {
    /// Keys and values apart, or beside one another page by page: then offsets pass 2^32 elements in every type.
    fn new(large: &Large, shape: &Shape, rng: &mut Rng) -> Self {
        let (own, size) =
            (shape.page_size * shape.num_kv_heads * shape.head_dim, shape.kv_dtype.size_bytes());
        let pages = BYTES / 2 / size / own;
        let (page, v_from) = if rng.once_in(3) { (own, own * pages) } else { (2 * own, own) };
        Self { base: large.base, shape: *shape, pages, page, v_from, size }
    }

    /// For each page of the case's pool, a page of this one: the farthest beyond 2^32 for what every query reads, then
    /// the ends, the borders of 2^31 and 2^32 elements and of 2^31 and 2^32 bytes, and any others. All else is NaN (on
    /// a CPU 0), so wherever an offset that was cut leads, it shows.
    fn pages_for(&self, case: &Case, rng: &mut Rng) -> Vec<Option<usize>> {
        let borders = [1_usize << 30, 1 << 31, 1 << 32].map(|at| at / self.page);
        let near = |at: usize| [at.saturating_sub(1), at, at + 1];
        let mut wanted: Vec<usize> = borders.into_iter().flat_map(near).chain([0, 1]).collect();
        wanted.retain(|&page| page < self.pages);
        rng.shuffle(&mut wanted);
        wanted.extend([self.pages - 2 - rng.below(8), self.pages - 1]);
        let mut taken = std::collections::HashSet::new();
        let mut next = || loop {
            let page = wanted.pop().unwrap_or_else(|| rng.below(self.pages));
            if taken.insert(page) {
                return page;
            }
        };
        let mut to = vec![None; case.pools.num_pages];
        for page in read_by_all(case) {
            to[page] = to[page].or_else(|| Some(next()));
        }
        for (to, owned) in to.iter_mut().zip(tenants::owned_pages(case)) {
            *to = to.or_else(|| (owned > 0).then(&mut next));
        }
        to
    }

    /// Copies the case's pages; NHD here, whatever the case has.
    fn fill(&self, device: &Device, case: &Case, to: &[Option<usize>]) {
        let mut flat = case.clone();
        let dense = Strides::packed(&case.shape, case.pools.num_pages).scaled_as(case.pools.strides);
        flat.pools = crate::common::variants::restrided(case, dense);
        let own = self.page_bytes();
        for (from, to) in to.iter().enumerate().filter_map(|(from, to)| Some((from, (*to)?))) {
            for v in [false, true] {
                let at = flat.pools.offset(v, (from, 0), 0) * self.size;
                let bytes = &store_bytes(&flat.pools.store)[at..at + own];
                device.write(self.address(v, to), bytes);
            }
        }
    }

    /// NaN again, or on the CPU nothing at all.
    fn clear(&self, device: &Device, to: &[Option<usize>]) {
        let own = self.page_bytes();
        for to in to.iter().flatten() {
            for v in [false, true] {
                device.fill(self.address(v, *to), POISON, own);
            }
        }
    }

    /// Of its keys, or of its values.
    fn page_bytes(&self) -> usize {
        self.shape.page_size * self.shape.num_kv_heads * self.shape.head_dim * self.size
    }

    fn address(&self, v: bool, page: usize) -> u64 {
        self.base + (self.size * (page * self.page + if v { self.v_from } else { 0 })) as u64
    }

    fn tensor(&self, v: bool) -> compactattn_tensor {
        let s = &self.shape;
        let strides = [self.page, s.num_kv_heads * s.head_dim, s.head_dim, 1];
        let dims = [self.pages, s.page_size, s.num_kv_heads, s.head_dim];
        let skip = if v { self.size * self.v_from } else { 0 };
        tensor(pointer(self.base + skip as u64), BYTES - skip, s.kv_dtype as i32, &dims, Some(&strides))
    }
}

/// Mean keys of every page of the large pool, where the selector reads them.
struct Means {
    base: u64,
    bytes: usize,
}

impl Means {
    fn new(device: &Device, step: &Step, pages: usize) -> Self {
        let s = &step.case.shape;
        let slots = step.plan.sizes.summary_slots_per_page as usize;
        let bytes = if step.needs_summaries() { pages * slots * s.num_kv_heads * s.head_dim * 4 } else { 0 };
        Self { base: if bytes > 0 { device.allocate(bytes) } else { 0 }, bytes }
    }

    fn summaries(&self, step: &Step, pages: usize) -> compactattn_summaries {
        let s = &step.case.shape;
        let slots = step.plan.sizes.summary_slots_per_page as usize;
        let dims = [pages, slots, s.num_kv_heads, s.head_dim];
        compactattn_summaries {
            struct_size: struct_size::<compactattn_summaries>(),
            reserved: 0,
            k_mean: tensor(pointer(self.base), self.bytes, F32, &dims, None),
            v_mean: NONE,
            seals: NONE,
        }
    }

    fn release(&self, device: &Device) {
        device.release(self.base, self.bytes);
    }
}

/// The case's table on the large pool's pages; what follows a valid prefix names pages that are there.
fn moved_table(case: &Case, to: &[Option<usize>]) -> Vec<i32> {
    let moved = |&entry: &i32| {
        let page = usize::try_from(entry).ok().and_then(|page| to.get(page).copied().flatten());
        page.map_or(entry, |page| page as i32)
    };
    case.table.iter().map(moved).collect()
}

/// First and last page of each request: sink and open region, which every list has.
fn read_by_all(case: &Case) -> Vec<usize> {
    let batch = case.batch();
    let reqs = (0..batch.num_reqs()).filter(|&req| batch.q_len(req) > 0 && batch.kv_len(req) > 0);
    reqs.flat_map(|req| [(batch.kv_len(req) - 1) / case.shape.page_size, 0].map(|i| batch.page(req, i)))
        .collect()
}

fn pointer(address: u64) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(address as usize)
}
