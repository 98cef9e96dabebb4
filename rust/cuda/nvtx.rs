//! NVTX ranges without NVIDIA's headers: the injection protocol of NVTX 3 (`nvtxDetail/nvtxTypes.h` of the toolkit).
//!
//! A profiler names its library in `NVTX_INJECTION64_PATH`. Whoever wants to be watched loads it and calls its
//! `InitializeInjectionNvtx2` with a function that hands out tables; the profiler writes its own functions into them.
//! There is no library of CUDA's between the two, and none is needed.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::sync::atomic::{AtomicPtr, Ordering};

use once_cell::sync::OnceCell;

use super::symbols;
use crate::config::{self, Nvtx};
use crate::error::Result;

/// What became of the wish for ranges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Not wished for.
    Off,
    /// Wished for, and no profiler has said where its library is.
    NoProfiler,
    /// Its library does not take ranges: why.
    Refused(String),
    /// Ranges go to the library of that path.
    On(String),
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::NoProfiler => {
                f.write_str("on, but no profiler is attached: NVTX_INJECTION64_PATH is not set")
            }
            Self::Refused(why) => write!(f, "on, but the profiler takes no ranges: {why}"),
            Self::On(path) => write!(f, "on, to {path}"),
        }
    }
}

/// Attaches to the profiler on the first call of a process; what came of it.
///
/// # Errors
/// [`crate::Status::Config`] for a wish that is neither yes nor no.
pub fn state() -> Result<&'static State> {
    static STATE: OnceCell<State> = OnceCell::new();
    STATE.get_or_try_init(|| {
        let state = attach(&config::nvtx()?);
        if !matches!(state, State::Off | State::On(_)) {
            tracing::warn!(%state, "NVTX");
        }
        Ok(state)
    })
}

/// Opens a range of that name on this thread until the guard goes; nothing where nobody watches.
pub(crate) fn range(name: &'static CStr) -> Option<Range> {
    let profiler = PROFILER.get()?;
    // SAFETY: the profiler's function of this signature; `name` ends in NUL and lives for ever.
    unsafe { (profiler.push)(name.as_ptr()) };
    Some(Range { profiler })
}

/// An open range. Ranges of a thread nest.
#[must_use = "the range lasts as long as this"]
pub(crate) struct Range {
    profiler: &'static Profiler,
}

impl Drop for Range {
    fn drop(&mut self) {
        // SAFETY: the profiler's function of this signature; it closes what `range` opened.
        unsafe { (self.profiler.pop)() };
    }
}

/// The first profiler stays: tables cannot be taken back from one that holds them.
fn attach(wish: &Nvtx) -> State {
    let path = match wish {
        Nvtx::Off => return State::Off,
        Nvtx::NoProfiler => return State::NoProfiler,
        Nvtx::Profiler(path) => path,
    };
    let shown = path.to_string_lossy().into_owned();
    match PROFILER.get_or_try_init(|| load(path)) {
        Ok(_) => State::On(shown),
        Err(why) => State::Refused(format!("{shown} {why}")),
    }
}

fn load(path: &CStr) -> std::result::Result<Profiler, &'static str> {
    // SAFETY: `path` ends in NUL; a profiler's constructors expect to be run by `dlopen`. It is never closed.
    let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if library.is_null() {
        return Err("could not be loaded");
    }
    // SAFETY: opened above.
    let entry = unsafe { symbols::find(library, c"InitializeInjectionNvtx2") };
    let entry = entry.ok_or("has no InitializeInjectionNvtx2")?;
    // SAFETY: not null; the signature that NVTX gives this name.
    let entry = unsafe { std::mem::transmute::<*mut c_void, Initialize>(entry) };
    // SAFETY: `export_table` answers as the protocol wants, from tables that live for ever.
    if unsafe { entry(export_table) } == 0 {
        return Err("refused to start");
    }
    let [push, pop] = [RANGE_PUSH, RANGE_POP].map(|slot| SLOTS[CORE][slot - 1].load(Ordering::Acquire));
    if push.is_null() || pop.is_null() {
        return Err("has attached to no ranges");
    }
    // SAFETY: not null; what a profiler writes into this slot has this signature.
    let push = unsafe { std::mem::transmute::<*mut c_void, Push>(push) };
    // SAFETY: as above.
    let pop = unsafe { std::mem::transmute::<*mut c_void, Pop>(pop) };
    Ok(Profiler { push, pop })
}

