//! K and V pools in the layouts engines use; every slot that no request owns is NaN.

use std::ops::Range;

use compactattn::e4m3;
use compactattn::tensor::{Elements, ElementsMut, Pool, Tokens, TokensMut};
use compactattn::types::{Dtype, Shape};
use half::{bf16, f16};

use super::rng::Rng;

/// Elements of one of the four types.
#[derive(Clone)]
pub(crate) enum Store {
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    F32(Vec<f32>),
    E4m3(Vec<u8>),
}

impl Store {
    pub(crate) fn filled(dtype: Dtype, len: usize, with: f32) -> Self {
        match dtype {
            Dtype::Bf16 => Self::Bf16(vec![bf16::from_f32(with); len]),
            Dtype::F16 => Self::F16(vec![f16::from_f32(with); len]),
            Dtype::E4m3 => Self::E4m3(vec![e4m3::encode(with); len]),
            _ => Self::F32(vec![with; len]),
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

    /// All bits of those elements set: NaN.
    pub(crate) fn poison(&mut self, range: Range<usize>) {
        match self {
            Self::Bf16(x) => x[range].fill(bf16::from_bits(0xFFFF)),
            Self::F16(x) => x[range].fill(f16::from_bits(0xFFFF)),
            Self::F32(x) => x[range].fill(f32::from_bits(u32::MAX)),
            Self::E4m3(x) => x[range].fill(0xFF),
        }
    }

    /// Those elements become those of `other`, of the same type, from `first` on.
    pub(crate) fn copy(&mut self, to: Range<usize>, other: &Self, first: usize) {
        let from = first..first + to.len();
        match (self, other) {
            (Self::Bf16(x), Self::Bf16(y)) => x[to].copy_from_slice(&y[from]),
            (Self::F16(x), Self::F16(y)) => x[to].copy_from_slice(&y[from]),
            (Self::F32(x), Self::F32(y)) => x[to].copy_from_slice(&y[from]),
            (Self::E4m3(x), Self::E4m3(y)) => x[to].copy_from_slice(&y[from]),
            _ => unreachable!("stores of two types"),
        }
    }

    /// Rounds `values` into the elements from `offset` on.
    pub(crate) fn put(&mut self, offset: usize, values: &[f32]) {
        match self {
            Self::E4m3(x) => {
                x[offset..].iter_mut().zip(values).for_each(|(x, &value)| *x = e4m3::encode(value));
            }
            _ => self.view_mut().store(offset, values),
        }
    }

    /// Bit patterns, so that NaN equals itself.
    pub(crate) fn bits(&self) -> Vec<u32> {
        match self {
            Self::Bf16(x) => x.iter().map(|x| x.to_bits().into()).collect(),
            Self::F16(x) => x.iter().map(|x| x.to_bits().into()).collect(),
            Self::F32(x) => x.iter().map(|x| x.to_bits()).collect(),
            Self::E4m3(x) => x.iter().map(|&x| x.into()).collect(),
        }
    }

    fn from(&self, first: usize) -> Elements<'_> {
        match self {
            Self::Bf16(x) => Elements::Bf16(&x[first..]),
            Self::F16(x) => Elements::F16(&x[first..]),
            Self::F32(x) => Elements::F32(&x[first..]),
            Self::E4m3(x) => Elements::E4m3(&x[first..]),
        }
    }
}

/// Strides of `[pages, page_size, heads, head_dim]`, and where V lies relative to K in the one buffer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Strides {
    page: usize,
    token: usize,
    head: usize,
    v_from: usize,
    len: usize,
    scales: [Scales; 2],
}

/// How many scales of an e4m3 pool there are (0 = none, all 1), and the first of them.
#[derive(Clone, Copy, Debug)]
struct Scales {
    count: usize,
    first: f32,
}

impl Strides {
    /// NHD or HND; K beside V per vector, per page or per pool; padded vectors, tokens and pages.
    pub(crate) fn random(rng: &mut Rng, shape: &Shape, pages: usize) -> Self {
        let (heads, dim, size) = (shape.num_kv_heads, shape.head_dim, shape.page_size);
        // Strides are multiples of 16 bytes.
        let unit = 8.max(16 / shape.kv_dtype.size_bytes());
        let pad = |rng: &mut Rng| if rng.once_in(4) { unit * rng.within(1, 3) } else { 0 };
        let (by_token, kv_beside) = (rng.once_in(2), rng.below(3));
        let vector = (dim + pad(rng)) * if kv_beside == 0 { 2 } else { 1 };
        let (token, head, page) = if by_token {
            let token = vector * heads + pad(rng);
            (token, vector, token * size)
        } else {
            let head = vector * size + pad(rng);
            (vector, head, head * heads)
        };
        let half = page + pad(rng);
        let page = if kv_beside == 1 { 2 * half } else { half };
        let v_from = [vector / 2, half, page * pages][kv_beside];
        let len = if kv_beside == 2 { 2 * page * pages } else { page * pages };
        let scales = [(); 2].map(|()| Scales::random(rng, shape));
        Self { page, token, head, v_from, len, scales }
    }

