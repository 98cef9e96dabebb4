use std::ffi::CString;
use std::process::Command;

use super::*;

#[test]
fn a_profiler_that_takes_no_ranges_says_why() {
    assert_eq!(attach(&Nvtx::Off), State::Off);
    assert_eq!(attach(&Nvtx::NoProfiler), State::NoProfiler);
    for (library, why) in [
        (c"/nowhere/profiler.so".to_owned(), "could not be loaded"),
        (c"libc.so.6".to_owned(), "has no InitializeInjectionNvtx2"),
        (profiler("-DFAKE_REFUSES"), "refused to start"),
    ] {
        assert_eq!(load(&library).err(), Some(why), "{library:?}");
    }
}

#[test]
fn what_became_of_the_wish_is_told_in_words() {
    assert_eq!(State::Off.to_string(), "off");
    assert!(State::NoProfiler.to_string().contains("NVTX_INJECTION64_PATH"));
    assert!(State::Refused("x.so refused".to_owned()).to_string().contains("x.so refused"));
    assert_eq!(State::On("x.so".to_owned()).to_string(), "on, to x.so");
}

#[test]
fn tables_are_as_profilers_were_compiled_to_find_them() {
    assert_eq!((size_of::<Callbacks>(), size_of::<VersionInfo>()), (16, 24));
    assert_eq!(size_of::<Table>(), 17 * size_of::<usize>());
    assert!(export_table(2).is_null());
    for (module, functions) in
        [(0, None), (1, Some(16)), (2, Some(9)), (5, Some(16)), (6, Some(7)), (7, None)]
    {
        let (mut table, mut size) = (std::ptr::null(), 0);
        // SAFETY: both are writable.
        let is_there = unsafe { table_of_module(module, &raw mut table, &raw mut size) } == 1;
        assert_eq!(is_there.then_some(size), functions, "{module}");
        // SAFETY: a table of ours where one was given.
        let slots = unsafe { table.as_ref() }.map(|table| table.iter().flatten().count());
        assert_eq!(slots, functions.map(|n| n as usize - 1), "{module}");
    }
}

/// What `body` pushed and popped on this thread, in one line; the profiler stays for the whole test process.
pub(crate) fn ranges_of(body: impl FnOnce()) -> String {
    static ATTACHED: OnceCell<CString> = OnceCell::new();
    let path = ATTACHED.get_or_init(|| profiler("-DFAKE_LISTENS"));
    let attached = attach(&Nvtx::Profiler(path.clone()));
    assert_eq!(attached, State::On(path.to_string_lossy().into_owned()));
    // SAFETY: loaded already, so that this only counts; the name ends in NUL.
    let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    // SAFETY: a live handle.
    let taken = unsafe { symbols::find(library, c"fake_ranges") }.unwrap();
    // SAFETY: the signature in counting_profiler.c.
    let taken = unsafe { std::mem::transmute::<*mut c_void, extern "C" fn() -> *const c_char>(taken) };
    taken();
    body();
    // SAFETY: text of this thread that ends in NUL, until the next call.
    unsafe { CStr::from_ptr(taken()) }.to_string_lossy().into_owned()
}

/// The stand-in of tests/gpu/counting_profiler.c, compiled with `flag`.
fn profiler(flag: &str) -> CString {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/gpu/counting_profiler.c");
    let out = format!("{}/profiler{flag}-{}.so", env!("OUT_DIR"), std::process::id());
    let flags =
        ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-shared", "-fPIC"];
    let status = Command::new("cc").args(flags).args([flag, "-o", &out, source]).status().unwrap();
    assert!(status.success(), "cc: {status}");
    CString::new(out).unwrap()
}
