//! Memory for what a plan keeps, and what an address of the caller's is.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::Arc;

use bytemuck::{AnyBitPattern, NoUninit};

use super::device::Device;
use super::symbols::Address;
use crate::error::{Error, Result, Status};
use crate::sync::{AtomicU64, Ordering};

/// GPU memory that is freed with this; its contents are undefined until written.
#[derive(Debug)]
pub struct DeviceBuffer {
    device: Arc<Device>,
    address: Address,
    len_bytes: usize,
}

impl DeviceBuffer {
    /// `len_bytes` on `device`, at a multiple of 256; 0 bytes lie at address 0. Not allowed during a capture.
    ///
    /// # Errors
    /// [`Status::OutOfMemory`] and others of the driver.
    pub(crate) fn new(device: &Arc<Device>, len_bytes: usize) -> Result<Self> {
        let mut address = 0;
        if len_bytes > 0 {
            let _entered = device.enter()?;
            // SAFETY: writes one address.
            let code = unsafe { (device.driver().functions.mem_alloc)(&raw mut address, len_bytes) };
            device.driver().check(code, &format!("cuMemAlloc of {len_bytes} bytes"))?;
        }
        Ok(Self { device: Arc::clone(device), address, len_bytes })
    }

    /// Where it starts, for kernels.
    #[must_use]
    pub fn address(&self) -> Address {
        self.address
    }

    /// Its size.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Copies `from` to `offset_bytes` and waits.
    ///
    /// # Errors
    /// [`Status::Internal`] if it does not fit; those of the driver.
    pub fn upload<T: NoUninit>(&mut self, offset_bytes: usize, from: &[T]) -> Result<()> {
        let from: &[u8] = bytemuck::cast_slice(from);
        let Some(at) = self.place(offset_bytes, from.len())? else { return Ok(()) };
        let _entered = self.device.enter()?;
        // SAFETY: `place` found the bytes inside this buffer; `from` is as long.
        let code =
            unsafe { (self.device.driver().functions.memcpy_htod)(at, from.as_ptr().cast(), from.len()) };
        self.device.driver().check(code, "cuMemcpyHtoD")
    }

    /// Waits for what the legacy stream waits for, and copies from `offset_bytes`.
    ///
    /// # Errors
    /// As [`DeviceBuffer::upload`].
    pub fn download<T: NoUninit + AnyBitPattern>(&self, offset_bytes: usize, into: &mut [T]) -> Result<()> {
        let into: &mut [u8] = bytemuck::cast_slice_mut(into);
        let Some(at) = self.place(offset_bytes, into.len())? else { return Ok(()) };
        let _entered = self.device.enter()?;
        // SAFETY: as in `upload`; every bit pattern is a `T`.
        let code =
            unsafe { (self.device.driver().functions.memcpy_dtoh)(into.as_mut_ptr().cast(), at, into.len()) };
        self.device.driver().check(code, "cuMemcpyDtoH")
    }

    /// The address of a range of this buffer; nothing for an empty one.
    fn place(&self, offset_bytes: usize, len_bytes: usize) -> Result<Option<Address>> {
        let end = offset_bytes.checked_add(len_bytes);
        if end.is_none_or(|end| end > self.len_bytes) {
            let got = format!("{len_bytes} bytes at {offset_bytes}");
            return Err(Error::new(
                Status::Internal,
                "copy",
                format!("at most {} bytes", self.len_bytes),
                got,
            ));
        }
        Ok((len_bytes > 0).then_some(self.address + offset_bytes as Address))
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.address == 0 || !self.device.driver().is_of_this_process() {
            return;
        }
        let Ok(_entered) = self.device.enter() else { return };
        // SAFETY: allocated in `new` and not freed since; the driver waits for work that uses it.
        unsafe { (self.device.driver().functions.mem_free)(self.address) };
    }
}

/// Host memory that kernels write and the host reads without waiting: both sides see whole words of 64 bits, in no order.
#[derive(Debug)]
pub(crate) struct MappedHost {
    device: Arc<Device>,
    host: std::ptr::NonNull<AtomicU64>,
    num_words: usize,
    address: Address,
}

impl MappedHost {
    /// `num_words` zeros. Not allowed during a capture.
    ///
    /// # Errors
    /// [`Status::OutOfMemory`] and others of the driver.
    pub(crate) fn new(device: &Arc<Device>, num_words: usize) -> Result<Self> {
        let driver = device.driver();
        let _entered = device.enter()?;
        let mut host: *mut c_void = std::ptr::null_mut();
        let len_bytes = num_words.max(1) * size_of::<u64>();
        // SAFETY: writes one pointer.
        let code = unsafe { (driver.functions.mem_host_alloc)(&raw mut host, len_bytes, PORTABLE | MAPPED) };
        driver.check(code, "cuMemHostAlloc")?;
        let host = std::ptr::NonNull::new(host.cast::<AtomicU64>())
            .ok_or_else(|| Error::plain(Status::Cuda, "cuMemHostAlloc: NULL"))?;
        let mut this = Self { device: Arc::clone(device), host, num_words, address: 0 };
        this.zero();
        // SAFETY: mapped memory from above; writes one address.
        let code = unsafe {
            (driver.functions.mem_host_get_device_pointer)(&raw mut this.address, host.as_ptr().cast(), 0)
        };
        driver.check(code, "cuMemHostGetDevicePointer")?;
        Ok(this)
    }

