//! The GPU: the stages of [`crate::run`] as launches on the caller's stream.
//!
//! ```text
//! driver (libcuda, loaded at run time) ─► device ─► kernels (embedded images) ─► context
//! batch + layout ─► step (launch parameters) + scratch (workspace) ─► plan: select, attend ─► launches
//! ```
//!
//! A call puts a handful of kernels on the stream and returns: no host sync, no allocation, nothing loaded, lengths
//! read on the device, so it can be captured into a CUDA graph and replayed with other lengths. Nothing links against
//! CUDA: a machine without a driver loads this library and gets [`Status::NoDriver`].

mod attend;
mod batch;
mod cells;
mod checked;
mod clusters;
mod context;
mod device;
mod driver;
mod export;
#[cfg(test)]
pub(crate) mod fake;
mod gate;
mod images;
#[cfg(feature = "cudarc")]
mod interop;
mod kernels;
mod memory;
mod merge;
pub mod nvtx;
mod owned;
mod params;
mod plan;
mod refuse;
mod scratch;
mod select;
mod shared;
mod step;
mod stream;
mod summaries;
mod symbols;
mod tensor_map;

pub use attend::DeviceOutput;
pub use batch::{DeviceBatch, DevicePool, DeviceTokens};
pub use context::Context;
pub use export::{DeviceCsr, DevicePadded, most_pages, most_rows};
pub use memory::DeviceBuffer;
pub use merge::DeviceSide;
pub use owned::OwnedCall;
pub use plan::{Call, DeviceTable, External, Plan};
pub(crate) use refuse::{check_mean_values, check_summaries};
pub use summaries::MeansAt;

use crate::error::Result;
#[cfg(doc)]
use crate::error::Status;

/// Whether a context on GPU `ordinal` can be made.
///
/// # Errors
/// [`Status::NoDriver`], [`Status::DriverOld`], [`Status::NoDevice`], [`Status::NotBuilt`], [`Status::Arch`];
/// [`Status::Value`] for an ordinal beyond the visible GPUs; others of the driver.
pub fn probe(ordinal: usize) -> Result<()> {
    let device = device::Device::open(ordinal)?;
    kernels::choose(device.properties(), images::IMAGES).map(drop)
}

/// One line on the GPU kernels of this build: "none", or units, kernels, architectures and the compiler.
#[must_use]
pub fn kernels() -> String {
    images::summary()
}

/// Architectures this build holds kernels for, as the compiler names them: `sm_90a`. Empty without any.
#[must_use]
pub fn architectures() -> Vec<&'static str> {
    let mut archs: Vec<_> = images::IMAGES.iter().map(|image| image.arch).collect();
    archs.sort_unstable();
    archs.dedup();
    archs
}
