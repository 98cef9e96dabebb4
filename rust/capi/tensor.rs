//! Tensor arguments: every check a strided tensor can fail, and the one place where raw pointers become slices.

use half::{bf16, f16};

use super::structs::{compactattn_device_kind, compactattn_tensor};
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
    name: &'static str,
    /// Its element type.
    dtype: Dtype,
    /// Its extents.
    dims: Vec<Dim>,
    /// Bytes that its base and its strides are multiples of; at least an element.
    align: usize,
    /// Whether rows follow each other without gaps.
    contiguous: bool,
    /// Where it must lie.
    device: Device,
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
    dtype: Dtype,
    data: *mut u8,
    /// Elements from the first to the last.
    len: usize,
}

/// Whether an optional tensor was left out.
pub(super) fn is_none(tensor: &compactattn_tensor) -> bool {
    tensor.data.is_null() && tensor.ndim == 0
}

/// Checks all that can be known without touching the memory.
pub(super) fn check(tensor: &compactattn_tensor, wanted: &Wanted) -> Result<View> {
    let shape = check_shape(tensor, wanted)?;
    if tensor.dtype != wanted.dtype as i32 {
        let got = dtype_name(tensor.dtype);
        return Err(Error::new(Status::Dtype, wanted.path("dtype"), wanted.dtype.name(), got));
    }
    check_device(tensor, wanted)?;
    let empty = shape.contains(&0);
    if tensor.data.is_null() && !empty {
        return Err(Error::new(Status::Null, wanted.path("data"), "a pointer", "NULL"));
    }
    let stride = check_strides(tensor, wanted, &shape)?;
    let len = if empty { 0 } else { extent(wanted, &shape, &stride)? };
    check_memory(tensor, wanted, len)?;
    Ok(View { name: wanted.name, shape, stride, dtype: wanted.dtype, data: tensor.data.cast(), len })
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

    fn path(&self, field: &str) -> String {
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
            // SAFETY: as above; the callers ask for floating-point views only, integers have f32's size.
            _ => Elements::F32(unsafe { self.slice::<f32>() }),
        }
    }

    /// Floating-point elements to write.
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

fn check_shape(tensor: &compactattn_tensor, wanted: &Wanted) -> Result<[usize; 4]> {
    let ndim = wanted.dims.len();
    if usize::try_from(tensor.ndim) != Ok(ndim) {
        // A zeroed tensor is a forgotten one.
        let status = if is_none(tensor) { Status::Null } else { Status::Shape };
        let path = wanted.path(if is_none(tensor) { "data" } else { "ndim" });
        return Err(Error::new(status, path, format!("{ndim} dimensions"), tensor.ndim));
    }
    let mut shape = [1; 4];
    for (i, dim) in wanted.dims.iter().enumerate() {
        let path = || wanted.path(&format!("shape[{i}]"));
        let got = tensor.shape[i];
        let count = usize::try_from(got).map_err(|_| Error::new(Status::Shape, path(), "at least 0", got))?;
        match *dim {
            Dim::Is(n, what) if count != n => {
                return Err(Error::new(Status::Shape, path(), format!("{n} ({what})"), got));
            }
            _ => shape[i] = count,
        }
    }
    Ok(shape)
}

fn check_device(tensor: &compactattn_tensor, wanted: &Wanted) -> Result<()> {
    let got = Device { kind: tensor.device_kind, ordinal: tensor.device_ordinal };
    if got.kind == compactattn_device_kind::COMPACTATTN_DEVICE_DEFAULT as i32 || got == wanted.device {
        return Ok(());
    }
    let text = |d: Device| format!("kind {} ordinal {}", d.kind, d.ordinal);
    Err(Error::new(Status::Device, wanted.path("device"), text(wanted.device), text(got)))
}

