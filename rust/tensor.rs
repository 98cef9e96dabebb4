//! Borrowed views of strided tensors whose last dimension (`head_dim`) is contiguous.

use half::{bf16, f16, slice::HalfFloatSliceExt};

use crate::e4m3;
use crate::math;
use crate::types::Dtype;

/// Elements of one allocation, from a view's first element to its last.
#[derive(Clone, Copy, Debug)]
pub enum Elements<'a> {
    /// bfloat16 elements.
    Bf16(&'a [bf16]),
    /// IEEE half elements.
    F16(&'a [f16]),
    /// IEEE single elements.
    F32(&'a [f32]),
    /// e4m3 elements, a byte each.
    E4m3(&'a [u8]),
}

impl Elements<'_> {
    /// Type of the elements.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        match self {
            Self::Bf16(_) => Dtype::Bf16,
            Self::F16(_) => Dtype::F16,
            Self::F32(_) => Dtype::F32,
            Self::E4m3(_) => Dtype::E4m3,
        }
    }

    /// Elements in the view's extent.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Bf16(x) => x.len(),
            Self::F16(x) => x.len(),
            Self::F32(x) => x.len(),
            Self::E4m3(x) => x.len(),
        }
    }

    /// Whether the extent holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Widens `into.len()` contiguous elements from `offset` into f32.
    pub fn load(&self, offset: usize, into: &mut [f32]) {
        let range = offset..offset + into.len();
        match self {
            Self::Bf16(x) => math::widen_bf16(&x[range], into),
            Self::F16(x) => x[range].convert_to_f32_slice(into),
            Self::F32(x) => into.copy_from_slice(&x[range]),
            Self::E4m3(x) => e4m3::widen(&x[range], into),
        }
    }

    /// The 16 bytes from `offset` on, as two numbers, first element lowest.
    pub(crate) fn bits(&self, offset: usize) -> [u64; 2] {
        let halves = |bits: &dyn Fn(usize) -> u16, first: usize| {
            (0..4).rev().fold(0, |all, i| all << 16 | u64::from(bits(offset + first + i)))
        };
        match self {
            Self::Bf16(x) => [0, 4].map(|first| halves(&|i| x[i].to_bits(), first)),
            Self::F16(x) => [0, 4].map(|first| halves(&|i| x[i].to_bits(), first)),
            Self::F32(x) => [0, 2].map(|first| {
                let at = |i: usize| u64::from(x[offset + first + i].to_bits());
                at(1) << 32 | at(0)
            }),
            Self::E4m3(x) => [0, 8].map(|first| {
                let bytes = &x[offset + first..offset + first + 8];
                bytes.iter().rev().fold(0, |all, &byte| all << 8 | u64::from(byte))
            }),
        }
    }
}

/// Elements that a call may write.
#[derive(Debug)]
pub enum ElementsMut<'a> {
    /// bfloat16 elements.
    Bf16(&'a mut [bf16]),
    /// IEEE half elements.
    F16(&'a mut [f16]),
    /// IEEE single elements.
    F32(&'a mut [f32]),
}

impl<'a> ElementsMut<'a> {
    /// Type of the elements.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        match self {
            Self::Bf16(_) => Dtype::Bf16,
            Self::F16(_) => Dtype::F16,
            Self::F32(_) => Dtype::F32,
        }
    }

    /// Elements in the view's extent.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Bf16(x) => x.len(),
            Self::F16(x) => x.len(),
            Self::F32(x) => x.len(),
        }
    }

    /// Whether the extent holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Rounds `from` (to nearest, ties to even) into the contiguous elements at `offset`.
    pub fn store(&mut self, offset: usize, from: &[f32]) {
        let range = offset..offset + from.len();
        match self {
            Self::Bf16(x) => x[range].convert_from_f32_slice(from),
            Self::F16(x) => x[range].convert_from_f32_slice(from),
            Self::F32(x) => x[range].copy_from_slice(from),
        }
    }

    /// Splits into `[0, mid)` and `[mid, len)`.
    #[must_use]
    pub fn split_at(self, mid: usize) -> (Self, Self) {
        match self {
            Self::Bf16(x) => {
                let (a, b) = x.split_at_mut(mid);
                (Self::Bf16(a), Self::Bf16(b))
            }
            Self::F16(x) => {
                let (a, b) = x.split_at_mut(mid);
                (Self::F16(a), Self::F16(b))
            }
            Self::F32(x) => {
                let (a, b) = x.split_at_mut(mid);
                (Self::F32(a), Self::F32(b))
            }
        }
    }
}

/// `[total_q, num_heads, head_dim]`; strides in elements.
#[derive(Clone, Copy, Debug)]
pub struct Tokens<'a> {
    /// The extent.
    pub elements: Elements<'a>,
    /// From a token to the next.
    pub stride_token: usize,
    /// From a head to the next.
    pub stride_head: usize,
}

