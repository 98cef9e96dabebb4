//! Every check a strided tensor can fail before its memory is touched.

use super::structs::{compactattn_device_kind, compactattn_tensor};
use super::tensor::{Device, Dim, View, Wanted, dtype_name, is_none};
use crate::error::{Error, Result, Status};

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
    // A tensor without elements has no steps between them, whatever its maker wrote there.
    let stride = if empty { [0; 4] } else { check_strides(tensor, wanted, &shape)? };
    let len = if empty { 0 } else { extent(wanted, &shape, &stride)? };
    check_memory(tensor, wanted, len)?;
    Ok(View { name: wanted.name, shape, stride, dtype: wanted.dtype, data: tensor.data.cast(), len })
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
