//! Versioned structs in and out: the `struct_size` rules, and the only place that follows a pointer to a struct.
//!
//! A caller's struct may be shorter than ours (an older header: what is missing counts as 0), down to its first
//! published size, or longer (a newer header), if all that we do not know is 0.

use std::ffi::{CStr, c_char};
use std::mem::MaybeUninit;

use super::structs::{
    compactattn_context_desc, compactattn_plan_desc, compactattn_settings, compactattn_tensor,
};
use super::structs_step::{
    compactattn_attend_args, compactattn_batch, compactattn_combine_args, compactattn_csr,
    compactattn_forward_args, compactattn_padded, compactattn_selection, compactattn_sizes,
    compactattn_stats, compactattn_summaries, compactattn_table,
};
use crate::error::{Error, Result, Status};

/// A struct of the header that starts with `uint32_t struct_size`.
///
/// # Safety
/// `repr(C)`, its first field is `struct_size: u32`, it has no padding, and all zero is a value of it.
pub(super) unsafe trait Versioned: Copy {
    /// Its size when it was first published.
    const FIRST_BYTES: usize;

    /// What its `reserved` field holds.
    fn reserved(&self) -> u32 {
        0
    }
}

/// Copies in a required struct.
///
/// # Safety
/// `from`: NULL, or readable for 4 bytes and then for as many as its `struct_size` says.
pub(super) unsafe fn input<T: Versioned>(name: &'static str, from: *const T) -> Result<T> {
    // SAFETY: this function's contract.
    let bytes = unsafe { struct_bytes(name, from) }?;
    let mut value = MaybeUninit::<T>::zeroed();
    let known = bytes.min(size_of::<T>());
    // SAFETY: `from` is readable for `bytes` bytes, `value` is `size_of::<T>()` long, and they are apart.
    unsafe { std::ptr::copy_nonoverlapping(from.cast::<u8>(), value.as_mut_ptr().cast(), known) };
    for i in known..bytes {
        // SAFETY: `i` is below `bytes`.
        let byte = unsafe { from.cast::<u8>().wrapping_add(i).read() };
        if byte != 0 {
            let wanted = format!("zeros after byte {}, the size this library knows", size_of::<T>());
            return Err(Error::new(Status::StructSize, name, wanted, "a newer field that is set"));
        }
    }
    // SAFETY: all zero is a value of `T` (`Versioned`), and so is any number in any field.
    let value = unsafe { value.assume_init() };
    match value.reserved() {
        0 => Ok(value),
        x => Err(Error::new(Status::StructSize, format!("{name}.reserved"), 0, x)),
    }
}

/// Copies in an optional struct.
///
/// # Safety
/// As [`input`].
pub(super) unsafe fn optional<T: Versioned>(name: &'static str, from: *const T) -> Result<Option<T>> {
    if from.is_null() {
        return Ok(None);
    }
    // SAFETY: this function's contract.
    unsafe { input(name, from) }.map(Some)
}

/// Copies in an optional bare tensor (its layout is fixed).
///
/// # Safety
/// `from`: NULL, or readable for one tensor.
pub(super) unsafe fn tensor(
    name: &'static str,
    from: *const compactattn_tensor,
) -> Result<compactattn_tensor> {
    check_pointer(name, from)?;
    // SAFETY: not NULL, aligned, and readable by this function's contract.
    Ok(unsafe { from.read() })
}

/// Copies in an optional path.
///
/// # Safety
/// `from`: NULL, or a string that ends in NUL.
pub(super) unsafe fn path(name: &'static str, from: *const c_char) -> Result<Option<String>> {
    if from.is_null() {
        return Ok(None);
    }
    // SAFETY: not NULL, and ended by NUL by this function's contract.
    let text = unsafe { CStr::from_ptr(from) }.to_str();
    text.map(|text| Some(text.to_owned()))
        .map_err(|_| Error::new(Status::Value, name, "UTF-8", "other bytes"))
}

/// Checks a struct to be written, before the work that fills it; the bytes the caller has room for.
///
/// # Safety
/// As [`input`].
pub(super) unsafe fn room<T: Versioned>(name: &'static str, to: *const T) -> Result<usize> {
    // SAFETY: this function's contract.
    unsafe { struct_bytes(name, to) }
}

/// Copies out as much of `value` as the caller has room for; bytes we do not know become 0, `struct_size` stays.
///
/// # Safety
/// `to` is writable for `room` bytes, at least 4, which [`room`] has found.
pub(super) unsafe fn output<T: Versioned>(to: *mut T, room: usize, value: &T) {
    let head = size_of::<u32>();
    let known = room.min(size_of::<T>()) - head;
    let to = to.cast::<u8>().wrapping_add(head);
    let from = std::ptr::from_ref(value).cast::<u8>().wrapping_add(head);
    // SAFETY: `to` is writable for `room - 4` bytes, `value` readable for `size_of::<T>() - 4`; they are apart.
    unsafe { std::ptr::copy_nonoverlapping(from, to, known) };
    // SAFETY: the rest of the caller's `room`.
    unsafe { std::ptr::write_bytes(to.wrapping_add(known), 0, room - head - known) };
}

