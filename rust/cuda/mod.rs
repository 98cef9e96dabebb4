//! The GPU side: the driver, found at run time, and what the stages need of it.
//!
//! | file | holds |
//! |---|---|
//! | symbols, driver | the driver's functions, loaded once; codes to statuses |
//! | device | one GPU through its primary context |
//! | images, kernels | the kernels of this build, loaded at creation and launched by name |
//! | stream, memory, `tensor_map` | the caller's streams and addresses; memory of a plan; maps for the copy engine |
//!
//! Nothing links against CUDA: a machine without a driver loads this library and gets [`Status::NoDriver`].

#[cfg_attr(not(test), allow(dead_code, reason = "for the stages"))]
mod device;
#[cfg_attr(not(test), allow(dead_code, reason = "for the stages"))]
mod driver;
#[cfg(test)]
mod fake;
mod images;
#[cfg_attr(not(test), allow(dead_code, reason = "for the stages"))]
mod kernels;
#[cfg_attr(not(test), allow(dead_code, reason = "for the stages"))]
mod memory;
#[cfg_attr(not(test), allow(dead_code, reason = "for the stages"))]
mod stream;
#[cfg_attr(not(test), allow(dead_code, reason = "for the stages"))]
mod symbols;
#[cfg_attr(not(test), allow(dead_code, reason = "for the stages"))]
mod tensor_map;

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
