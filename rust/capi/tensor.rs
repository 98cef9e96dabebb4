//! Tensor arguments: what is wanted, what was checked, and the one place where raw pointers become slices.

use half::{bf16, f16};

use super::check::check;
use super::structs::compactattn_tensor;
use crate::error::{Error, Result, Status};
use crate::tensor::{Elements, ElementsMut};
use crate::types::Dtype;

/// Bytes that q, k, v and out, and their strides, are aligned to: what the widest loads need.
const VECTOR_BYTES: usize = 16;

/// A device as tensors name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Device {
    /// A `compactattn_device_kind`.
    pub(super) kind: i32,
    /// Which of that kind.
    pub(super) ordinal: i32,
}

/// What one extent must be.
#[derive(Clone, Copy, Debug)]
pub(super) enum Dim {
    /// Whatever it is.
    Any,
    /// Exactly this, called so.
    Is(usize, &'static str),
}

/// What a tensor argument must be.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    /// Its path in the arguments.
    pub(super) name: &'static str,
    /// Its element type.
    pub(super) dtype: Dtype,
    /// Its extents.
    pub(super) dims: Vec<Dim>,
    /// Bytes that its base and its strides are multiples of; at least an element.
    pub(super) align: usize,
    /// Whether rows follow each other without gaps.
    pub(super) contiguous: bool,
    /// Where it must lie.
    pub(super) device: Device,
}

/// A checked tensor, not yet touched.
#[derive(Clone, Copy, Debug)]
pub(super) struct View {
    /// Its path in the arguments.
    pub(super) name: &'static str,
    /// Extents; 1 after the last.
    pub(super) shape: [usize; 4],
    /// Strides in elements; of dimensions with one entry, 0.
    pub(super) stride: [usize; 4],
    pub(super) dtype: Dtype,
    pub(super) data: *mut u8,
    /// Elements from the first to the last.
    pub(super) len: usize,
}

/// Whether an optional tensor was left out.
pub(super) fn is_none(tensor: &compactattn_tensor) -> bool {
    tensor.data.is_null() && tensor.ndim == 0
}

/// Refuses outputs that share a byte with an input or with each other.
pub(super) fn check_apart(outputs: &[View], inputs: &[View]) -> Result<()> {
    for (i, out) in outputs.iter().enumerate() {
        for other in inputs.iter().chain(&outputs[..i]) {
            let (a, b) = (out.bytes(), other.bytes());
            if a.start < b.end && b.start < a.end {
                let wanted = format!("memory apart from {}", other.name);
                return Err(Error::new(Status::Alias, out.name, wanted, "an overlap"));
            }
        }
    }
    Ok(())
}

impl Wanted {
    /// Vectors of `head_dim` at any stride that wide loads can take.
    pub(super) fn vectors(name: &'static str, dtype: Dtype, dims: Vec<Dim>, device: Device) -> Self {
        Self { name, dtype, dims, align: VECTOR_BYTES, contiguous: false, device }
    }

    /// Rows of single elements at any stride.
    pub(super) fn rows(name: &'static str, dtype: Dtype, dims: Vec<Dim>, device: Device) -> Self {
        Self { name, dtype, dims, align: dtype.size_bytes(), contiguous: false, device }
    }

    /// Elements without gaps.
    pub(super) fn dense(name: &'static str, dtype: Dtype, dims: Vec<Dim>, device: Device) -> Self {
        Self { contiguous: true, ..Self::rows(name, dtype, dims, device) }
    }

    /// Checks `tensor` unless it was left out.
    pub(super) fn optional(&self, tensor: &compactattn_tensor) -> Result<Option<View>> {
        if is_none(tensor) { Ok(None) } else { check(tensor, self).map(Some) }
    }

    /// The path of one of its fields.
    pub(super) fn path(&self, field: &str) -> String {
        format!("{}.{field}", self.name)
    }
}

impl View {
    /// A block of bytes that is no tensor, for [`check_apart`].
    pub(super) fn of_bytes(name: &'static str, data: *mut u8, len: usize) -> Self {
        Self {
            name,
            shape: [len, 1, 1, 1],
            stride: [1, 0, 0, 0],
            dtype: Dtype::U32,
            data,
            len: len.div_ceil(4),
        }
    }

