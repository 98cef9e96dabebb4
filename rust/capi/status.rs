//! `compactattn_status`: the C twin of [`Status`].

use std::ffi::CStr;

use crate::error::Status;

/// What a call ended in. Values are explicit and never reused.
///
/// 0: the call did what it says. 1-99: the caller's mistake, found before anything ran; nothing was written.
/// 100-199: driver or device. 200 and up: a fault of the library. `compactattn_last_error` has the details.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use]
#[repr(i32)]
pub enum compactattn_status {
    /// The call did what it says.
    COMPACTATTN_OK = 0,
    /// A required pointer or handle is NULL.
    COMPACTATTN_E_NULL = 1,
    /// `struct_size` is unknown, or a newer struct asks for something this library does not know.
    COMPACTATTN_E_STRUCT_SIZE = 2,
    /// Not a live handle of this kind: destroyed, foreign, or never created here.
    COMPACTATTN_E_HANDLE = 3,
    /// The handle was made before a fork; this is the child.
    COMPACTATTN_E_WRONG_PROCESS = 4,
    /// The caller was built for another ABI major.
    COMPACTATTN_E_ABI = 5,
    /// Extents that contradict each other.
    COMPACTATTN_E_SHAPE = 6,
    /// A number outside its range.
    COMPACTATTN_E_VALUE = 7,
    /// Well formed, but not offered; the reason says what is.
    COMPACTATTN_E_UNSUPPORTED = 8,
    /// A dtype that is unknown here or differs from its partners.
    COMPACTATTN_E_DTYPE = 9,
    /// A stride that is zero, negative, too short, or makes elements overlap.
    COMPACTATTN_E_STRIDE = 10,
    /// A base address or stride that misses its alignment.
    COMPACTATTN_E_ALIGN = 11,
    /// An output overlaps an input or another output.
    COMPACTATTN_E_ALIAS = 12,
    /// Tensors, workspace or handle live on different devices.
    COMPACTATTN_E_DEVICE = 13,
    /// Host memory where device memory is wanted.
    COMPACTATTN_E_NOT_DEVICE = 14,
    /// The workspace is missing, misaligned or too small.
    COMPACTATTN_E_WORKSPACE = 15,
    /// A sequence length that contradicts the batch.
    COMPACTATTN_E_SEQLEN = 16,
    /// A block-table entry inside the valid prefix that names no page of the pool.
    COMPACTATTN_E_TABLE = 17,
    /// A product of extents does not fit 63 bits.
    COMPACTATTN_E_OVERFLOW = 18,
    /// The object is in use by another thread.
    COMPACTATTN_E_BUSY = 19,
    /// The call cannot be recorded into a CUDA graph.
    COMPACTATTN_E_CAPTURE = 20,
    /// Not a stream of the context's device.
    COMPACTATTN_E_STREAM = 21,
    /// A setting from the environment or a file cannot be understood.
    COMPACTATTN_E_CONFIG = 22,
    /// A file cannot be read or written.
    COMPACTATTN_E_IO = 23,
    /// `libcuda.so.1` is missing.
    COMPACTATTN_E_NO_DRIVER = 100,
    /// The driver is older than the kernels need.
    COMPACTATTN_E_DRIVER_OLD = 101,
    /// This library was built without GPU kernels.
    COMPACTATTN_E_NOT_BUILT = 102,
    /// No kernel for this GPU's architecture.
    COMPACTATTN_E_ARCH = 103,
    /// An embedded kernel image is damaged.
    COMPACTATTN_E_IMAGE = 104,
    /// The driver refused a call.
    COMPACTATTN_E_CUDA = 105,
    /// The CUDA context is lost; every later call says so too.
    COMPACTATTN_E_CONTEXT_LOST = 106,
    /// No GPU is visible.
    COMPACTATTN_E_NO_DEVICE = 107,
    /// Memory ran out.
    COMPACTATTN_E_OUT_OF_MEMORY = 108,
    /// A fault of this library.
    COMPACTATTN_E_INTERNAL = 200,
    /// A panic was stopped at the border; the handle involved must be destroyed.
    COMPACTATTN_E_PANIC = 201,
}