/// Positive strides, the last one 1, aligned, and no element at two indices; 0 where there is one entry.
fn check_strides(tensor: &compactattn_tensor, wanted: &Wanted, shape: &[usize; 4]) -> Result<[usize; 4]> {
    let ndim = wanted.dims.len();
    let mut stride = [0; 4];
    for i in (0..ndim).filter(|&i| shape[i] > 1) {
        let path = || wanted.path(&format!("stride[{i}]"));
        let got = tensor.stride[i];
        let known = usize::try_from(got).ok().filter(|&x| x > 0);
        stride[i] = known.ok_or_else(|| Error::new(Status::Stride, path(), "at least 1", got))?;
        if i == ndim - 1 && got != 1 {
            return Err(Error::new(Status::Stride, path(), "1 (the last dimension is contiguous)", got));
        }
        // What leaves 64 bits here is an overflow below; its low bits are right.
        let bytes = stride[i].wrapping_mul(wanted.dtype.size_bytes());
        if i < ndim - 1 && !bytes.is_multiple_of(wanted.align) {
            let wanted = format!("a multiple of {} bytes", wanted.align);
            return Err(Error::new(Status::Align, path(), wanted, format!("{got} elements")));
        }
    }
    check_no_overlap(wanted, shape, &stride)?;
    Ok(stride)
}

/// From the smallest stride up, each must step over all that the smaller ones reach.
fn check_no_overlap(wanted: &Wanted, shape: &[usize; 4], stride: &[usize; 4]) -> Result<()> {
    if shape.contains(&0) {
        return Ok(());
    }
    let mut order: Vec<usize> = (0..wanted.dims.len()).filter(|&i| shape[i] > 1).collect();
    order.sort_by_key(|&i| (stride[i], shape.len() - i));
    let mut reach = 1_usize;
    for i in order {
        let path = || wanted.path(&format!("stride[{i}]"));
        if stride[i] < reach || (wanted.contiguous && stride[i] != reach) {
            let how = if wanted.contiguous { "" } else { "at least " };
            let why = if wanted.contiguous { "contiguous" } else { "or elements overlap" };
            return Err(Error::new(Status::Stride, path(), format!("{how}{reach} ({why})"), stride[i]));
        }
        let more = (shape[i] - 1).checked_mul(stride[i]).and_then(|x| x.checked_add(reach));
        reach = more.ok_or_else(|| overflow(wanted))?;
    }
    Ok(())
}

fn extent(wanted: &Wanted, shape: &[usize; 4], stride: &[usize; 4]) -> Result<usize> {
    let last = shape
        .iter()
        .zip(stride)
        .try_fold(1_usize, |sum, (&count, &stride)| sum.checked_add((count - 1).checked_mul(stride)?));
    let bytes = last.and_then(|len| len.checked_mul(wanted.dtype.size_bytes()));
    bytes.filter(|&x| isize::try_from(x).is_ok()).and(last).ok_or_else(|| overflow(wanted))
}

fn overflow(wanted: &Wanted) -> Error {
    Error::new(Status::Overflow, wanted.name, "an extent within 63 bits", "more")
}

/// Alignment, and whether the allocation is as long as the strides say.
fn check_memory(tensor: &compactattn_tensor, wanted: &Wanted, len: usize) -> Result<()> {
    let bytes = len * wanted.dtype.size_bytes();
    if len > 0 && !tensor.data.addr().is_multiple_of(wanted.align) {
        let text = format!("alignment to {} bytes", wanted.align);
        return Err(Error::new(Status::Align, wanted.path("data"), text, "a misaligned address"));
    }
    if tensor.data.addr().checked_add(bytes).is_none() {
        return Err(overflow(wanted));
    }
    let path = || wanted.path("storage_bytes");
    match usize::try_from(tensor.storage_bytes) {
        Err(_) => Err(Error::new(Status::Shape, path(), "at least 0", tensor.storage_bytes)),
        Ok(given) if given != 0 && given < bytes => {
            Err(Error::new(Status::Shape, path(), format!("at least {bytes}, by shape and stride"), given))
        }
        Ok(_) => Ok(()),
    }
}

/// The name of a dtype number, known or not.
pub(super) fn dtype_name(dtype: i32) -> String {
    let known = [Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::I32, Dtype::U32];
    let found = known.into_iter().find(|&known| known as i32 == dtype);
    found.map_or_else(|| format!("unknown dtype {dtype}"), |known| known.name().to_owned())
}
