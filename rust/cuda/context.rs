//! One GPU with every kernel loaded: made once, shared by plans and threads.

use std::ffi::c_void;
use std::sync::Arc;

use super::device::{Device, Entered};
use super::images::Image;
use super::kernels::Kernels;
use super::memory::{DeviceBuffer, PointerKind, pointer_kind};
use super::stream::Stream;
use crate::error::{Error, Result, Status};

/// A GPU, its primary context retained, its kernels loaded.
#[derive(Debug)]
pub struct Context {
    device: Arc<Device>,
    kernels: Kernels,
}

impl Context {
    /// Opens GPU `ordinal` of the visible ones and loads all kernels, so that no later call loads anything.
    ///
    /// # Errors
    /// [`Status::NotBuilt`], [`Status::NoDriver`], [`Status::DriverOld`], [`Status::NoDevice`], [`Status::Arch`],
    /// [`Status::Image`], [`Status::OutOfMemory`].
    pub fn open(ordinal: usize) -> Result<Self> {
        Self::on(Device::open(ordinal)?, super::images::IMAGES)
    }

    /// [`Context::open`] with given kernels.
    ///
    /// # Errors
    /// As [`Context::open`].
    pub(crate) fn on(device: Arc<Device>, images: &[Image]) -> Result<Self> {
        let kernels = Kernels::load(&device, images)?;
        let properties = device.properties();
        tracing::info!(gpu = %properties.name, sms = properties.num_sms, "CUDA context: kernels loaded");
        Ok(Self { device, kernels })
    }

    /// The GPU's name, as its maker calls it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.device.properties().name
    }

    /// The newest CUDA version its driver serves: 1000 * major + 10 * minor.
    #[must_use]
    pub fn driver_version(&self) -> i32 {
        self.device.driver().version()
    }

    /// Multiprocessors.
    #[must_use]
    pub fn num_sms(&self) -> usize {
        self.device.properties().num_sms as usize
    }

    /// The device.
    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The kernels.
    pub(crate) fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// Makes the GPU's context current until the guard goes.
    ///
    /// # Errors
    /// [`Status::ContextLost`] and others of the driver.
    pub(crate) fn enter(&self) -> Result<Entered<'_>> {
        self.device.enter()
    }

    /// The caller's stream, if it is one of this GPU's.
    ///
    /// # Errors
    /// [`Status::Stream`]; [`Status::Capture`] for the legacy stream while another one is captured.
    ///
    /// # Safety
    /// `raw`: NULL, 1, 2, or a live stream, alive for as long as the result is used.
    pub(crate) unsafe fn stream(&self, raw: *mut c_void) -> Result<Stream> {
        // SAFETY: this function's contract.
        let stream = unsafe { Stream::from_raw(raw.cast()) };
        let _entered = self.enter()?;
        stream.check(&self.device)?;
        // Work on the legacy stream would break a capture that is going on beside it; asking does not.
        stream.is_capturing(&self.device)?;
        Ok(stream)
    }

    /// GPU memory of `len_bytes`, freed with the result; contents are undefined.
    ///
    /// # Errors
    /// [`Status::OutOfMemory`].
    pub fn alloc(&self, len_bytes: usize) -> Result<DeviceBuffer> {
        DeviceBuffer::new(&self.device, len_bytes)
    }

    /// Waits until everything that was put on the legacy stream is done. For tools; stages never wait.
    ///
    /// # Errors
    /// What the work ended in.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: NULL is the legacy stream.
        let stream = unsafe { Stream::from_raw(std::ptr::null_mut()) };
        let _entered = self.enter()?;
        stream.synchronize(&self.device)
    }

    /// Refuses memory that kernels of this GPU must not be handed.
    ///
    /// # Errors
    /// [`Status::NotDevice`] for host memory, [`Status::Device`] for another GPU's.
    pub(crate) fn check_memory(&self, name: &str, address: u64) -> Result<()> {
        let _entered = self.enter()?;
        match pointer_kind(&self.device, address)? {
            PointerKind::Device(ordinal) if ordinal == self.device.ordinal() => Ok(()),
            PointerKind::Device(other) => {
                let wanted = format!("memory of GPU {}", self.device.ordinal());
                Err(Error::new(Status::Device, name, wanted, format!("memory of GPU {other}")))
            }
            PointerKind::PinnedHost => {
                Err(Error::new(Status::NotDevice, name, "device memory", "pinned host memory"))
            }
            PointerKind::Unknown => Err(Error::new(Status::NotDevice, name, "device memory", "host memory")),
        }
    }
}