/// Refuses NULL and misaligned pointers.
pub(super) fn check_pointer<T>(name: &str, pointer: *const T) -> Result<()> {
    if pointer.is_null() {
        return Err(Error::new(Status::Null, name, "a pointer", "NULL"));
    }
    if !pointer.is_aligned() {
        let wanted = format!("alignment to {} bytes", align_of::<T>());
        return Err(Error::new(Status::Align, name, wanted, "a misaligned pointer"));
    }
    Ok(())
}

/// # Safety
/// As [`input`].
unsafe fn struct_bytes<T: Versioned>(name: &'static str, from: *const T) -> Result<usize> {
    check_pointer(name, from)?;
    // SAFETY: not NULL, aligned, readable for 4 bytes; the first field is a `u32` (`Versioned`).
    let size = unsafe { from.cast::<u32>().read() };
    let bytes = size as usize;
    if (T::FIRST_BYTES..=MAX_BYTES).contains(&bytes) {
        return Ok(bytes);
    }
    let wanted = format!("{} (sizeof) or more", T::FIRST_BYTES);
    Err(Error::new(Status::StructSize, format!("{name}.struct_size"), wanted, size))
}

/// Beyond this a `struct_size` is garbage, not a newer header.
const MAX_BYTES: usize = 64 * 1024;

macro_rules! versioned {
    ($($name:ident, $first_bytes:literal $(, $reserved:ident)?;)*) => {$(
        // SAFETY: repr(C), led by `struct_size`, made of numbers and pointers without padding (sizes are asserted
        // beside the struct).
        unsafe impl Versioned for $name {
            const FIRST_BYTES: usize = $first_bytes;
            $(fn reserved(&self) -> u32 {
                self.$reserved
            })?
        }
        const _: () = assert!(size_of::<$name>() >= $first_bytes);
    )*};
}

versioned! {
    compactattn_context_desc, 24, reserved;
    compactattn_settings, 96;
    compactattn_plan_desc, 120, reserved;
    compactattn_batch, 584, reserved;
    compactattn_summaries, 200, reserved;
    compactattn_selection, 200, reserved;
    compactattn_table, 296, reserved;
    compactattn_padded, 296, reserved;
    compactattn_csr, 296, reserved;
    compactattn_forward_args, 256;
    compactattn_attend_args, 256;
    compactattn_combine_args, 592, reserved;
    compactattn_sizes, 104;
    compactattn_stats, 64;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a later header would have it: one field more than a published one.
    #[derive(Clone, Copy, Debug, PartialEq)]
    #[repr(C)]
    struct Grown {
        struct_size: u32,
        first: i32,
        added: i32,
    }

    // SAFETY: repr(C), led by `struct_size`, integers only, 12 bytes.
    unsafe impl Versioned for Grown {
        const FIRST_BYTES: usize = 8;
    }

    #[test]
    fn what_an_older_caller_lacks_counts_as_zero() {
        let old = [8_u32, 7, 99];
        // SAFETY: `old` is longer than its struct_size of 8.
        let read = unsafe { input("x", old.as_ptr().cast::<Grown>()) };
        assert_eq!(read, Ok(Grown { struct_size: 8, first: 7, added: 0 }));
    }

    #[test]
    fn a_newer_caller_is_served_while_its_new_fields_are_zero() {
        let mut new = [16_u32, 7, 5, 0];
        // SAFETY: `new` is as long as its struct_size.
        assert_eq!(unsafe { input("x", new.as_ptr().cast::<Grown>()) }.unwrap().added, 5);
        new[3] = 1 << 24;
        // SAFETY: as above.
        let error = unsafe { input("x", new.as_ptr().cast::<Grown>()) }.unwrap_err();
        assert_eq!(error.status(), Status::StructSize);
    }

    #[test]
    fn output_fills_the_callers_room_and_not_a_byte_more() {
        let value = Grown { struct_size: 0, first: 7, added: 5 };
        for (room, wanted) in [(8, [8, 7, 0xAA, 0xAA]), (12, [12, 7, 5, 0xAA]), (16, [16, 7, 5, 0])] {
            let mut to = [room, 0xAA_u32, 0xAA, 0xAA];
            // SAFETY: `to` has 16 bytes.
            unsafe { output(to.as_mut_ptr().cast(), room as usize, &value) };
            assert_eq!(to, wanted);
        }
    }
}
