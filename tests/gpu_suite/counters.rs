//! What a pass, and tables for other kernels, ask of the driver, once it is warm: launches, and nothing that waits or allocates.
//!
//! The library is given a driver that counts its calls and hands them on (COMPACTATTN_LIBCUDA names it); this test's
//! own binding goes to the driver itself, so only the library's calls are counted.

use std::ffi::{CStr, CString, c_char, c_int, c_void};

use compactattn::settings::Selector;
use compactattn::types::Dtype;

use super::abi::Refusal;
use super::check::{Worker, given};
use super::device::Device;
use super::memory::Packing;
use super::scenes;
use super::step::{Done, Step};
use crate::common::case::{Case, Lens};
use crate::common::rng::Rng;

pub(crate) const WANTED: &str =
    "COMPACTATTN_LIBCUDA must name tests/gpu/counting_driver.c, built, and FAKE_CUDA say forward";

/// Launches, and questions that neither wait nor allocate. A warm pass makes no other call.
const ALLOWED: [&str; 10] = [
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cuMemsetD32Async",
    "cuMemsetD8Async",
    "cuPointerGetAttributes",
    "cuTensorMapEncodeTiled",
    "cuCtxPushCurrent",
    "cuCtxPopCurrent",
    "cuStreamGetCtx",
    "cuStreamIsCapturing",
];
/// Of those, launches.
const LAUNCHES: std::ops::Range<usize> = 0..2;

/// What a message can name of all that is not allowed.
const FORBIDDEN: [&str; 14] = [
    "cuMemAlloc",
    "cuMemAllocAsync",
    "cuMemHostAlloc",
    "cuMemFree",
    "cuMemFreeAsync",
    "cuMemFreeHost",
    "cuStreamSynchronize",
    "cuCtxSynchronize",
    "cuEventSynchronize",
    "cuMemcpyHtoD",
    "cuMemcpyDtoH",
    "cuModuleLoadData",
    "cuFuncSetAttribute",
    "cuFuncLoad",
];

/// Whether the counting driver is there.
pub(crate) fn available() -> bool {
    Counting::open().is_ok()
}

/// Memory of the GPU, and of the host for it, that the library holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) blocks: usize,
    pub(crate) bytes: usize,
}

/// As the counting driver tells it.
pub(crate) fn held() -> Option<Held> {
    let counting = Counting::open().ok()?;
    Some(Held { blocks: counting.number(c"fake_blocks")?, bytes: counting.number(c"fake_bytes")? })
}

pub(crate) fn run(device: &Device) -> bool {
    let counted = Counting::open().and_then(|counting| {
        counting.catches_a_wait()?;
        let mut offered = 0;
        for selector in scenes::SELECTORS {
            for d in [64, 128] {
                match passes(device, &counting, selector, d) {
                    Ok(()) => offered += 1,
                    Err(Refusal::Unsupported(why)) => println!("  not offered here: {why}"),
                    Err(Refusal::Fault(why)) => {
                        return Err(format!("{} d{d}: {why}", selector.name()));
                    }
                }
            }
        }
        if offered == 0 { Err("no selector is offered".into()) } else { Ok(()) }
    });
    if let Err(why) = &counted {
        println!("  {why}");
    }
    counted.is_ok()
}

/// Three warm passes between two readings of the counters.
fn passes(device: &Device, counting: &Counting, selector: Selector, d: usize) -> Result<(), Refusal> {
    let mut worker = Worker::new(device, Packing::Together);
    let shape = scenes::shape([8, 2], d, 64, Dtype::Bf16);
    let lens = [Lens { q: 100, kv: 700 }, Lens { q: 1, kv: 500 }];
    let case = Case::with(&mut Rng::new(3), shape, scenes::settings(selector, 32), &lens);
    let given = given(&case, &mut Rng::new(3));
    worker.judged(&case, &given)?;
    let stream = worker.stream;
    let step = Step::new(device, &mut worker.memory, &case, &given, stream)?;
    warm_passes(device, counting, &step).map_err(Refusal::Fault)
}

