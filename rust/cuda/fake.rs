//! The fake driver of tests/gpu/counting_driver.c, compiled once a test process; each test gets a copy of its own.

use std::ffi::{CStr, CString, c_char, c_void};
use std::io::Write;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::process::Command;
use std::sync::{Arc, OnceLock};

use super::context::Context;
use super::device::Device;
use super::driver::Driver;
use super::images::Image;
use super::symbols;

/// One copy of the library: its state is shared with no other test.
#[derive(Debug)]
pub(crate) struct Fake {
    /// For [`Driver::load`].
    pub(crate) path: CString,
    library: *mut c_void,
    driver: OnceLock<&'static Driver>,
}

impl Fake {
    /// A copy that misbehaves as `mode` says: a word of counting_driver.c, or "" for one GPU of 9.0 that works.
    pub(crate) fn in_mode(mode: &str) -> Self {
        let path = in_memory(binary());
        // SAFETY: `path` ends in NUL; the fake has no constructors.
        let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        assert!(!library.is_null(), "the fake driver does not load");
        let this = Self { path, library, driver: OnceLock::new() };
        this.set_mode(mode);
        this
    }

    /// From now on it misbehaves so.
    pub(crate) fn set_mode(&self, mode: &str) {
        let mode = CString::new(mode).unwrap();
        let set = self.find(c"fake_set_mode");
        // SAFETY: the signature in counting_driver.c.
        let set = unsafe { std::mem::transmute::<*mut c_void, extern "C" fn(*const c_char)>(set) };
        set(mode.as_ptr());
    }

    /// The driver, loaded.
    pub(crate) fn driver(&self) -> &'static Driver {
        self.driver.get_or_init(|| Box::leak(Box::new(Driver::load(&self.path).unwrap())))
    }

    /// How often one driver function was called.
    pub(crate) fn calls(&self, function: &CStr) -> u64 {
        let calls = self.find(c"fake_calls");
        // SAFETY: the signature in counting_driver.c.
        let calls = unsafe { std::mem::transmute::<*mut c_void, extern "C" fn(*const c_char) -> u64>(calls) };
        calls(function.as_ptr())
    }

    /// How often any was.
    pub(crate) fn all_calls(&self) -> u64 {
        self.calls(c"*")
    }

    /// What one of the fake's own functions without arguments returns.
    pub(crate) fn number(&self, function: &CStr) -> usize {
        let function = self.find(function);
        // SAFETY: the signature in counting_driver.c.
        let function = unsafe { std::mem::transmute::<*mut c_void, extern "C" fn() -> usize>(function) };
        function()
    }

    /// Launches so far: name, grid, threads, dynamic shared memory.
    pub(crate) fn launches(&self) -> Vec<String> {
        let launch = self.find(c"fake_launch");
        // SAFETY: the signature in counting_driver.c.
        let launch =
            unsafe { std::mem::transmute::<*mut c_void, extern "C" fn(usize) -> *const c_char>(launch) };
        (0..self.number(c"fake_num_launches"))
            // SAFETY: the fake's own strings, which end in NUL and stay.
            .map(|index| unsafe { CStr::from_ptr(launch(index)) }.to_string_lossy().into_owned())
            .collect()
    }

    fn find(&self, symbol: &CStr) -> *mut c_void {
        // SAFETY: opened in `in_mode`, never closed.
        unsafe { symbols::find(self.library, symbol) }.unwrap()
    }
}

/// A fatbin as far as its header goes; the fake driver reads `contents`: kernels and the sizes of their parameters.
pub(crate) fn fatbin(contents: &str) -> &'static [u8] {
    let mut bytes = [0x50, 0xED, 0x55, 0xBA, 1, 0, 16, 0].to_vec();
    bytes.extend((contents.len() as u64 + 1).to_le_bytes());
    bytes.extend(contents.as_bytes());
    bytes.push(0);
    bytes.leak()
}

