//! A small random world behind the C ABI: a paged cache, a plan on it, a forward call, and canaries around it all.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small numbers")]
#![allow(clippy::unwrap_used, clippy::wildcard_imports, reason = "tests of everything the header declares")]

pub mod memory;

use compactattn::capi::*;
use memory::{Guarded, Rng};

/// Variants of every class of bad input.
pub const VARIANTS: u64 = 100;

/// Where the parts of a [`World`] lie in its memory.
pub const Q: usize = 0;
/// K and V, interleaved by page or head, whatever the variant says.
pub const KV: usize = 1;
pub const CU: usize = 2;
pub const LENS: usize = 3;
pub const TABLE: usize = 4;
pub const OUT: usize = 5;
pub const LSE: usize = 6;
pub const WORKSPACE: usize = 7;
/// Scales of K and of V, one for each KV head; pointed to where the cache is e4m3.
pub const SCALES: [usize; 2] = [8, 9];

pub struct World {
    pub rng: Rng,
    pub desc: compactattn_plan_desc,
    pub settings: Box<compactattn_settings>,
    pub memory: Vec<Guarded>,
    pub batch: Box<compactattn_batch>,
    pub args: compactattn_forward_args,
    pub plan: *mut compactattn_plan,
    pub context: *mut compactattn_context,
    /// (queries, KV tokens) of each request.
    pub reqs: Vec<(i32, i32)>,
    pub num_pages: i32,
    pub width: usize,
}