    fn bytes(&self) -> std::ops::Range<usize> {
        let start = self.data.addr();
        if self.len == 0 { start..start } else { start..start + self.len * self.dtype.size_bytes() }
    }

    /// The elements to read.
    ///
    /// # Safety
    /// The caller of the C function vouches for the extent, and `T` is the view's dtype. Nothing writes to it
    /// meanwhile ([`check_apart`] for this call's outputs, the C contract for everyone else).
    pub(super) unsafe fn slice<'a, T>(&self) -> &'a [T] {
        debug_assert_eq!(size_of::<T>(), self.dtype.size_bytes());
        if self.len == 0 {
            return &[];
        }
        // SAFETY: not NULL, aligned and within 63 bits by `check`; readable by this function's contract.
        unsafe { std::slice::from_raw_parts(self.data.cast(), self.len) }
    }

    /// The elements to write.
    ///
    /// # Safety
    /// As [`View::slice`], and nothing else reads or writes it meanwhile.
    pub(super) unsafe fn slice_mut<'a, T>(&self) -> &'a mut [T] {
        debug_assert_eq!(size_of::<T>(), self.dtype.size_bytes());
        if self.len == 0 {
            return &mut [];
        }
        // SAFETY: not NULL, aligned and within 63 bits by `check`; ours alone by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.data.cast(), self.len) }
    }

    /// Floating-point elements to read.
    ///
    /// # Safety
    /// As [`View::slice`].
    pub(super) unsafe fn elements<'a>(&self) -> Elements<'a> {
        match self.dtype {
            // SAFETY: this function's contract; the type is the view's.
            Dtype::Bf16 => Elements::Bf16(unsafe { self.slice::<bf16>() }),
            // SAFETY: as above.
            Dtype::F16 => Elements::F16(unsafe { self.slice::<f16>() }),
            // SAFETY: as above.
            Dtype::E4m3 => Elements::E4m3(unsafe { self.slice::<u8>() }),
            // SAFETY: as above; the callers ask for floating-point views only, integers have f32's size.
            _ => Elements::F32(unsafe { self.slice::<f32>() }),
        }
    }

    /// Floating-point elements to write, of 16 or 32 bits: no result is e4m3.
    ///
    /// # Safety
    /// As [`View::slice_mut`].
    pub(super) unsafe fn elements_mut<'a>(&self) -> ElementsMut<'a> {
        match self.dtype {
            // SAFETY: this function's contract; the type is the view's.
            Dtype::Bf16 => ElementsMut::Bf16(unsafe { self.slice_mut::<bf16>() }),
            // SAFETY: as above.
            Dtype::F16 => ElementsMut::F16(unsafe { self.slice_mut::<f16>() }),
            // SAFETY: as above; the callers ask for floating-point views only, integers have f32's size.
            _ => ElementsMut::F32(unsafe { self.slice_mut::<f32>() }),
        }
    }
}

/// The bytes of a caller's workspace.
///
/// # Safety
/// `data`: not NULL, writable for `len` bytes, and nobody else's meanwhile.
pub(super) unsafe fn workspace<'a>(data: *mut u8, len: usize) -> &'a mut [u8] {
    // SAFETY: this function's contract.
    unsafe { std::slice::from_raw_parts_mut(data, len) }
}

/// The pointers of a caller's array.
///
/// # Safety
/// `data`: not NULL, aligned, readable for `len` entries.
pub(super) unsafe fn array<'a, T>(data: *const T, len: usize) -> &'a [T] {
    // SAFETY: this function's contract.
    unsafe { std::slice::from_raw_parts(data, len) }
}

/// The name of a dtype number, known or not.
pub(super) fn dtype_name(dtype: i32) -> String {
    let known = [Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::I32, Dtype::U32, Dtype::E4m3];
    let found = known.into_iter().find(|&known| known as i32 == dtype);
    found.map_or_else(|| format!("unknown dtype {dtype}"), |known| known.name().to_owned())
}
