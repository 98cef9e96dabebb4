//! Random paged batches for tests: requests with known contents, placed on shuffled pages of a dirty pool.
//!
//! Everything a stage must not read is NaN: unused pages, slots after a request's last token, gaps between strides.
//! Table entries after a row's valid prefix are garbage. Contents depend on the request alone, so the same request
//! can be placed on other pages, or without its neighbours, and every stage must give the same bits.

use half::{bf16, f16};

use crate::batch::{Batch, BatchParts, BlockTable};
use crate::e4m3;
use crate::mask;
use crate::plan::{Layout, Limits};
use crate::settings::Settings;
use crate::table::{self, Table, TableMut};
use crate::tensor::{Elements, ElementsMut, Pool, Tokens};
use crate::types::{Dtype, Shape};

/// A shape with the usual scale, `1 / sqrt(head_dim)`.
pub(crate) fn shape(
    num_kv_heads: usize,
    group_size: usize,
    head_dim: usize,
    page_size: usize,
    dtype: Dtype,
) -> Shape {
    let sm_scale = 1.0 / (head_dim as f32).sqrt();
    let num_q_heads = num_kv_heads * group_size;
    Shape { num_q_heads, num_kv_heads, head_dim, page_size, dtype, kv_dtype: dtype, sm_scale }
}

/// The same with an e4m3 cache.
pub(crate) fn over_e4m3(shape: Shape) -> Shape {
    Shape { kv_dtype: Dtype::E4m3, ..shape }
}

/// A small generator (splitmix64): the same seed gives the same tests everywhere.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    /// Below `n`, which is at least 1.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n as u64).unwrap()
    }

    /// In [0, 1).
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1_u64 << 24) as f32
    }

    /// Mean 0, variance 1, within [-3.5, 3.5].
    pub(crate) fn normal(&mut self) -> f32 {
        (0..4).map(|_| self.unit() - 0.5).sum::<f32>() * 3.0_f32.sqrt()
    }
}

/// One request's contents, whatever its pages. Values are exact in the shape's dtype.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// `[q_len, num_q_heads, head_dim]`.
    pub(crate) q: Vec<f32>,
    /// `[kv_len, num_kv_heads, head_dim]`.
    pub(crate) k: Vec<f32>,
    /// `[kv_len, num_kv_heads, head_dim]`.
    pub(crate) v: Vec<f32>,
}

impl Request {
    /// Normal q, k and v.
    pub(crate) fn random(seed: u64, shape: &Shape, q_len: usize, kv_len: usize) -> Self {
        let mut rng = Rng::new(seed);
        let mut values = |dtype, n: usize| -> Vec<f32> {
            (0..n * shape.head_dim).map(|_| round(dtype, rng.normal())).collect()
        };
        let q = values(shape.dtype, q_len * shape.num_q_heads);
        let mut cached = |scales: &[f32]| -> Vec<f32> {
            let stored = values(shape.kv_dtype, kv_len * shape.num_kv_heads);
            let scale = |i: usize| scale_of(scales, i / shape.head_dim % shape.num_kv_heads);
            stored.iter().enumerate().map(|(i, x)| x * scale(i)).collect()
        };
        let k = cached(k_scales(shape));
        Self { q, k, v: cached(v_scales(shape)) }
    }
}

/// One for each KV head of an e4m3 cache; no powers of two, so that a forgotten or doubled one shows.
pub(crate) fn k_scales(shape: &Shape) -> &'static [f32] {
    if shape.kv_dtype == Dtype::E4m3 { &[0.7, 1.9, 0.3, 1.1][..shape.num_kv_heads] } else { &[] }
}

/// One for all.
pub(crate) fn v_scales(shape: &Shape) -> &'static [f32] {
    if shape.kv_dtype == Dtype::E4m3 { &[1.3] } else { &[] }
}

/// Of one KV head.
pub(crate) fn scale_of(scales: &[f32], head: usize) -> f32 {
    scales.get(head).or(scales.first()).copied().unwrap_or(1.0)
}