/// What a bad call must be answered with.
pub struct Fault(pub compactattn_status, pub &'static str);

impl World {
    /// A valid world; equal seeds give equal worlds.
    pub fn random(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let reqs: Vec<(i32, i32)> = (0..rng.range(1, 4))
            .map(|_| (rng.range(1, 20), rng.range(0, 60)))
            .map(|(q, past)| (q, q + past))
            .collect();
        Self::with(rng, reqs)
    }

    /// A valid world of these requests.
    pub fn with(mut rng: Rng, reqs: Vec<(i32, i32)>) -> Self {
        let settings = Box::new(random_settings(&mut rng));
        let mut desc = random_desc(&mut rng);
        desc.settings = &raw const *settings;
        let context = new_context();
        let plan = new_plan(context, &desc);
        let page = desc.page_size;
        let pages_of = |len: i32| (len + page - 1) / page;
        let num_pages = reqs.iter().map(|r| pages_of(r.1)).sum::<i32>() + 3;
        let width = reqs.iter().map(|r| pages_of(r.1)).max().unwrap_or(0).unsigned_abs() as usize + 2;
        let total_q = reqs.iter().map(|r| r.0).sum::<i32>() as usize;
        let (heads, dim) = (desc.num_q_heads as usize, desc.head_dim as usize);
        let size = element_size(desc.dtype);
        let kv = 2 * num_pages as usize * page as usize * desc.num_kv_heads as usize * dim;
        let workspace = sizes(plan, 0).workspace_bytes as usize;
        let bytes = [
            total_q * heads * dim * size,
            kv * kv_size(&desc),
            (reqs.len() + 1) * 4,
            reqs.len() * 4,
            reqs.len() * width * 4,
            total_q * heads * dim * size,
            heads * total_q * 4,
            workspace,
            desc.num_kv_heads as usize * 4,
            desc.num_kv_heads as usize * 4,
        ];
        let memory = bytes.map(Guarded::new).into();
        let (batch, args) = (Box::new(zeroed()), zeroed());
        let mut world =
            Self { rng, desc, settings, memory, batch, args, plan, context, reqs, num_pages, width };
        world.fill();
        world.point(total_q);
        world
    }

    /// Values in q, k and v; lengths; a shuffled block table with garbage after each row's valid prefix.
    fn fill(&mut self) {
        self.memory[Q].fill_floats(self.desc.dtype, &mut self.rng);
        self.memory[KV].fill_floats(kv_dtype(&self.desc), &mut self.rng);
        for part in SCALES {
            self.memory[part].fill_scales(&mut self.rng);
        }
        let mut pages: Vec<i32> = (0..self.num_pages).collect();
        self.rng.shuffle(&mut pages);
        let mut next = pages.into_iter();
        let garbage = [-1, i32::MIN, i32::MAX, self.num_pages, 0];
        let mut cu = 0;
        for (req, &(q_len, kv_len)) in self.reqs.clone().iter().enumerate() {
            self.memory[CU].ints_mut()[req] = cu;
            cu += q_len;
            self.memory[LENS].ints_mut()[req] = kv_len;
            let used = (kv_len + self.desc.page_size - 1) / self.desc.page_size;
            for i in 0..self.width {
                let entry = if (i as i32) < used { next.next() } else { Some(*self.rng.pick(&garbage)) };
                self.memory[TABLE].ints_mut()[req * self.width + i] = entry.unwrap();
            }
        }
        self.memory[CU].ints_mut()[self.reqs.len()] = cu;
    }

    fn point(&mut self, total_q: usize) {
        let (heads, dim, reqs) = (self.desc.num_q_heads, self.desc.head_dim, self.reqs.len());
        let q_shape = [total_q as i64, heads.into(), dim.into()];
        let [k, v] = self.pools();
        let [k_scale, v_scale] = SCALES.map(|part| self.scale(part));
        let int = compactattn_dtype::COMPACTATTN_DTYPE_I32 as i32;
        let float = compactattn_dtype::COMPACTATTN_DTYPE_F32 as i32;
        *self.batch = compactattn_batch {
            struct_size: size_of::<compactattn_batch>() as u32,
            reserved: 0,
            q: self.tensor(Q, self.desc.dtype, &q_shape),
            k,
            v,
            cu_seqlens_q: self.tensor(CU, int, &[reqs as i64 + 1]),
            seq_lens: self.tensor(LENS, int, &[reqs as i64]),
            block_table: self.tensor(TABLE, int, &[reqs as i64, self.width as i64]),
            stream: std::ptr::null_mut(),
            workspace: std::ptr::null_mut(),
            workspace_bytes: 0,
            k_scale,
            v_scale,
        };
        self.args.struct_size = size_of::<compactattn_forward_args>() as u32;
        self.args.batch = &raw const *self.batch;
        self.args.out = self.tensor(OUT, self.desc.dtype, &q_shape);
        self.args.lse = self.tensor(LSE, float, &[heads.into(), total_q as i64]);
        self.args.workspace = self.memory[WORKSPACE].data().cast();
        self.args.workspace_bytes = self.memory[WORKSPACE].len() as i64;
    }

    /// K and V in one of four layouts: apart (NHD, HND) or interleaved by page or by token.
    fn pools(&mut self) -> [compactattn_tensor; 2] {
        let shape =
            [self.num_pages, self.desc.page_size, self.desc.num_kv_heads, self.desc.head_dim].map(i64::from);
        let [pages, tokens, heads, dim] = shape;
        let page = tokens * heads * dim;
        let (stride, v_at) = *self.rng.pick(&[
            ([page, heads * dim, dim, 1], pages * page),
            ([page, dim, tokens * dim, 1], pages * page),
            ([2 * page, heads * dim, dim, 1], page),
            ([2 * page, 2 * heads * dim, dim, 1], heads * dim),
        ]);
        let mut k = self.tensor(KV, kv_dtype(&self.desc), &shape);
        k.stride = stride;
        let mut v = k;
        v.data = k.data.cast::<u8>().wrapping_add(v_at as usize * kv_size(&self.desc)).cast();
        v.storage_bytes -= v_at * kv_size(&self.desc) as i64;
        [k, v]
    }

    /// None, one, or one for each KV head.
    fn scale(&mut self, part: usize) -> compactattn_tensor {
        let count = *self.rng.pick(&[0, 1, i64::from(self.desc.num_kv_heads)]);
        if count == 0 || kv_dtype(&self.desc) != E4M3 {
            return zeroed();
        }
        self.tensor(part, compactattn_dtype::COMPACTATTN_DTYPE_F32 as i32, &[count])
    }

    /// A contiguous tensor over one part of the memory.
    pub fn tensor(&self, part: usize, dtype: i32, shape: &[i64]) -> compactattn_tensor {
        let mut tensor: compactattn_tensor = zeroed();
        tensor.data = self.memory[part].data().cast();
        tensor.storage_bytes = self.memory[part].len() as i64;
        tensor.dtype = dtype;
        tensor.ndim = shape.len() as i32;
        let mut stride = 1;
        for i in (0..shape.len()).rev() {
            (tensor.shape[i], tensor.stride[i]) = (shape[i], stride);
            stride *= shape[i].max(1);
        }
        tensor
    }

    pub fn forward(&self) -> compactattn_status {
        // SAFETY: the structs point into this world's memory, or at what a test of refusals has put there instead.
        unsafe { compactattn_forward(self.plan, &raw const self.args) }
    }

    pub fn snapshot(&self) -> Vec<Vec<u8>> {
        self.memory.iter().map(|part| part.block().to_vec()).collect()
    }

    /// Runs the call; out and lse as bytes.
    pub fn results(&self) -> [Vec<u8>; 2] {
        assert_eq!(self.forward(), compactattn_status::COMPACTATTN_OK, "{}", last_error());
        [self.memory[OUT].bytes().to_vec(), self.memory[LSE].bytes().to_vec()]
    }

    /// Frees the handles.
    pub fn close(self) {
        assert_eq!(compactattn_plan_destroy(self.plan), compactattn_status::COMPACTATTN_OK);
        assert_eq!(compactattn_context_destroy(self.context), compactattn_status::COMPACTATTN_OK);
    }
}

/// For [`VARIANTS`] worlds: `spoil` the call, see it refused with nothing written, then see the good call give the
/// bits that a fresh handle gives.
pub fn refused(spoil: impl Fn(&mut World) -> Fault) {
    for seed in 0..VARIANTS {
        let good = World::random(seed);
        let mut bad = World::random(seed);
        let fault = spoil(&mut bad);
        bad.check_refusal(seed, &fault);
        let mut again = good;
        std::mem::swap(&mut again.plan, &mut bad.plan);
        let results = again.results();
        assert!(again.canaries_hold(), "variant {seed}");
        std::mem::swap(&mut again.plan, &mut bad.plan);
        assert!(results == again.results(), "variant {seed}: a refused call left its mark on the plan");
        again.close();
        bad.close();
    }
}

impl World {
    /// Runs a bad call: its status and text, and nothing written.
    pub fn check_refusal(&self, seed: u64, fault: &Fault) {
        let before = self.snapshot();
        assert_eq!(self.forward(), fault.0, "variant {seed}: {}", last_error());
        check_text(fault.0, fault.1);
        assert!(self.snapshot() == before, "variant {seed}: a refused call wrote something");
    }

    pub fn canaries_hold(&self) -> bool {
        self.memory.iter().all(Guarded::canaries_hold)
    }
}

/// The message contract: status, argument, at most 300 ASCII bytes, no address.
pub fn check_text(status: compactattn_status, name: &str) {
    let text = last_error();
    let code = format!("{status:?}: ").replace("COMPACTATTN_", "");
    assert!(text.starts_with(&code), "{text}");
    assert!(text.contains(name), "{text} does not name {name}");
    assert!(text.is_ascii() && text.len() <= 300 && !text.contains("0x"), "{text}");
}

pub fn last_error() -> String {
    let mut buf = [0_u8; 512];
    // SAFETY: `buf` holds 512 bytes.
    let len = unsafe { compactattn_last_error(buf.as_mut_ptr().cast(), buf.len()) };
    String::from_utf8(buf[..len].to_vec()).unwrap()
}

pub fn new_context() -> *mut compactattn_context {
    let desc = compactattn_context_desc {
        struct_size: size_of::<compactattn_context_desc>() as u32,
        abi_version: compactattn_abi_version(),
        device_kind: compactattn_device_kind::COMPACTATTN_DEVICE_CPU as i32,
        device_ordinal: 0,
        num_threads: 1,
        reserved: 0,
    };
    let mut context = std::ptr::null_mut();
    // SAFETY: both point to locals.
    let status = unsafe { compactattn_context_create(&raw const desc, &raw mut context) };
    assert_eq!(status, compactattn_status::COMPACTATTN_OK, "{}", last_error());
    context
}

pub fn new_plan(context: *const compactattn_context, desc: &compactattn_plan_desc) -> *mut compactattn_plan {
    let mut plan = std::ptr::null_mut();
    // SAFETY: `desc` points to live settings.
    let status = unsafe { compactattn_plan_create(context, desc, &raw mut plan) };
    assert_eq!(status, compactattn_status::COMPACTATTN_OK, "{}", last_error());
    plan
}

pub fn sizes(plan: *const compactattn_plan, layer: i32) -> compactattn_sizes {
    let mut sizes: compactattn_sizes = zeroed();
    sizes.struct_size = size_of::<compactattn_sizes>() as u32;
    // SAFETY: `sizes` is as long as it says.
    let status = unsafe { compactattn_plan_sizes(plan, layer, std::ptr::null(), &raw mut sizes) };
    assert_eq!(status, compactattn_status::COMPACTATTN_OK, "{}", last_error());
    sizes
}

pub fn settings_of(selector: compactattn_selector) -> compactattn_settings {
    let mut settings: compactattn_settings = zeroed();
    settings.struct_size = size_of::<compactattn_settings>() as u32;
    // SAFETY: `settings` is as long as it says.
    let status = unsafe { compactattn_settings_init(selector as i32, &raw mut settings) };
    assert_eq!(status, compactattn_status::COMPACTATTN_OK, "{}", last_error());
    settings
}

fn random_settings(rng: &mut Rng) -> compactattn_settings {
    use compactattn_selector as selector;
    let mut settings = settings_of(*rng.pick(&[
        selector::COMPACTATTN_SELECTOR_DENSE,
        selector::COMPACTATTN_SELECTOR_SAMPLED_EXACT,
        selector::COMPACTATTN_SELECTOR_FLASHPREFILL,
        selector::COMPACTATTN_SELECTOR_STREAMING,
    ]));
    settings.block_size = *rng.pick(&[16, 32]);
    settings.heads_per_list = rng.range(0, 2);
    settings.dense_below_kv_len = 0;
    settings.dense_max_q_len = rng.range(0, 2);
    settings
}

fn random_desc(rng: &mut Rng) -> compactattn_plan_desc {
    let mut desc: compactattn_plan_desc = zeroed();
    desc.struct_size = size_of::<compactattn_plan_desc>() as u32;
    desc.num_kv_heads = rng.range(1, 3);
    desc.num_q_heads = desc.num_kv_heads * rng.range(1, 4);
    desc.head_dim = *rng.pick(&[64, 96]);
    desc.page_size = *rng.pick(&[16, 32]);
    desc.dtype = rng.range(1, 4);
    desc.kv_dtype = *rng.pick(&[0, 0, desc.dtype, E4M3]);
    desc.max_num_reqs = 4;
    desc.max_total_q = 96;
    desc.max_kv_len = 128;
    desc.num_layers = rng.range(0, 3);
    desc.num_splits = rng.range(0, 3);
    desc
}

const E4M3: i32 = compactattn_dtype::COMPACTATTN_DTYPE_E4M3 as i32;

fn kv_dtype(desc: &compactattn_plan_desc) -> i32 {
    if desc.kv_dtype == 0 { desc.dtype } else { desc.kv_dtype }
}

fn kv_size(desc: &compactattn_plan_desc) -> usize {
    if desc.kv_dtype == E4M3 { 1 } else { element_size(desc.dtype) }
}

fn element_size(dtype: i32) -> usize {
    if dtype == compactattn_dtype::COMPACTATTN_DTYPE_F32 as i32 { 4 } else { 2 }
}

/// A struct of the header, all zero.
pub fn zeroed<T>() -> T {
    // SAFETY: the header's structs hold numbers and raw pointers only.
    unsafe { std::mem::zeroed() }
}

impl World {
    /// NaN in the keys and values of one slot of the pool.
    pub fn poison(&mut self, page: i64, row: i64) {
        let size = kv_size(&self.desc) as i64;
        let base = self.memory[KV].data().addr();
        for pool in [self.batch.k, self.batch.v] {
            for head in 0..i64::from(self.desc.num_kv_heads) {
                for i in 0..i64::from(self.desc.head_dim) {
                    let at = page * pool.stride[0] + row * pool.stride[1] + head * pool.stride[2] + i;
                    let offset = pool.data.addr() - base + (at * size) as usize;
                    // All bits set is a NaN in each of the four types.
                    self.memory[KV].bytes_mut()[offset..offset + size as usize].fill(0xFF);
                }
            }
        }
    }

    /// out and lse widened to f32.
    pub fn floats(&self, results: &[Vec<u8>; 2]) -> [Vec<f32>; 2] {
        [memory::widened(self.desc.dtype, &results[0]), memory::widened(3, &results[1])]
    }
}
