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

/// Parts of one allocation, each between canaries, with an image on the host; and scratch that never travels.
pub(crate) struct Memory<'a> {
    device: &'a Device,
    base: u64,
    capacity: usize,
    scratch: u64,
    scratch_capacity: usize,
    image: Vec<u8>,
    parts: Vec<Part>,
}

/// A part of [`Memory`]: where it starts in the image, and its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) at: usize,
    pub(crate) len: usize,
}

const CANARY: u8 = 0xA5;
const ALIGNMENT: usize = 256;
/// Of the part of scratch after the workspace that must not change.
const SCRATCH_CANARY: usize = 1024;
/// Beyond every part: an allocation is never full to its last byte, so canaries stand at its end too.
const MARGIN: usize = 256;
/// All bits set: NaN in each float type, -1 in integers.
pub(crate) const POISON: u8 = 0xFF;

impl<'a> Memory<'a> {
    pub(crate) fn new(device: &'a Device) -> Self {
        Self {
            device,
            base: 0,
            capacity: 0,
            scratch: 0,
            scratch_capacity: 0,
            image: Vec::new(),
            parts: Vec::new(),
        }
    }

    pub(crate) fn clear(&mut self) {
        self.image.clear();
        self.image.resize(ALIGNMENT, CANARY);
        self.parts.clear();
    }

    pub(crate) fn add(&mut self, bytes: &[u8]) -> Part {
        let part = Part { at: self.image.len(), len: bytes.len() };
        self.image.extend_from_slice(bytes);
        self.close(part)
    }

    pub(crate) fn add_poison(&mut self, len: usize) -> Part {
        let part = Part { at: self.image.len(), len };
        self.image.resize(part.at + len, POISON);
        self.close(part)
    }

    fn close(&mut self, part: Part) -> Part {
        let end = (self.image.len() + MARGIN).next_multiple_of(ALIGNMENT);
        self.image.resize(end, CANARY);
        self.parts.push(part);
        part
    }

    /// Copies the image to the device; addresses hold from here to the next push.
    pub(crate) fn push(&mut self) {
        if self.image.len() > self.capacity {
            self.device.release(self.base, self.capacity);
            self.capacity = self.image.len().next_power_of_two();
            self.base = self.device.allocate(self.capacity);
        }
        self.device.write(self.base, &self.image);
    }

    /// Copies the device's parts to the image.
    pub(crate) fn pull(&mut self) {
        self.device.sync();
        self.device.read(self.base, &mut self.image);
    }

    /// Writes one part of the image, there and on the device.
    pub(crate) fn set(&mut self, part: Part, bytes: &[u8]) {
        self.image[part.at..part.at + bytes.len()].copy_from_slice(bytes);
        self.device.write(self.base + part.at as u64, bytes);
    }

    /// Poisons one part on the device.
    pub(crate) fn poison(&self, part: Part) {
        self.device.write(self.base + part.at as u64, &vec![POISON; part.len]);
    }

    /// One part as it is on the device now.
    pub(crate) fn get(&self, part: Part) -> Vec<u8> {
        let mut bytes = vec![0; part.len];
        self.device.sync();
        self.device.read(self.base + part.at as u64, &mut bytes);
        bytes
    }

    pub(crate) fn address(&self, part: Part) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut((self.base as usize) + part.at)
    }

    pub(crate) fn bytes(&self, part: Part) -> &[u8] {
        &self.image[part.at..part.at + part.len]
    }

    /// `bytes` of scratch, dirty from earlier calls, with canaries after it.
    pub(crate) fn scratch(&mut self, bytes: usize) -> *mut u8 {
        let wanted = bytes + SCRATCH_CANARY;
        if wanted > self.scratch_capacity {
            self.device.release(self.scratch, self.scratch_capacity);
            self.scratch_capacity = wanted.next_power_of_two();
            self.scratch = self.device.allocate(self.scratch_capacity);
            self.device.write(self.scratch, &vec![POISON; self.scratch_capacity]);
        }
        self.device.write(self.scratch + bytes as u64, &[CANARY; SCRATCH_CANARY]);
        std::ptr::with_exposed_provenance_mut(self.scratch as usize)
    }

    /// Whether everything beside the parts, and after `bytes` of scratch, is as it was. After a pull.
    pub(crate) fn canaries_hold(&self, scratch_bytes: usize) -> bool {
        let mut from = 0;
        let ends = self.parts.iter().map(|part| (part.at, part.at + part.len));
        let whole = ends.chain([(self.image.len(), 0)]).all(|(start, end)| {
            let gap = &self.image[from..start];
            from = end;
            gap.iter().all(|&byte| byte == CANARY)
        });
        let mut after = [0; SCRATCH_CANARY];
        self.device.read(self.scratch + scratch_bytes as u64, &mut after);
        whole && after == [CANARY; SCRATCH_CANARY]
    }
}

impl Drop for Memory<'_> {
    fn drop(&mut self) {
        // After a fault of the device every call fails; a panic while panicking would hide the first one.
        if !std::thread::panicking() {
            self.device.release(self.base, self.capacity);
            self.device.release(self.scratch, self.scratch_capacity);
        }
    }
}

impl Device {
    fn allocate(&self, bytes: usize) -> u64 {
        match &self.cuda {
            Some(cuda) => cuda.alloc(bytes),
            // SAFETY: the size is not 0.
            None => (unsafe { std::alloc::alloc(host_layout(bytes)) }).expose_provenance() as u64,
        }
    }

    fn release(&self, base: u64, bytes: usize) {
        match &self.cuda {
            _ if bytes == 0 => {}
            Some(cuda) => cuda.free(base),
            // SAFETY: allocated with the same layout.
            None => unsafe { std::alloc::dealloc(host(base), host_layout(bytes)) },
        }
    }

    fn write(&self, to: u64, from: &[u8]) {
        match &self.cuda {
            Some(cuda) => cuda.upload(to, from),
            // SAFETY: Memory asks for ranges of its own allocations only.
            None => unsafe { host(to).copy_from_nonoverlapping(from.as_ptr(), from.len()) },
        }
    }

    fn read(&self, from: u64, to: &mut [u8]) {
        match &self.cuda {
            Some(cuda) => cuda.download(from, to),
            // SAFETY: as above.
            None => unsafe { to.as_mut_ptr().copy_from_nonoverlapping(host(from), to.len()) },
        }
    }
}

fn host(address: u64) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(address as usize)
}

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