/// The profiler's functions; empty where stages are not watched.
static PROFILER: OnceCell<Profiler> = OnceCell::new();

struct Profiler {
    push: Push,
    pop: Pop,
}

type Push = unsafe extern "C" fn(*const c_char) -> c_int;
type Pop = unsafe extern "C" fn() -> c_int;
type ExportTable = extern "C" fn(u32) -> *const c_void;
type Initialize = unsafe extern "C" fn(ExportTable) -> c_int;
/// Where a profiler writes one function.
type Slot = AtomicPtr<c_void>;
/// As the profiler walks it: by the function's number.
type Table = [Option<&'static Slot>; MOST_FUNCTIONS + 1];

/// `NvtxExportTableCallbacks`.
#[repr(C)]
struct Callbacks {
    struct_bytes: usize,
    table_of_module: unsafe extern "C" fn(c_int, *mut *const Table, *mut c_uint) -> c_int,
}

/// `NvtxExportTableVersionInfo`.
#[repr(C)]
struct VersionInfo {
    struct_bytes: usize,
    version: u32,
    reserved: u32,
    set_version: extern "C" fn(u32),
}

extern "C" fn export_table(id: u32) -> *const c_void {
    match id {
        CALLBACKS_ID => (&raw const CALLBACKS).cast(),
        VERSION_ID => (&raw const VERSION).cast(),
        _ => std::ptr::null(),
    }
}

/// # Safety
/// Both pointers are NULL or writable.
unsafe extern "C" fn table_of_module(module: c_int, table: *mut *const Table, size: *mut c_uint) -> c_int {
    let index = usize::try_from(module).ok().and_then(|module| module.checked_sub(1));
    let Some((functions, of_module)) = index.and_then(|i| NUM_FUNCTIONS.get(i).zip(TABLES.get(i))) else {
        return 0;
    };
    if !size.is_null() {
        // SAFETY: not NULL, and writable by this function's contract.
        unsafe { size.write(*functions) };
    }
    if !table.is_null() {
        // SAFETY: as above.
        unsafe { table.write(of_module) };
    }
    1
}

extern "C" fn set_version(_: u32) {}

/// A slot for each function of each module. Profilers fill them all, and some look at no answer but a table: of functions
/// that nothing here calls, too.
static SLOTS: [[Slot; MOST_FUNCTIONS - 1]; MODULES] =
    [const { [const { AtomicPtr::new(std::ptr::null_mut()) }; MOST_FUNCTIONS - 1] }; MODULES];
/// Number 0 is no function; the end is marked by one more nothing.
static TABLES: [Table; MODULES] = {
    let mut tables: [Table; MODULES] = [[None; MOST_FUNCTIONS + 1]; MODULES];
    let mut module = 0;
    while module < MODULES {
        let mut number = 1;
        while number < NUM_FUNCTIONS[module] as usize {
            tables[module][number] = Some(&SLOTS[module][number - 1]);
            number += 1;
        }
        module += 1;
    }
    tables
};
static CALLBACKS: Callbacks = Callbacks { struct_bytes: size_of::<Callbacks>(), table_of_module };
static VERSION: VersionInfo =
    VersionInfo { struct_bytes: size_of::<VersionInfo>(), version: 3, reserved: 0, set_version };

// NVTX_ETID_*, NVTX_CB_MODULE_*, NVTX_CBID_CORE_* of nvtxTypes.h; they are part of an ABI and do not change.
const CALLBACKS_ID: u32 = 1;
const VERSION_ID: u32 = 3;
const RANGE_PUSH: usize = 9;
const RANGE_POP: usize = 11;
/// Core, CUDA, OpenCL, CUDA runtime, core 2 (domains), sync: modules 1 to 6.
const MODULES: usize = 6;
const CORE: usize = 0;
/// NVTX_CBID_*_SIZE of each module: its functions and number 0.
const NUM_FUNCTIONS: [c_uint; MODULES] = [16, 9, 15, 7, 16, 7];
const MOST_FUNCTIONS: usize = 16;

#[cfg(test)]
#[path = "nvtx_tests.rs"]
pub(crate) mod tests;
