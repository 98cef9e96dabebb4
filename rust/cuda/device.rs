//! One GPU through its primary context, the one every other library of the process uses too.

use std::ffi::{CStr, c_char, c_int};
use std::marker::PhantomData;
use std::sync::Arc;

use super::driver::{Driver, Handle};
use crate::error::{Error, Result, Status};

/// What is known of a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Properties {
    /// As its maker calls it.
    pub(crate) name: String,
    /// Compute capability: major, minor.
    pub(crate) capability: (u32, u32),
    /// Multiprocessors.
    pub(crate) num_sms: u32,
    /// The most shared memory of a CTA, static and dynamic, that a kernel may opt in to.
    pub(crate) max_shared_bytes: u32,
    /// Memory of the whole GPU.
    pub(crate) memory_bytes: u64,
}

impl Properties {
    /// Whether it has clusters of CTAs and kernels that start before the one before them ends. Every driver that
    /// serves ([`Driver::OLDEST`]) offers both, also to a graph.
    pub(crate) fn has_clusters(&self) -> bool {
        self.capability.0 >= 9
    }
}

/// A GPU whose primary context is retained while this lives.
#[derive(Debug)]
pub(crate) struct Device {
    driver: &'static Driver,
    ordinal: usize,
    id: c_int,
    properties: Properties,
    context: Handle,
}

impl Device {
    /// The visible GPU of that number.
    ///
    /// # Errors
    /// Those of [`Driver::get`]; [`Status::NoDevice`] if none is visible, [`Status::Value`] if there are fewer.
    pub(crate) fn open(ordinal: usize) -> Result<Arc<Self>> {
        Self::open_on(Driver::get()?, ordinal)
    }

    /// [`Device::open`] with a given driver.
    ///
    /// # Errors
    /// As [`Device::open`].
    pub(crate) fn open_on(driver: &'static Driver, ordinal: usize) -> Result<Arc<Self>> {
        let id = find(driver, ordinal)?;
        let properties = properties(driver, id)?;
        let mut context = Handle::NONE;
        // SAFETY: `id` is a device of this driver; writes one pointer.
        let code = unsafe { (driver.functions.primary_ctx_retain)(&raw mut context.0, id) };
        driver.check(code, "cuDevicePrimaryCtxRetain")?;
        Ok(Arc::new(Self { driver, ordinal, id, properties, context }))
    }

    /// Makes the device's context current until the guard is dropped; then the caller's is current again.
    ///
    /// # Errors
    /// [`Status::ContextLost`] and others of the driver.
    pub(crate) fn enter(&self) -> Result<Entered<'_>> {
        // SAFETY: the context is retained as long as `self` lives.
        let code = unsafe { (self.driver.functions.ctx_push_current)(self.context.0) };
        self.driver.check(code, "cuCtxPushCurrent")?;
        Ok(Entered { driver: self.driver, device: PhantomData })
    }

    /// The driver it was opened with.
    pub(crate) fn driver(&self) -> &'static Driver {
        self.driver
    }

    /// Its number among the visible GPUs.
    pub(crate) fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// What is known of it.
    pub(crate) fn properties(&self) -> &Properties {
        &self.properties
    }

    /// The primary context.
    pub(super) fn context(&self) -> Handle {
        self.context
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // The parent's context is not a child's to release.
        if self.driver.is_of_this_process() {
            // SAFETY: balances the retain in `open_on`; nothing of ours uses the context any more. The driver
            // answers an error at exit, when it is gone itself, and then there is nothing to do.
            unsafe { (self.driver.functions.primary_ctx_release)(self.id) };
        }
    }
}

/// The device's context is current on this thread.
#[derive(Debug)]
#[must_use = "the context is current only while this lives"]
pub(crate) struct Entered<'a> {
    driver: &'static Driver,
    /// Keeps the device, and keeps the guard on the thread it stands for.
    device: PhantomData<(&'a Device, *const ())>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut popped = Handle::NONE;
        // SAFETY: pops what `enter` pushed on this thread: guards cannot leave it, and nest.
        unsafe { (self.driver.functions.ctx_pop_current)(&raw mut popped.0) };
    }
}