impl Tokens<'_> {
    /// Loads the vector of one token and head; `into` is `[head_dim]`.
    pub fn load(&self, token: usize, head: usize, into: &mut [f32]) {
        self.elements.load(token * self.stride_token + head * self.stride_head, into);
    }
}

/// The engine's pool of K or of V: `[num_pages, page_size, num_kv_heads, head_dim]`; strides in elements.
///
/// NHD, HND, K and V interleaved and contiguous caches differ only in their strides.
#[derive(Clone, Copy, Debug)]
pub struct Pool<'a> {
    /// The extent, from the first element of page 0 to the last of page `num_pages - 1`.
    pub elements: Elements<'a>,
    /// Pages in the pool: the bound of every table entry.
    pub num_pages: usize,
    /// From a page to the next.
    pub stride_page: usize,
    /// From a token to the next within a page.
    pub stride_token: usize,
    /// From a KV head to the next.
    pub stride_head: usize,
    /// What stored values are to be multiplied by, of an e4m3 pool: none (1), one, or one for each KV head.
    pub scales: &'a [f32],
}

impl Pool<'_> {
    /// Loads the vector of one slot (`page`, `row` within it) and KV head, scaled; `into` is `[head_dim]`.
    pub fn load(&self, page: usize, row: usize, head: usize, into: &mut [f32]) {
        self.load_stored((page, row), head, into);
        let scale = self.scale(head);
        if scale != 1.0 {
            into.iter_mut().for_each(|x| *x *= scale);
        }
    }

    /// As [`Pool::load`], as stored: without the scale, and exact.
    pub fn load_stored(&self, (page, row): (usize, usize), head: usize, into: &mut [f32]) {
        let offset = page * self.stride_page + row * self.stride_token + head * self.stride_head;
        self.elements.load(offset, into);
    }

    /// What stored values of a KV head are multiplied by.
    #[must_use]
    pub fn scale(&self, head: usize) -> f32 {
        match self.scales {
            [] => 1.0,
            [all] => *all,
            each => each[head],
        }
    }

    /// The first 16 bytes of one slot's vector of a KV head.
    pub(crate) fn first_bits(&self, page: usize, row: usize, head: usize) -> [u64; 2] {
        self.elements.bits(page * self.stride_page + row * self.stride_token + head * self.stride_head)
    }

    /// Loads `into.len() / head_dim` consecutive rows of one page; `into` is `[rows, head_dim]`.
    pub fn load_rows(&self, page: usize, row: usize, head: usize, head_dim: usize, into: &mut [f32]) {
        for (i, vector) in into.chunks_exact_mut(head_dim).enumerate() {
            self.load(page, row + i, head, vector);
        }
    }
}

/// `out [total_q, num_q_heads, head_dim]` in q's dtype; strides in elements.
#[derive(Debug)]
pub struct TokensMut<'a> {
    /// The extent.
    pub elements: ElementsMut<'a>,
    /// From a token to the next.
    pub stride_token: usize,
    /// From a head to the next.
    pub stride_head: usize,
}

/// `lse [num_q_heads, total_q]`, f32, natural log; empty rows are −inf.
#[derive(Debug)]
pub struct LseMut<'a> {
    /// The extent.
    pub elements: &'a mut [f32],
    /// From a head to the next, in elements; at least `total_q`.
    pub stride_head: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_widens_every_dtype_exactly() {
        let values = [1.5_f32, -0.25, 3.0];
        let (b, h) = (values.map(bf16::from_f32), values.map(f16::from_f32));
        for elements in [Elements::Bf16(&b), Elements::F16(&h), Elements::F32(&values)] {
            let mut got = [0.0; 2];
            elements.load(1, &mut got);
            assert_eq!(got, [-0.25, 3.0]);
        }
    }

    #[test]
    fn bits_are_those_of_memory_whatever_the_dtype() {
        let values: Vec<f32> = (1..=9).map(|i| i as f32 * 0.37).collect();
        let b: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
        let h: Vec<f16> = values.iter().map(|&x| f16::from_f32(x)).collect();
        let e: Vec<u8> = (0..17_u8).map(|i| i.wrapping_mul(37)).collect();
        let bytes: [&[u8]; 4] =
            [bytemuck::cast_slice(&b), bytemuck::cast_slice(&h), bytemuck::cast_slice(&values), &e];
        let elements = [Elements::Bf16(&b), Elements::F16(&h), Elements::F32(&values), Elements::E4m3(&e)];
        for (elements, bytes) in elements.into_iter().zip(bytes) {
            let from = elements.dtype().size_bytes();
            let wanted: [u8; 16] = bytes[from..from + 16].try_into().unwrap();
            assert_eq!(elements.bits(1), bytemuck::cast::<_, [u64; 2]>(wanted).map(u64::from_le));
        }
    }

    #[test]
    fn store_rounds_to_nearest_even() {
        let mut x = [bf16::ZERO; 1];
        ElementsMut::Bf16(&mut x).store(0, &[1.0 + 1.0 / 256.0]);
        assert_eq!(x[0].to_f32(), 1.0);
    }
}