/// `x` as `dtype` holds it.
pub(crate) fn round(dtype: Dtype, x: f32) -> f32 {
    match dtype {
        Dtype::Bf16 => bf16::from_f32(x).to_f32(),
        Dtype::F16 => f16::from_f32(x).to_f32(),
        Dtype::E4m3 => e4m3::decode(e4m3::encode(x)),
        _ => x,
    }
}

/// Owned elements of any float dtype.
#[derive(Clone, Debug)]
pub(crate) enum Store {
    /// bfloat16.
    Bf16(Vec<bf16>),
    /// IEEE half.
    F16(Vec<f16>),
    /// IEEE single.
    F32(Vec<f32>),
    /// e4m3.
    E4m3(Vec<u8>),
}

impl Store {
    /// `len` times NaN.
    pub(crate) fn dirty(dtype: Dtype, len: usize) -> Self {
        match dtype {
            Dtype::Bf16 => Self::Bf16(vec![bf16::NAN; len]),
            Dtype::F16 => Self::F16(vec![f16::NAN; len]),
            Dtype::E4m3 => Self::E4m3(vec![e4m3::NAN; len]),
            _ => Self::F32(vec![f32::NAN; len]),
        }
    }

    pub(crate) fn view(&self) -> Elements<'_> {
        match self {
            Self::Bf16(x) => Elements::Bf16(x),
            Self::F16(x) => Elements::F16(x),
            Self::F32(x) => Elements::F32(x),
            Self::E4m3(x) => Elements::E4m3(x),
        }
    }

    pub(crate) fn view_mut(&mut self) -> ElementsMut<'_> {
        match self {
            Self::Bf16(x) => ElementsMut::Bf16(x),
            Self::F16(x) => ElementsMut::F16(x),
            Self::F32(x) => ElementsMut::F32(x),
            Self::E4m3(_) => unreachable!("no result is e4m3"),
        }
    }

    /// Rounds `values` into the elements from `offset` on.
    fn put(&mut self, offset: usize, values: impl ExactSizeIterator<Item = f32>) {
        match self {
            Self::E4m3(x) => {
                x[offset..].iter_mut().zip(values).for_each(|(x, value)| *x = e4m3::encode(value));
            }
            _ => self.view_mut().store(offset, &values.collect::<Vec<_>>()),
        }
    }

    /// All elements, widened.
    pub(crate) fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.view().len()];
        self.view().load(0, &mut values);
        values
    }
}

/// Requests placed in a pool, and everything a [`Batch`] borrows.
#[derive(Clone, Debug)]
pub(crate) struct Paged {
    pub(crate) shape: Shape,
    /// What was placed; change it and call [`Paged::place`] again.
    pub(crate) requests: Vec<Request>,
    pub(crate) q: Store,
    pub(crate) k: Store,
    pub(crate) v: Store,
    pub(crate) cu_seqlens_q: Vec<i32>,
    pub(crate) seq_lens: Vec<i32>,
    pub(crate) block_table: Vec<i32>,
    pub(crate) num_pages: usize,
    width: usize,
}

impl Paged {
    /// Random requests of `(q_len, kv_len)`, on shuffled pages.
    pub(crate) fn random(seed: u64, shape: Shape, lens: &[(usize, usize)]) -> Self {
        let requests = lens.iter().zip(1..).map(|(&(q_len, kv_len), i)| {
            Request::random(seed.wrapping_mul(1000).wrapping_add(i), &shape, q_len, kv_len)
        });
        Self::place(seed, shape, requests.collect())
    }

    /// Places `requests`; `seed` decides on which pages.
    pub(crate) fn place(seed: u64, shape: Shape, requests: Vec<Request>) -> Self {
        let pages = |r: &Request| r.kv_len(&shape).div_ceil(shape.page_size);
        let num_pages = requests.iter().map(pages).sum::<usize>() + 3;
        let width = requests.iter().map(pages).max().unwrap_or(0) + 2;
        let total_q: usize = requests.iter().map(|r| r.q_len(&shape)).sum();
        let pool = Store::dirty(shape.kv_dtype, num_pages * stride_page(&shape));
        let mut paged = Self {
            shape,
            q: Store::dirty(shape.dtype, total_q * stride_q(&shape)),
            k: pool.clone(),
            v: pool,
            cu_seqlens_q: vec![0],
            seq_lens: Vec::new(),
            block_table: Vec::new(),
            num_pages,
            width,
            requests: Vec::new(),
        };
        let mut free = shuffled(seed, num_pages);
        for request in requests {
            let pages = free.split_off(free.len() - pages(&request));
            paged.add(request, &pages);
        }
        paged
    }

