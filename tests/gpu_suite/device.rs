//! Where a step runs: the library's context for the CPU or a GPU, and memory there.

use compactattn::capi::*;

use super::driver::{Cuda, Handle};

/// One context of the library.
pub(crate) struct Device {
    pub(crate) context: *mut compactattn_context,
    /// None on the CPU.
    pub(crate) cuda: Option<Cuda>,
}

// SAFETY: the library lets any number of threads use a context.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// Why there is no device.
pub(crate) enum Missing {
    /// This machine or this build has no GPU: E_NO_DRIVER, E_NO_DEVICE or E_NOT_BUILT.
    NoGpu(String),
    /// Anything else is a fault.
    Fault(String),
}

impl Device {
    pub(crate) fn cpu() -> Result<Self, Missing> {
        let context = create(compactattn_device_kind::COMPACTATTN_DEVICE_CPU)?;
        Ok(Self { context, cuda: None })
    }

    pub(crate) fn gpu() -> Result<Self, Missing> {
        let context = create(compactattn_device_kind::COMPACTATTN_DEVICE_CUDA)?;
        let cuda = Cuda::open().map_err(Missing::Fault)?;
        Ok(Self { context, cuda: Some(cuda) })
    }

    /// For each thread that uses the device, once.
    pub(crate) fn enter(&self) {
        if let Some(cuda) = &self.cuda {
            cuda.enter();
        }
    }

    pub(crate) fn new_stream(&self) -> Handle {
        self.cuda.as_ref().map_or(std::ptr::null_mut(), Cuda::new_stream)
    }

    pub(crate) fn sync(&self) {
        if let Some(cuda) = &self.cuda {
            cuda.sync();
        }
    }

    pub(crate) fn describe(&self) -> String {
        self.cuda.as_ref().map_or("CPU".into(), Cuda::describe)
    }

    pub(crate) fn close(self) {
        assert_eq!(compactattn_context_destroy(self.context), compactattn_status::COMPACTATTN_OK);
    }
}

fn create(kind: compactattn_device_kind) -> Result<*mut compactattn_context, Missing> {
    use compactattn_status as status;
    let desc = compactattn_context_desc {
        struct_size: struct_size::<compactattn_context_desc>(),
        abi_version: compactattn_abi_version(),
        device_kind: kind as i32,
        device_ordinal: 0,
        num_threads: 1,
        reserved: 0,
    };
    let mut context = std::ptr::null_mut();
    // SAFETY: both point to locals.
    match unsafe { compactattn_context_create(&raw const desc, &raw mut context) } {
        status::COMPACTATTN_OK => Ok(context),
        status::COMPACTATTN_E_NO_DRIVER
        | status::COMPACTATTN_E_NO_DEVICE
        | status::COMPACTATTN_E_NOT_BUILT => Err(Missing::NoGpu(last_error())),
        _ => Err(Missing::Fault(last_error())),
    }
}

impl Device {
    pub(super) fn allocate(&self, bytes: usize) -> u64 {
        match &self.cuda {
            Some(cuda) => cuda.alloc(bytes),
            // SAFETY: the size is not 0.
            None => (unsafe { std::alloc::alloc(host_layout(bytes)) }).expose_provenance() as u64,
        }
    }

    pub(super) fn release(&self, base: u64, bytes: usize) {
        match &self.cuda {
            _ if bytes == 0 => {}
            Some(cuda) => cuda.free(base),
            // SAFETY: allocated with the same layout.
            None => unsafe { std::alloc::dealloc(host(base), host_layout(bytes)) },
        }
    }

    pub(super) fn write(&self, to: u64, from: &[u8]) {
        match &self.cuda {
            _ if from.is_empty() => {}
            Some(cuda) => cuda.upload(to, from),
            // SAFETY: Memory asks for ranges of its own allocations only.
            None => unsafe { host(to).copy_from_nonoverlapping(from.as_ptr(), from.len()) },
        }
    }

    pub(super) fn read(&self, from: u64, to: &mut [u8]) {
        match &self.cuda {
            _ if to.is_empty() => {}
            Some(cuda) => cuda.download(from, to),
            // SAFETY: as above.
            None => unsafe { to.as_mut_ptr().copy_from_nonoverlapping(host(from), to.len()) },
        }
    }
}

impl Device {
    /// Copies within the device, on `stream` where there are streams.
    pub(super) fn copy(&self, to: u64, from: u64, bytes: usize, stream: Option<Handle>) {
        match (&self.cuda, stream) {
            (Some(cuda), Some(stream)) => cuda.copy_on(to, from, bytes, stream),
            // SAFETY: callers pass two allocations of that size.
            _ => unsafe { host(to).copy_from_nonoverlapping(host(from), bytes) },
        }
    }

    /// Sets every byte.
    pub(super) fn fill(&self, to: u64, byte: u8, bytes: usize) {
        match &self.cuda {
            _ if bytes == 0 => {}
            Some(cuda) => cuda.fill(to, byte, bytes),
            // SAFETY: callers pass an address within their own allocation that holds as many bytes.
            None => unsafe { host(to).write_bytes(byte, bytes) },
        }
    }
}

fn host(address: u64) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(address as usize)
}

pub(super) const ALIGNMENT: usize = 256;

fn host_layout(bytes: usize) -> std::alloc::Layout {
    std::alloc::Layout::from_size_align(bytes, ALIGNMENT).expect("a small size")
}

/// This thread's last message of the library.
pub(crate) fn last_error() -> String {
    let mut buf = [0_u8; 512];
    // SAFETY: `buf` holds 512 bytes.
    let len = unsafe { compactattn_last_error(buf.as_mut_ptr().cast(), buf.len()) };
    String::from_utf8_lossy(&buf[..len.min(buf.len())]).into_owned()
}

pub(crate) fn struct_size<T>() -> u32 {
    size_of::<T>() as u32
}