/// The C name without its prefix, for any number a caller may hold.
pub(super) fn name(status: i32) -> &'static CStr {
    NAMES.iter().find(|(known, _)| *known as i32 == status).map_or(c"unknown status", |(_, name)| name)
}

macro_rules! twins {
    ($($rust:ident => $c:ident, $name:literal;)*) => {
        impl From<Status> for compactattn_status {
            fn from(status: Status) -> Self {
                match status {
                    $(Status::$rust => Self::$c,)*
                }
            }
        }

        const NAMES: &[(compactattn_status, &CStr)] = &[$((compactattn_status::$c, $name),)*];

        #[cfg(test)]
        const TWINS: &[(Status, compactattn_status)] = &[$((Status::$rust, compactattn_status::$c),)*];
    };
}

twins! {
    Ok => COMPACTATTN_OK, c"OK";
    Null => COMPACTATTN_E_NULL, c"E_NULL";
    StructSize => COMPACTATTN_E_STRUCT_SIZE, c"E_STRUCT_SIZE";
    Handle => COMPACTATTN_E_HANDLE, c"E_HANDLE";
    WrongProcess => COMPACTATTN_E_WRONG_PROCESS, c"E_WRONG_PROCESS";
    Abi => COMPACTATTN_E_ABI, c"E_ABI";
    Shape => COMPACTATTN_E_SHAPE, c"E_SHAPE";
    Value => COMPACTATTN_E_VALUE, c"E_VALUE";
    Unsupported => COMPACTATTN_E_UNSUPPORTED, c"E_UNSUPPORTED";
    Dtype => COMPACTATTN_E_DTYPE, c"E_DTYPE";
    Stride => COMPACTATTN_E_STRIDE, c"E_STRIDE";
    Align => COMPACTATTN_E_ALIGN, c"E_ALIGN";
    Alias => COMPACTATTN_E_ALIAS, c"E_ALIAS";
    Device => COMPACTATTN_E_DEVICE, c"E_DEVICE";
    NotDevice => COMPACTATTN_E_NOT_DEVICE, c"E_NOT_DEVICE";
    Workspace => COMPACTATTN_E_WORKSPACE, c"E_WORKSPACE";
    SeqLen => COMPACTATTN_E_SEQLEN, c"E_SEQLEN";
    Table => COMPACTATTN_E_TABLE, c"E_TABLE";
    Overflow => COMPACTATTN_E_OVERFLOW, c"E_OVERFLOW";
    Busy => COMPACTATTN_E_BUSY, c"E_BUSY";
    Capture => COMPACTATTN_E_CAPTURE, c"E_CAPTURE";
    Stream => COMPACTATTN_E_STREAM, c"E_STREAM";
    Config => COMPACTATTN_E_CONFIG, c"E_CONFIG";
    Io => COMPACTATTN_E_IO, c"E_IO";
    NoDriver => COMPACTATTN_E_NO_DRIVER, c"E_NO_DRIVER";
    DriverOld => COMPACTATTN_E_DRIVER_OLD, c"E_DRIVER_OLD";
    NotBuilt => COMPACTATTN_E_NOT_BUILT, c"E_NOT_BUILT";
    Arch => COMPACTATTN_E_ARCH, c"E_ARCH";
    Image => COMPACTATTN_E_IMAGE, c"E_IMAGE";
    Cuda => COMPACTATTN_E_CUDA, c"E_CUDA";
    ContextLost => COMPACTATTN_E_CONTEXT_LOST, c"E_CONTEXT_LOST";
    NoDevice => COMPACTATTN_E_NO_DEVICE, c"E_NO_DEVICE";
    OutOfMemory => COMPACTATTN_E_OUT_OF_MEMORY, c"E_OUT_OF_MEMORY";
    Internal => COMPACTATTN_E_INTERNAL, c"E_INTERNAL";
    Panic => COMPACTATTN_E_PANIC, c"E_PANIC";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_has_its_value_and_name_in_c() {
        for &(rust, c) in TWINS {
            assert_eq!(rust as i32, c as i32);
            assert_eq!(name(c as i32).to_str().unwrap(), rust.name());
            assert_eq!(format!("{c:?}"), format!("COMPACTATTN_{}", rust.name()));
        }
    }

    #[test]
    fn an_unknown_number_has_a_name_too() {
        assert_eq!(name(-7), c"unknown status");
    }
}