    fn add(&mut self, request: Request, pages: &[usize]) {
        let Shape { page_size, head_dim, num_q_heads, num_kv_heads, .. } = self.shape;
        let first = usize::try_from(*self.cu_seqlens_q.last().unwrap()).unwrap();
        for (i, token) in request.q.chunks(num_q_heads * head_dim).enumerate() {
            self.q.view_mut().store((first + i) * stride_q(&self.shape), token);
        }
        let (k_scales, v_scales) = (k_scales(&self.shape), v_scales(&self.shape));
        for (pool, values, scales) in
            [(&mut self.k, &request.k, k_scales), (&mut self.v, &request.v, v_scales)]
        {
            for (i, token) in values.chunks(num_kv_heads * head_dim).enumerate() {
                let slot = pages[i / page_size] * stride_page(&self.shape);
                let stored =
                    token.iter().enumerate().map(|(x, value)| value / scale_of(scales, x / head_dim));
                pool.put(slot + i % page_size * stride_kv(&self.shape), stored);
            }
        }
        let garbage = [-1, i32::MAX, i32::MIN].into_iter().cycle();
        let row = pages.iter().map(|&p| i32::try_from(p).unwrap()).chain(garbage).take(self.width);
        self.block_table.extend(row);
        self.cu_seqlens_q.push(i32::try_from(first + request.q_len(&self.shape)).unwrap());
        self.seq_lens.push(i32::try_from(request.kv_len(&self.shape)).unwrap());
        self.requests.push(request);
    }

    /// The same requests on other pages.
    pub(crate) fn repaged(&self, seed: u64) -> Self {
        Self::place(seed, self.shape, self.requests.clone())
    }

    /// Request `req` alone, on other pages.
    pub(crate) fn only(&self, req: usize, seed: u64) -> Self {
        Self::place(seed, self.shape, vec![self.requests[req].clone()])
    }

    pub(crate) fn batch(&self) -> Batch<'_> {
        Batch::new(self.shape, self.parts()).unwrap()
    }

    /// What [`Paged::batch`] checks.
    pub(crate) fn parts(&self) -> BatchParts<'_> {
        let shape = &self.shape;
        let k = Pool {
            scales: k_scales(shape),
            elements: self.k.view(),
            num_pages: self.num_pages,
            stride_page: stride_page(shape),
            stride_token: stride_kv(shape),
            stride_head: shape.head_dim,
        };
        let q =
            Tokens { elements: self.q.view(), stride_token: stride_q(shape), stride_head: shape.head_dim };
        BatchParts {
            q,
            k,
            v: Pool { elements: self.v.view(), scales: v_scales(shape), ..k },
            cu_seqlens_q: &self.cu_seqlens_q,
            seq_lens: &self.seq_lens,
            block_table: BlockTable { entries: &self.block_table, stride_row: self.width, width: self.width },
            total_q: self.requests.iter().map(|r| r.q_len(shape)).sum(),
        }
    }

    /// A layout with limits a little above this batch.
    pub(crate) fn layout(&self, settings: Settings) -> Layout {
        let batch = self.batch();
        let longest = (0..batch.num_reqs()).map(|r| batch.kv_len(r)).max().unwrap_or(0);
        let limits = Limits {
            max_num_reqs: batch.num_reqs() + 1,
            max_total_q: batch.total_q() + 5,
            max_kv_len: longest + 100,
        };
        Layout::new(self.shape, settings, limits).unwrap()
    }
}

impl Request {
    pub(crate) fn q_len(&self, shape: &Shape) -> usize {
        self.q.len() / (shape.num_q_heads * shape.head_dim)
    }