fn warm_passes(device: &Device, counting: &Counting, step: &Step) -> Done {
    step.update_summaries()?;
    step.forward()?;
    step.exports(step.stream)?;
    device.sync();
    let read = || (ALLOWED.map(|name| counting.calls(name)), FORBIDDEN.map(|name| counting.calls(name)));
    let (all, before) = (counting.calls_of("*"), read());
    for _ in 0..3 {
        step.forward()?;
        step.exports(step.stream)?;
    }
    let (all, after) = (counting.calls_of("*") - all, read());
    device.sync();
    let made: Vec<u64> = after.0.iter().zip(before.0).map(|(after, before)| after - before).collect();
    if all != made.iter().sum::<u64>() {
        let named: Vec<&str> =
            (0..FORBIDDEN.len()).filter(|&i| after.1[i] != before.1[i]).map(|i| FORBIDDEN[i]).collect();
        return Err(format!("3 passes made {all} calls, {made:?} of them allowed; others: {named:?}"));
    }
    // No launches: the library does not go through this driver, and what was counted says nothing.
    let launches: u64 = made[LAUNCHES].iter().sum();
    if launches < 3 { Err(format!("3 passes made {launches} launches")) } else { Ok(()) }
}

/// The counting driver, as the library sees it.
struct Counting {
    library: *mut c_void,
    calls: unsafe extern "C" fn(*const c_char) -> u64,
}

impl Counting {
    fn open() -> Result<Self, String> {
        let path = std::env::var("COMPACTATTN_LIBCUDA").map_err(|_| WANTED)?;
        let path = CString::new(path).map_err(|e| e.to_string())?;
        // SAFETY: the path ends in NUL; the library, once loaded by the other name, is the same one.
        let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        let found = lookup(library, c"fake_calls").ok_or(WANTED)?;
        // SAFETY: the counting driver's own function, of this signature.
        let calls =
            unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*const c_char) -> u64>(found) };
        Ok(Self { library, calls })
    }

    fn number(&self, name: &CStr) -> Option<usize> {
        let found = lookup(self.library, name)?;
        // SAFETY: the counting driver's functions of these names have this signature.
        let of = unsafe { std::mem::transmute::<*mut c_void, extern "C" fn() -> usize>(found) };
        Some(of())
    }

    /// Calls of the function so far, whichever version of it.
    fn calls(&self, name: &str) -> u64 {
        [name.to_owned(), format!("{name}_v2")].iter().map(|name| self.calls_of(name)).sum()
    }

    fn calls_of(&self, name: &str) -> u64 {
        let name = CString::new(name).unwrap_or_default();
        // SAFETY: the name ends in NUL.
        unsafe { (self.calls)(name.as_ptr()) }
    }

    /// One wait, made through this driver as the library would, is counted.
    fn catches_a_wait(&self) -> Done {
        const NAME: &str = "cuStreamSynchronize";
        let found = lookup(self.library, c"cuStreamSynchronize");
        let found = found.ok_or("the counting driver has no cuStreamSynchronize")?;
        // SAFETY: the driver's function of that name has this signature.
        let wait =
            unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_void) -> c_int>(found) };
        let before = self.calls(NAME);
        // SAFETY: NULL is the default stream.
        let status = unsafe { wait(std::ptr::null_mut()) };
        let counted = self.calls(NAME) - before;
        let what = format!("a wait (status {status}) was counted {counted} times");
        if counted == 1 && status == 0 { Ok(()) } else { Err(what) }
    }
}

fn lookup(library: *mut c_void, name: &CStr) -> Option<*mut c_void> {
    if library.is_null() {
        return None;
    }
    // SAFETY: the library is open, the name ends in NUL.
    let found = unsafe { libc::dlsym(library, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}
