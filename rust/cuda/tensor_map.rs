//! Tensor maps: how the copy engine of sm_90 and later sees a tensor.

use std::ffi::c_int;

use super::driver::Driver;
use super::symbols::Address;
use crate::error::{Error, Result, Status};
use crate::types::Dtype;

/// A `CUtensorMap`, passed to kernels by value; 64-byte alignment is what the encoder asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub(crate) struct TensorMap([u64; 16]);

/// Describes a tensor at `address`, fastest dimension first: `sizes` in elements, `strides_bytes` of the dimensions
/// after the first, `box_sizes` of one copy in elements. 128-byte swizzle; elements outside read as zero.
///
/// # Errors
/// [`Status::Internal`] if the ranks differ or exceed 5; [`Status::Dtype`] unless bf16 or f16; [`Status::Cuda`] if
/// the driver finds an address or stride off 16 bytes, a size of 0 or above 2^32, or a box wider than 128 bytes or
/// longer than 256.
#[expect(clippy::cast_possible_truncation, reason = "a rank is at most 5")]
pub(crate) fn encode(
    driver: &Driver,
    dtype: Dtype,
    address: Address,
    sizes: &[u64],
    strides_bytes: &[u64],
    box_sizes: &[u32],
) -> Result<TensorMap> {
    let rank = sizes.len();
    if !(1..=MAX_RANK).contains(&rank) || strides_bytes.len() != rank - 1 || box_sizes.len() != rank {
        let got = format!("{rank} sizes, {} strides, box of {}", strides_bytes.len(), box_sizes.len());
        return Err(Error::new(Status::Internal, "tensor map", "1..=5 dimensions", got));
    }
    let element = match dtype {
        Dtype::F16 => FLOAT16,
        Dtype::Bf16 => BFLOAT16,
        other => return Err(Error::new(Status::Dtype, "tensor map", "bf16 or f16", format!("{other:?}"))),
    };
    let start = usize::try_from(address).map(std::ptr::without_provenance_mut);
    let start =
        start.map_err(|_| Error::plain(Status::Internal, "tensor map: an address beyond this machine's"))?;
    let mut map = TensorMap([0; 16]);
    // SAFETY: the map is aligned and 128 bytes; each array has the length that `rank` says. The address is stored,
    // not followed.
    let code = unsafe {
        (driver.functions.tensor_map_encode_tiled)(
            map.0.as_mut_ptr().cast(),
            element,
            rank as u32,
            start,
            sizes.as_ptr(),
            strides_bytes.as_ptr(),
            box_sizes.as_ptr(),
            [1; MAX_RANK].as_ptr(),
            INTERLEAVE_NONE,
            SWIZZLE_128B,
            PROMOTE_256B,
            FILL_ZERO,
        )
    };
    driver.check(code, "cuTensorMapEncodeTiled")?;
    Ok(map)
}

const MAX_RANK: usize = 5;
// CU_TENSOR_MAP_* of cuda.h.
const FLOAT16: c_int = 6;
const BFLOAT16: c_int = 9;
const INTERLEAVE_NONE: c_int = 0;
const SWIZZLE_128B: c_int = 3;
const PROMOTE_256B: c_int = 3;
const FILL_ZERO: c_int = 0;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::fake::Fake;

    /// The fake driver's map is what it was told: element and rank, address, sizes, strides, boxes, modes.
    #[test]
    fn a_map_passes_on_what_it_is_told() {
        let fake = Fake::in_mode("");
        let map =
            encode(fake.driver(), Dtype::Bf16, 0x1000, &[128, 8, 77], &[256, 2048], &[64, 8, 16]).unwrap();
        let wanted =
            [9 << 32 | 3, 0x1000, 128, 8, 77, 0, 0, 256, 2048, 0, 0, 8 << 32 | 64, 16, 0, 0, 0x3_0300];
        assert_eq!(map.0, wanted);
        assert_eq!(std::ptr::from_ref(&map).addr() % 64, 0);
    }

    #[test]
    fn ranks_dtypes_and_what_the_driver_refuses_are_errors() {
        let fake = Fake::in_mode("");
        let encode = |dtype, address, sizes: &[u64], strides: &[u64], boxes: &[u32]| {
            encode(fake.driver(), dtype, address, sizes, strides, boxes).unwrap_err().status()
        };
        assert_eq!(encode(Dtype::F16, 0x1000, &[], &[], &[]), Status::Internal);
        assert_eq!(encode(Dtype::F16, 0x1000, &[8, 8], &[16, 16], &[8, 8]), Status::Internal);
        assert_eq!(encode(Dtype::F16, 0x1000, &[8; 6], &[16; 5], &[8; 6]), Status::Internal);
        assert_eq!(encode(Dtype::F32, 0x1000, &[8], &[], &[8]), Status::Dtype);
        assert_eq!(encode(Dtype::F16, 0x1008, &[8], &[], &[8]), Status::Cuda);
    }
}