    pub(crate) fn kv_len(&self, shape: &Shape) -> usize {
        self.k.len() / (shape.num_kv_heads * shape.head_dim)
    }
}

/// Lists as bits and the table of boxes they make.
#[derive(Clone, Debug)]
pub(crate) struct Lists {
    /// `[list spans, lists per span, mask_words]`.
    pub(crate) bits: Vec<u32>,
    counts: Vec<i32>,
    stream_lens: Vec<i32>,
    boxes: Vec<i32>,
}

impl Lists {
    /// Each past block with probability `density`, the open region always, everything in dense spans.
    pub(crate) fn random(seed: u64, layout: &Layout, batch: &Batch, density: f32) -> Self {
        let mut rng = Rng::new(seed);
        let mut bits = Vec::new();
        for span in layout.list_spans(batch) {
            let past = layout.geometry.past_blocks(span.past);
            let total = layout.geometry.blocks(span.kv_end);
            for _ in 0..layout.lists_per_span() {
                let mut row = vec![0; layout.mask_words()];
                for j in (0..total).filter(|&j| span.dense || j >= past || rng.unit() < density) {
                    mask::set(&mut row, j);
                }
                bits.extend(row);
            }
        }
        Self::of_bits(layout, batch, bits)
    }

    /// The table of `bits [list spans, lists per span, mask_words]`.
    pub(crate) fn of_bits(layout: &Layout, batch: &Batch, bits: Vec<u32>) -> Self {
        let rows = layout.max_list_rows();
        let (mut counts, mut stream_lens) = (vec![-1; rows], vec![-1; rows]);
        let mut boxes = vec![-1; rows * layout.max_boxes()];
        let mut out = TableMut { counts: &mut counts, stream_lens: &mut stream_lens, boxes: &mut boxes };
        table::build(layout, batch, &bits, &mut out);
        Self { bits, counts, stream_lens, boxes }
    }

    pub(crate) fn table(&self) -> Table<'_> {
        Table { counts: &self.counts, stream_lens: &self.stream_lens, boxes: &self.boxes }
    }
}

/// `0..n` in random order.
fn shuffled(seed: u64, n: usize) -> Vec<usize> {
    let mut rng = Rng::new(seed ^ 0xDEAD_BEEF);
    let mut items: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        items.swap(i, rng.below(i + 1));
    }
    items
}

/// Strides leave gaps, so that a stage that ignores them meets NaN.
fn stride_q(shape: &Shape) -> usize {
    shape.num_q_heads * shape.head_dim + 8
}

fn stride_kv(shape: &Shape) -> usize {
    shape.num_kv_heads * shape.head_dim + 16
}

fn stride_page(shape: &Shape) -> usize {
    shape.page_size * stride_kv(shape) + 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Selector;

    #[test]
    fn a_placed_request_reads_back_through_the_block_table() {
        let shape = shape(2, 3, 64, 16, Dtype::Bf16);
        let paged = Paged::random(7, shape, &[(3, 40), (0, 0), (5, 2)]);
        let batch = paged.batch();
        for (req, request) in paged.requests.iter().enumerate() {
            for token in 0..batch.kv_len(req) {
                for head in 0..2 {
                    let mut got = [0.0; 64];
                    batch.load_v(req, head, token..token + 1, &mut got);
                    assert_eq!(got, request.v[(token * 2 + head) * 64..][..64]);
                }
            }
        }
        assert!(paged.k.to_f32().iter().any(|x| x.is_nan()));
    }

    #[test]
    fn random_lists_hold_the_chunk_and_about_the_asked_density() {
        let paged = Paged::random(1, shape(1, 1, 64, 16, Dtype::F32), &[(32, 3232)]);
        let mut settings = Settings { block_size: 32, ..Settings::of(Selector::External) };
        settings.dense.below_kv_len = 0;
        let layout = paged.layout(settings);
        let lists = Lists::random(3, &layout, &paged.batch(), 0.3);
        let kept = mask::count(&lists.bits, 100);
        assert!((15..45).contains(&kept), "{kept}");
        assert!(mask::get(&lists.bits, 100));
    }
}