fn find(driver: &Driver, ordinal: usize) -> Result<c_int> {
    let mut count = 0;
    // SAFETY: writes one number.
    let code = unsafe { (driver.functions.device_get_count)(&raw mut count) };
    driver.check(code, "cuDeviceGetCount")?;
    if count < 1 {
        return Err(Error::plain(Status::NoDevice, "the driver shows no GPU (CUDA_VISIBLE_DEVICES?)"));
    }
    let number = c_int::try_from(ordinal).ok().filter(|number| *number < count).ok_or_else(|| {
        Error::new(Status::Value, "device_ordinal", format!("less than {count}, the visible GPUs"), ordinal)
    })?;
    let mut id = 0;
    // SAFETY: writes one number.
    let code = unsafe { (driver.functions.device_get)(&raw mut id, number) };
    driver.check(code, "cuDeviceGet")?;
    Ok(id)
}

fn properties(driver: &Driver, id: c_int) -> Result<Properties> {
    let attribute = |which: c_int| -> Result<u32> {
        let mut value = 0;
        // SAFETY: writes one number; `id` came from the driver.
        let code = unsafe { (driver.functions.device_get_attribute)(&raw mut value, which, id) };
        driver.check(code, "cuDeviceGetAttribute")?;
        Ok(u32::try_from(value).unwrap_or(0))
    };
    let mut name: [c_char; NAME_BYTES as usize] = [0; NAME_BYTES as usize];
    // SAFETY: writes at most one byte less than the length told, and NUL.
    let code = unsafe { (driver.functions.device_get_name)(name.as_mut_ptr(), NAME_BYTES - 1, id) };
    driver.check(code, "cuDeviceGetName")?;
    let mut memory_bytes = 0;
    // SAFETY: writes one number.
    let code = unsafe { (driver.functions.device_total_mem)(&raw mut memory_bytes, id) };
    driver.check(code, "cuDeviceTotalMem")?;
    // SAFETY: the last byte was not offered to the driver and is NUL.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    Ok(Properties {
        name,
        capability: (attribute(CAPABILITY_MAJOR)?, attribute(CAPABILITY_MINOR)?),
        num_sms: attribute(NUM_SMS)?,
        max_shared_bytes: attribute(MAX_SHARED_OPTIN)?,
        memory_bytes: memory_bytes as u64,
    })
}

const NAME_BYTES: c_int = 128;
// CU_DEVICE_ATTRIBUTE_* of cuda.h.
const NUM_SMS: c_int = 16;
const CAPABILITY_MAJOR: c_int = 75;
const CAPABILITY_MINOR: c_int = 76;
const MAX_SHARED_OPTIN: c_int = 97;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::fake::Fake;

    #[test]
    fn a_device_tells_what_the_driver_told() {
        let device = Device::open_on(Fake::in_mode("").driver(), 0).unwrap();
        let properties = device.properties();
        assert_eq!((properties.capability, properties.num_sms), ((9, 0), 132));
        assert_eq!(properties.max_shared_bytes, 232_448);
        assert!(properties.name.contains("fake") && properties.memory_bytes > 1 << 30);
        assert_eq!(device.ordinal(), 0);
    }

    #[test]
    fn a_gpu_that_is_not_there_is_refused() {
        let error = Device::open_on(Fake::in_mode("").driver(), 1).unwrap_err();
        assert_eq!(error.status(), Status::Value);
        let error = Device::open_on(Fake::in_mode("count0").driver(), 0).unwrap_err();
        assert_eq!(error.status(), Status::NoDevice);
    }

    #[test]
    fn the_callers_context_is_current_again_after_the_guard() {
        let fake = Fake::in_mode("");
        let device = Device::open_on(fake.driver(), 0).unwrap();
        let depth = || fake.number(c"fake_context_depth");
        {
            let _outer = device.enter().unwrap();
            let _inner = device.enter().unwrap();
            assert_eq!(depth(), 2);
        }
        assert_eq!(depth(), 0);
    }

    #[test]
    fn a_forked_child_releases_nothing() {
        let fake = Fake::in_mode("");
        let mut driver = Driver::load(&fake.path).unwrap();
        driver.belongs_to_another_process();
        drop(Device::open_on(Box::leak(Box::new(driver)), 0).unwrap());
        assert_eq!(fake.calls(c"cuDevicePrimaryCtxRelease_v2"), 0);
    }

    #[test]
    fn a_context_is_released_as_often_as_it_is_retained() {
        let fake = Fake::in_mode("");
        let device = Device::open_on(fake.driver(), 0).unwrap();
        drop((Device::open_on(fake.driver(), 0).unwrap(), device));
        assert_eq!(
            (fake.calls(c"cuDevicePrimaryCtxRetain"), fake.calls(c"cuDevicePrimaryCtxRelease_v2")),
            (2, 2)
        );
    }
}