/// A context of that driver, with every kernel of a build for its GPU.
pub(crate) fn context(fake: &Fake) -> Arc<Context> {
    let device = Device::open_on(fake.driver(), 0).unwrap();
    let arch = if device.properties().capability == (9, 0) { "sm_90a" } else { "sm_80" };
    let maps = (arch == "sm_90a").then_some(["128,128,128,296", "128,128,128,256,296,88"]);
    let mut kernels: Vec<(String, &str)> = ALONE.map(|(name, params)| (name.to_owned(), params)).to_vec();
    for dtype in ["bf16", "fp16"] {
        kernels.extend(TYPED.map(|(name, params)| (format!("{name}_{dtype}"), params)));
        let over_e4m3 = ["cells_read", "cells_read_candidates", "cells_pool"];
        kernels.extend(over_e4m3.map(|name| (format!("{name}_{dtype}_e4m3"), "488,4")));
        for name in over_e4m3.iter().filter(|_| maps.is_none()) {
            kernels.push((format!("{name}_small_{dtype}_d256"), "488,4"));
        }
        if let Some([params, corrected]) = maps {
            kernels.push((format!("attend_sm90_{dtype}_d128"), params));
            kernels.push((format!("attend_sm90_{dtype}_d128_means"), corrected));
        }
        for dim in [64, 128].iter().filter(|_| maps.is_some()) {
            kernels.push((format!("flashprefill_sm90_{dtype}_d{dim}"), "128,488"));
        }
        let cells = ["cells_read", "cells_read_candidates", "cells_read_pairs"];
        let cells = cells.map(|name| (format!("{name}_sm90_{dtype}_d128"), "128,488,4"));
        kernels.extend(cells.into_iter().filter(|_| maps.is_some()));
        for dim in [64, 96, 128, 256] {
            kernels.push((format!("attend_sm80_{dtype}_d{dim}"), "296"));
            kernels.push((format!("attend_sm80_{dtype}_d{dim}_means"), "296,88"));
        }
        for dim in [64, 128] {
            kernels.push((format!("attend_sm80_{dtype}_e4m3_d{dim}"), "296"));
            kernels.push((format!("attend_sm80_{dtype}_e4m3_d{dim}_means"), "296,88"));
        }
    }
    let described = kernels.iter().map(|(name, params)| format!(" compactattn_{name}:{params};"));
    let fatbin = fatbin(&format!("FAKE{}", described.collect::<String>()));
    let names = kernels.iter().map(|(name, _)| &*format!("compactattn_{name}").leak());
    let image = Image { unit: "all.cu", arch, kernels: names.collect::<Vec<_>>().leak(), fatbin };
    Arc::new(Context::on(device, &[image]).unwrap())
}

/// Kernels with the bytes of their parameters: `Step` 488, `GateParams` 56, `AttendParams` 296, `Means` 72, maps 128.
const ALONE: [(&str, &str); 20] = [
    ("check_lists", "488,8,8"),
    ("plan_spans", "488"),
    ("keep_rows", "488,4"),
    ("union_table", "488,4"),
    ("union_table_wide", "488,4"),
    ("table", "488"),
    ("export_padded", "488,32"),
    ("export_counts", "488,32"),
    ("export_starts", "32"),
    ("export_csr", "488,32"),
    ("plan_work", "488"),
    ("fill_scores", "488,4"),
    ("cells_mass", "488,4"),
    ("two_level_mass", "488,4"),
    ("two_level_candidates", "488"),
    ("cells_lists", "488,12"),
    ("mass_lists", "488,12"),
    ("mass_lists_short", "488,12"),
    ("flashprefill_relate", "488"),
    ("summaries_e4m3", "488,8,8,8,4,4"),
];
/// One for each 16-bit type.
const TYPED: [(&str, &str); 14] = [
    ("cells_read", "488,4"),
    ("cells_read_candidates", "488,4"),
    ("cells_pool", "488,4"),
    ("pooled_lists", "488,12"),
    ("sample_rows", "488"),
    ("sample_rows_held", "488"),
    ("flashprefill", "488"),
    ("xattention", "488"),
    ("xattention_mass", "488"),
    ("attn_gate_keys", "488,56"),
    ("attn_gate", "488,56"),
    ("summaries", "488,8,8,8,4,4"),
    ("merge", "136"),
    ("plan_work_means", "488,88"),
];

/// A file of its own for each copy, because the loader opens one file only once; it stays open, so that its name
/// stays taken.
fn in_memory(binary: &[u8]) -> CString {
    // SAFETY: the name ends in NUL.
    let fd = unsafe { libc::memfd_create(c"fake_driver".as_ptr(), 0) };
    assert!(fd >= 0);
    // SAFETY: just made, owned by nobody else.
    let mut file = unsafe { std::fs::File::from_raw_fd(fd) };
    file.write_all(binary).unwrap();
    CString::new(format!("/proc/self/fd/{}", file.into_raw_fd())).unwrap()
}

fn binary() -> &'static [u8] {
    static BINARY: OnceLock<Vec<u8>> = OnceLock::new();
    BINARY.get_or_init(|| {
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/gpu/counting_driver.c");
        let out = format!("{}/counting_driver-{}.so", env!("OUT_DIR"), std::process::id());
        let mut cc = Command::new("cc");
        cc.args(["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]);
        let status = cc.args(["-o", &out, source, "-ldl"]).status().unwrap();
        assert!(status.success(), "cc: {status}");
        let binary = std::fs::read(&out).unwrap();
        std::fs::remove_file(&out).unwrap();
        binary
    })
}