    /// The words; a kernel may be writing them.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: as many words, page-aligned, alive while `self` is; atomics may change under the reader.
        unsafe { std::slice::from_raw_parts(self.host.as_ptr(), self.num_words) }
    }

    /// Sets all words to 0, at once and in no order with kernels.
    pub(crate) fn zero(&self) {
        self.words().iter().for_each(|word| word.store(0, Ordering::Relaxed));
    }

    /// Where kernels see it.
    pub(crate) fn address(&self) -> Address {
        self.address
    }
}

// SAFETY: memory of this process, shared as atomics.
unsafe impl Send for MappedHost {}
// SAFETY: as above.
unsafe impl Sync for MappedHost {}

impl Drop for MappedHost {
    fn drop(&mut self) {
        if !self.device.driver().is_of_this_process() {
            return;
        }
        let Ok(_entered) = self.device.enter() else { return };
        // SAFETY: allocated in `new` and not freed since; the driver waits for work that uses it.
        unsafe { (self.device.driver().functions.mem_free_host)(self.host.as_ptr().cast()) };
    }
}

/// What the driver knows of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PointerKind {
    /// Memory of the GPU with that number (or managed memory that was made on it).
    Device(usize),
    /// Pinned host memory.
    PinnedHost,
    /// Nothing the driver allocated or knows: plain host memory, or no memory at all.
    Unknown,
}

/// Asks the driver what `address` is, without touching it; allowed during a capture. The device is entered.
///
/// # Errors
/// Those of the driver.
pub(crate) fn pointer_kind(device: &Device, address: Address) -> Result<PointerKind> {
    let mut memory_type: c_uint = 0;
    let mut ordinal: c_int = -1;
    let mut answers: [*mut c_void; 2] = [(&raw mut memory_type).cast(), (&raw mut ordinal).cast()];
    let questions = [MEMORY_TYPE, DEVICE_ORDINAL];
    let driver = device.driver();
    // SAFETY: two questions and two places of the types that cuda.h gives; the address is not followed.
    let code = unsafe {
        (driver.functions.pointer_get_attributes)(2, questions.as_ptr(), answers.as_mut_ptr(), address)
    };
    driver.check(code, "cuPointerGetAttributes")?;
    Ok(match (memory_type, usize::try_from(ordinal)) {
        (DEVICE | UNIFIED, Ok(ordinal)) => PointerKind::Device(ordinal),
        (HOST, _) => PointerKind::PinnedHost,
        _ => PointerKind::Unknown,
    })
}

// CU_MEMHOSTALLOC_*, CU_POINTER_ATTRIBUTE_*, CU_MEMORYTYPE_* of cuda.h.
const PORTABLE: c_uint = 1;
const MAPPED: c_uint = 2;
const MEMORY_TYPE: c_int = 2;
const DEVICE_ORDINAL: c_int = 9;
const HOST: c_uint = 1;
const DEVICE: c_uint = 2;
const UNIFIED: c_uint = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::fake::Fake;

    #[test]
    fn what_is_uploaded_can_be_downloaded_and_not_beyond_the_end() {
        let fake = Fake::in_mode("");
        let device = Device::open_on(fake.driver(), 0).unwrap();
        let mut buffer = DeviceBuffer::new(&device, 12).unwrap();
        buffer.upload(4, &[7_i32, -3]).unwrap();
        let mut back = [0_i32; 2];
        buffer.download(4, &mut back).unwrap();
        assert_eq!((back, buffer.len_bytes()), ([7, -3], 12));
        assert_eq!(buffer.upload(8, &[1_i32, 2]).unwrap_err().status(), Status::Internal);
        assert_eq!(buffer.download(usize::MAX, &mut back).unwrap_err().status(), Status::Internal);
        drop(buffer);
        assert_eq!((fake.calls(c"cuMemAlloc_v2"), fake.calls(c"cuMemFree_v2")), (1, 1));
        assert_eq!(fake.number(c"fake_context_depth"), 0);
    }

    #[test]
    fn an_empty_buffer_allocates_nothing() {
        let fake = Fake::in_mode("");
        let device = Device::open_on(fake.driver(), 0).unwrap();
        let buffer = DeviceBuffer::new(&device, 0).unwrap();
        buffer.download::<u32>(0, &mut []).unwrap();
        assert_eq!((buffer.address(), fake.calls(c"cuMemAlloc_v2")), (0, 0));
    }

    #[test]
    fn memory_that_runs_out_and_an_allocation_in_a_capture_have_their_statuses() {
        for (mode, status) in [("oom_on_alloc", Status::OutOfMemory), ("capture", Status::Capture)] {
            let device = Device::open_on(Fake::in_mode(mode).driver(), 0).unwrap();
            assert_eq!(DeviceBuffer::new(&device, 8).unwrap_err().status(), status);
            assert_eq!(MappedHost::new(&device, 8).unwrap_err().status(), status);
        }
    }

    #[test]
    fn addresses_are_told_apart() {
        let device = Device::open_on(Fake::in_mode("").driver(), 0).unwrap();
        let buffer = DeviceBuffer::new(&device, 64).unwrap();
        let mapped = MappedHost::new(&device, 4).unwrap();
        let plain = [0_u8; 4];
        let kind = |address: Address| pointer_kind(&device, address).unwrap();
        let _entered = device.enter().unwrap();
        assert_eq!(kind(buffer.address() + 63), PointerKind::Device(0));
        assert_eq!(kind(mapped.address()), PointerKind::PinnedHost);
        assert_eq!(kind(plain.as_ptr().addr() as Address), PointerKind::Unknown);
        assert!(mapped.words().iter().all(|word| word.load(Ordering::Relaxed) == 0));
    }
}