    /// NHD without padding, values after keys.
    pub(crate) fn packed(shape: &Shape, pages: usize) -> Self {
        let (head, token) = (shape.head_dim, shape.head_dim * shape.num_kv_heads);
        let page = token * shape.page_size;
        Self {
            page,
            token,
            head,
            v_from: page * pages,
            len: 2 * page * pages,
            scales: [Scales { count: 0, first: 1.0 }; 2],
        }
    }

    /// The scales of another pool of the same shape.
    pub(crate) fn scaled_as(self, other: Self) -> Self {
        Self { scales: other.scales, ..self }
    }

    /// Where K (`v = false`) or V starts in the buffer, and its strides.
    pub(crate) fn of(&self, v: bool) -> (usize, [usize; 4]) {
        (if v { self.v_from } else { 0 }, [self.page, self.token, self.head, 1])
    }
}

impl Scales {
    fn random(rng: &mut Rng, shape: &Shape) -> Self {
        if shape.kv_dtype != Dtype::E4m3 {
            return Self { count: 0, first: 1.0 };
        }
        // Values reach 3.5: with the least scale they use most of the range, and some keys saturate.
        Self { count: rng.pick(&[0, 1, shape.num_kv_heads]), first: rng.pick(&[1.0, 0.25, 0.37, 1.7, 0.02]) }
    }

    fn values(self) -> Vec<f32> {
        (0..self.count).map(|head| self.first * [1.0, 1.3, 0.6][head % 3]).collect()
    }
}

/// One buffer that holds both pools.
#[derive(Clone)]
pub(crate) struct Pools {
    pub(crate) store: Store,
    pub(crate) strides: Strides,
    pub(crate) num_pages: usize,
    /// Of K and of V: none, one, or one for each KV head.
    pub(crate) scales: [Vec<f32>; 2],
}

impl Pools {
    pub(crate) fn poisoned(shape: &Shape, strides: Strides, num_pages: usize) -> Self {
        let store = Store::filled(shape.kv_dtype, strides.len, f32::NAN);
        let scales = strides.scales.map(Scales::values);
        Self { store, strides, num_pages, scales }
    }

    /// Where the K (`v = false`) or V vector of a slot starts.
    pub(crate) fn offset(&self, v: bool, (page, row): (usize, usize), head: usize) -> usize {
        let s = self.strides;
        page * s.page + row * s.token + head * s.head + if v { s.v_from } else { 0 }
    }

    pub(crate) fn write(&mut self, v: bool, slot: (usize, usize), head: usize, x: &[f32]) {
        let (offset, scale) = (self.offset(v, slot, head), self.view(v).scale(head));
        self.store.put(offset, &x.iter().map(|x| x / scale).collect::<Vec<_>>());
    }

    pub(crate) fn read(&self, v: bool, slot: (usize, usize), head: usize, x: &mut [f32]) {
        self.view(v).load(slot.0, slot.1, head, x);
    }

    pub(crate) fn view(&self, v: bool) -> Pool<'_> {
        let s = self.strides;
        Pool {
            scales: &self.scales[usize::from(v)],
            elements: self.store.from(if v { s.v_from } else { 0 }),
            num_pages: self.num_pages,
            stride_page: s.page,
            stride_token: s.token,
            stride_head: s.head,
        }
    }
}

/// `[tokens, heads, head_dim]`, perhaps padded.
#[derive(Clone)]
pub(crate) struct Packed {
    pub(crate) store: Store,
    pub(crate) stride_token: usize,
    pub(crate) stride_head: usize,
}

impl Packed {
    pub(crate) fn poisoned(rng: &mut Rng, shape: &Shape, tokens: usize) -> Self {
        let pad = |rng: &mut Rng| if rng.once_in(4) { 8 * rng.within(1, 3) } else { 0 };
        let stride_head = shape.head_dim + pad(rng);
        let stride_token = stride_head * shape.num_q_heads + pad(rng);
        let store = Store::filled(shape.dtype, stride_token * tokens, f32::NAN);
        Self { store, stride_token, stride_head }
    }

    pub(crate) fn write(&mut self, token: usize, head: usize, x: &[f32]) {
        let offset = token * self.stride_token + head * self.stride_head;
        self.store.view_mut().store(offset, x);
    }

    pub(crate) fn view(&self) -> Tokens<'_> {
        let Self { stride_token, stride_head, .. } = *self;
        Tokens { elements: self.store.view(), stride_token, stride_head }
    }

    pub(crate) fn view_mut(&mut self) -> TokensMut<'_> {
        let Self { stride_token, stride_head, .. } = *self;
        TokensMut { elements: self.store.view_mut(), stride_token, stride_head }
    }

    /// `[head_dim]` of one token and head.
    pub(crate) fn read(&self, token: usize, head: usize, head_dim: usize) -> Vec<f32> {
        let mut x = vec![0.0; head_dim];
        self.view().load(token, head, &mut x);
        x
    }
}
