//! The one error type and the status codes it maps to across the C border.

use std::fmt::{self, Display};

/// `Result` with the crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What a call ended in. Values are part of the ABI: explicit, never reused, 1:1 with `compactattn_status`.
///
/// 1–99: the caller's mistake, found before anything ran; nothing was written. 100–199: driver or device. 200+: ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(i32)]
pub enum Status {
    /// The call did what it says.
    Ok = 0,
    /// A required pointer or handle is NULL.
    Null = 1,
    /// `struct_size` is unknown, or a newer struct asks for something this library does not know.
    StructSize = 2,
    /// Not a live handle of this kind: destroyed, foreign, or never created here.
    Handle = 3,
    /// The handle was made before a fork; this is the child.
    WrongProcess = 4,
    /// The caller was built for another ABI major.
    Abi = 5,
    /// Extents that contradict each other.
    Shape = 6,
    /// A number outside its range.
    Value = 7,
    /// Well formed, but not offered; the reason says what is.
    Unsupported = 8,
    /// A dtype that is unknown here or differs from its partners.
    Dtype = 9,
    /// A stride that is zero, negative, too short, or makes elements overlap.
    Stride = 10,
    /// A base address or stride that misses its alignment.
    Align = 11,
    /// An output overlaps an input or another output.
    Alias = 12,
    /// Tensors, workspace or handle live on different devices.
    Device = 13,
    /// Host memory where device memory is wanted.
    NotDevice = 14,
    /// The workspace is missing, misaligned or too small.
    Workspace = 15,
    /// A sequence length that contradicts the batch.
    SeqLen = 16,
    /// A block-table entry inside the valid prefix that names no page of the pool.
    Table = 17,
    /// A product of extents does not fit 63 bits.
    Overflow = 18,
    /// The object is in use by another thread.
    Busy = 19,
    /// The call cannot be recorded into a CUDA graph.
    Capture = 20,
    /// Not a stream of the context's device.
    Stream = 21,
    /// A setting from the environment or a file cannot be understood.
    Config = 22,
    /// A file cannot be read or written.
    Io = 23,
    /// `libcuda.so.1` is missing.
    NoDriver = 100,
    /// The driver is older than the kernels need.
    DriverOld = 101,
    /// This library was built without GPU kernels.
    NotBuilt = 102,
    /// No kernel for this GPU's architecture.
    Arch = 103,
    /// An embedded kernel image is damaged.
    Image = 104,
    /// The driver refused a call.
    Cuda = 105,
    /// The CUDA context is lost; every later call says so too.
    ContextLost = 106,
    /// No GPU is visible.
    NoDevice = 107,
    /// Memory ran out.
    OutOfMemory = 108,
    /// A fault of this library.
    Internal = 200,
    /// A panic was stopped at the border; the handle involved must be destroyed.
    Panic = 201,
}

impl Status {
    /// The stable name, as in the header without its prefix: `E_SHAPE`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::Null => "E_NULL",
            Self::StructSize => "E_STRUCT_SIZE",
            Self::Handle => "E_HANDLE",
            Self::WrongProcess => "E_WRONG_PROCESS",
            Self::Abi => "E_ABI",
            Self::Shape => "E_SHAPE",
            Self::Value => "E_VALUE",
            Self::Unsupported => "E_UNSUPPORTED",
            Self::Dtype => "E_DTYPE",
            Self::Stride => "E_STRIDE",
            Self::Align => "E_ALIGN",
            Self::Alias => "E_ALIAS",
            Self::Device => "E_DEVICE",
            Self::NotDevice => "E_NOT_DEVICE",
            Self::Workspace => "E_WORKSPACE",
            Self::SeqLen => "E_SEQLEN",
            Self::Table => "E_TABLE",
            Self::Overflow => "E_OVERFLOW",
            Self::Busy => "E_BUSY",
            Self::Capture => "E_CAPTURE",
            Self::Stream => "E_STREAM",
            Self::Config => "E_CONFIG",
            Self::Io => "E_IO",
            Self::NoDriver => "E_NO_DRIVER",
            Self::DriverOld => "E_DRIVER_OLD",
            Self::NotBuilt => "E_NOT_BUILT",
            Self::Arch => "E_ARCH",
            Self::Image => "E_IMAGE",
            Self::Cuda => "E_CUDA",
            Self::ContextLost => "E_CONTEXT_LOST",
            Self::NoDevice => "E_NO_DEVICE",
            Self::OutOfMemory => "E_OUT_OF_MEMORY",
            Self::Internal => "E_INTERNAL",
            Self::Panic => "E_PANIC",
        }
    }
}

/// Why a call was refused: which argument, what was wanted, what came. Nothing was changed.
///
/// The text is ASCII, at most [`Error::MAX_LEN`] bytes, and never shows an address or tensor contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    status: Status,
    text: String,
}

impl Error {
    /// Longest message in bytes.
    pub const MAX_LEN: usize = 300;

    /// An error about `argument`, which should have been `wanted` and was `got`.
    pub fn new(status: Status, argument: impl Display, wanted: impl Display, got: impl Display) -> Self {
        Self::plain(status, format!("{argument}: wanted {wanted}, got {got}"))
    }

    /// An error with a free text, for faults that are not about one argument.
    pub fn plain(status: Status, text: impl Into<String>) -> Self {
        let mut text: String = text.into().chars().map(|c| if c.is_ascii() { c } else { '?' }).collect();
        text.truncate(Self::MAX_LEN - status.name().len() - 2);
        Self { status, text }
    }

    /// The same, about one of several.
    pub(crate) fn of(self, which: &str) -> Self {
        Self::plain(self.status, format!("{which}: {}", self.text))
    }

    /// The status this error becomes across the C border.
    #[must_use]
    pub fn status(&self) -> Status {
        self.status
    }
}

impl Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.status.name(), self.text)
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_names_code_argument_wanted_and_got() {
        let error = Error::new(Status::Shape, "num_q_heads", "a multiple of num_kv_heads (3)", 7);
        assert_eq!(error.to_string(), "E_SHAPE: num_q_heads: wanted a multiple of num_kv_heads (3), got 7");
    }

    #[test]
    fn message_is_short_ascii_whatever_comes_in() {
        let error = Error::new(Status::Config, "é".repeat(500), "x", "y");
        assert!(error.to_string().is_ascii() && error.to_string().len() <= Error::MAX_LEN);
    }
}
