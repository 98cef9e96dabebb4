//! Memory with canaries on both sides, and numbers that are the same on every machine.

use compactattn::capi::compactattn_dtype;
use half::{bf16, f16};

/// `len` bytes, aligned to 256, between canaries of at least 64 bytes.
pub struct Guarded {
    block: Vec<u8>,
    /// Made from the block while it was not shared, so that the library may write through it.
    data: *mut u8,
    at: usize,
    len: usize,
}

const CANARY: u8 = 0xA5;
const MARGIN: usize = 64;
const ALIGNMENT: usize = 256;

impl Guarded {
    pub fn new(len: usize) -> Self {
        let mut block = vec![CANARY; len + 2 * MARGIN + ALIGNMENT];
        let at = MARGIN + (block.as_ptr().addr() + MARGIN).wrapping_neg() % ALIGNMENT;
        let data = block.as_mut_ptr().wrapping_add(at);
        Self { block, data, at, len }
    }

    pub fn data(&self) -> *mut u8 {
        self.data
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn bytes(&self) -> &[u8] {
        &self.block[self.at..self.at + self.len]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.block[self.at..self.at + self.len]
    }

    /// Everything, canaries included.
    pub fn block(&self) -> &[u8] {
        &self.block
    }

    pub fn canaries_hold(&self) -> bool {
        let (before, after) = (&self.block[..self.at], &self.block[self.at + self.len..]);
        before.iter().chain(after).all(|&byte| byte == CANARY)
    }

    pub fn ints_mut(&mut self) -> &mut [i32] {
        bytemuck::cast_slice_mut(&mut self.block[self.at..self.at + self.len])
    }

    /// Numbers in [-1, 1).
    pub fn fill_floats(&mut self, dtype: i32, rng: &mut Rng) {
        let bytes = &mut self.block[self.at..self.at + self.len];
        if dtype == compactattn_dtype::COMPACTATTN_DTYPE_F32 as i32 {
            bytemuck::cast_slice_mut::<_, f32>(bytes).fill_with(|| rng.unit());
        } else if dtype == compactattn_dtype::COMPACTATTN_DTYPE_F16 as i32 {
            bytemuck::cast_slice_mut::<_, f16>(bytes).fill_with(|| f16::from_f32(rng.unit()));
        } else if dtype == compactattn_dtype::COMPACTATTN_DTYPE_E4M3 as i32 {
            bytes.fill_with(|| compactattn::e4m3::encode(rng.unit()));
        } else {
            bytemuck::cast_slice_mut::<_, bf16>(bytes).fill_with(|| bf16::from_f32(rng.unit()));
        }
    }
}

impl Guarded {
    /// Scales in [0.5, 2).
    pub fn fill_scales(&mut self, rng: &mut Rng) {
        let bytes = &mut self.block[self.at..self.at + self.len];
        bytemuck::cast_slice_mut::<_, f32>(bytes).fill_with(|| 1.25 + 0.75 * rng.unit());
    }

    /// One of them so that no value can be meant by it.
    pub fn fill_bad_scale(&mut self, rng: &mut Rng) {
        let bytes = &mut self.block[self.at..self.at + self.len];
        let scales = bytemuck::cast_slice_mut::<_, f32>(bytes);
        let at = rng.range(0, scales.len() as i32) as usize;
        scales[at] = *rng.pick(&[0.0, -0.0, -1.0, f32::NAN, f32::INFINITY]);
    }
}

/// A 64-bit linear congruential generator; the high bits are used.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        let mut rng = Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1));
        rng.next();
        rng
    }

    pub fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    /// In `low..high`.
    pub fn range(&mut self, low: i32, high: i32) -> i32 {
        low + (self.next() % (high - low) as u32) as i32
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.next() as usize % from.len()]
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.next() as usize % (i + 1));
        }
    }

    /// In [-1, 1).
    pub fn unit(&mut self) -> f32 {
        self.next() as f32 / (1_u32 << 30) as f32 - 1.0
    }
}

/// Elements of a dtype as f32.
pub fn widened(dtype: i32, bytes: &[u8]) -> Vec<f32> {
    let pairs = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    match dtype {
        1 => pairs().map(|x| bf16::from_bits(x).to_f32()).collect(),
        2 => pairs().map(|x| f16::from_bits(x).to_f32()).collect(),
        _ => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    }
}
