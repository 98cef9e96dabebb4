//! CUDA contexts through the C ABI on tests/gpu/counting_driver.c, a driver without a GPU. The library loads a driver
//! once a process, so each driver gets a child process.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};
use std::process::Command;

use compactattn::capi::{
    compactattn_abi_version, compactattn_context_create, compactattn_context_desc,
    compactattn_context_destroy, compactattn_device_kind, compactattn_last_error,
    compactattn_status as status,
};

#[test]
fn a_driver_that_cannot_serve_is_told_by_its_status() {
    let driver = driver("whole", &[]);
    for (mode, wanted, text) in [
        ("nodevice", status::COMPACTATTN_E_NO_DEVICE, "CUDA_ERROR_NO_DEVICE (100)"),
        ("count0", status::COMPACTATTN_E_NO_DEVICE, "no GPU"),
        ("init34", status::COMPACTATTN_E_NO_DRIVER, "CUDA_ERROR_STUB_LIBRARY (34)"),
        (
            "old",
            status::COMPACTATTN_E_DRIVER_OLD,
            "wanted one of CUDA 13.0 or newer (release 580), got one of CUDA 12.8",
        ),
        ("mismatch", status::COMPACTATTN_E_DRIVER_OLD, "803"),
    ] {
        assert_context(&driver, mode, 0, wanted, text);
    }
}

#[test]
fn a_driver_that_lacks_a_function_is_an_old_one() {
    let driver = driver("partial", &["-DWITHOUT_FUNC_LOAD"]);
    assert_context(&driver, "", 0, status::COMPACTATTN_E_DRIVER_OLD, "cuFuncLoad");
}

#[test]
fn a_path_without_a_driver_is_named() {
    assert_context(
        Path::new("/nowhere/libcuda.so"),
        "",
        0,
        status::COMPACTATTN_E_NO_DRIVER,
        "/nowhere/libcuda.so",
    );
    assert_context(Path::new("libc.so.6"), "", 0, status::COMPACTATTN_E_NO_DRIVER, "libc.so.6 has no cuInit");
}

#[test]
fn a_gpu_needs_an_ordinal_that_exists_and_kernels_of_its_architecture() {
    let driver = driver("gpus", &[]);
    assert_context(&driver, "", 1, status::COMPACTATTN_E_VALUE, "device_ordinal");
    let built = compactattn::cuda::architectures();
    let wanted = |arch| match (built.is_empty(), built.contains(&arch)) {
        (true, _) => (status::COMPACTATTN_E_NOT_BUILT, "device_kind CPU"),
        (_, true) => (status::COMPACTATTN_OK, ""),
        (_, false) => (status::COMPACTATTN_E_ARCH, "compute capability"),
    };
    for (mode, arch) in [("", "sm_90a"), ("cc80", "sm_80"), ("cc86", "sm_80"), ("cc75", "sm_75")] {
        let (status, text) = wanted(arch);
        assert_context(&driver, mode, 0, status, text);
    }
}

/// The child: makes and destroys a context as its environment says, and prints what came of it.
#[test]
#[ignore = "run by the others, with a driver in its environment"]
fn a_context_in_this_environment() {
    let device_ordinal = std::env::var("TEST_ORDINAL").map_or(0, |text| text.parse().unwrap());
    let desc = compactattn_context_desc {
        struct_size: u32::try_from(size_of::<compactattn_context_desc>()).unwrap(),
        abi_version: compactattn_abi_version(),
        device_kind: compactattn_device_kind::COMPACTATTN_DEVICE_CUDA as i32,
        device_ordinal,
        num_threads: 0,
        reserved: 0,
    };
    let mut context = std::ptr::null_mut();
    // SAFETY: both point to locals.
    let made = unsafe { compactattn_context_create(&raw const desc, &raw mut context) };
    assert_eq!(context.is_null(), made != status::COMPACTATTN_OK);
    let mut text = [0_u8; 512];
    // SAFETY: a local of that size.
    let len = unsafe { compactattn_last_error(text.as_mut_ptr().cast(), text.len()) };
    println!("result {made:?} {}", String::from_utf8_lossy(&text[..len.min(text.len() - 1)]));
    assert_eq!(compactattn_context_destroy(context), status::COMPACTATTN_OK);
}

fn assert_context(driver: &Path, mode: &str, ordinal: usize, wanted: status, text: &str) {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_context_in_this_environment", "--ignored", "--nocapture"])
        .env("COMPACTATTN_LIBCUDA", driver)
        .env("FAKE_CUDA", mode)
        .env("TEST_ORDINAL", ordinal.to_string())
        .output()
        .unwrap();
    let out = String::from_utf8_lossy(&child.stdout).into_owned();
    assert!(child.status.success(), "{mode}: {out}{}", String::from_utf8_lossy(&child.stderr));
    let result = out.lines().find_map(|line| line.split_once("result ")).map(|(_, result)| result.to_owned());
    let result = result.unwrap_or_else(|| panic!("{mode}: no result in {out}"));
    let expected = format!("{wanted:?} ");
    assert!(
        result.starts_with(&expected) && result.contains(text),
        "{mode:?}: {result}, not {wanted:?} {text:?}"
    );
}

/// Compiles the stand-in; `name` keeps tests that run at once apart.
fn driver(name: &str, flags: &[&str]) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gpu/counting_driver.c");
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("libcuda-{name}.so"));
    let mut cc = Command::new("cc");
    cc.args(["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]).args(flags);
    let status = cc.arg("-o").arg(&out).arg(source).arg("-ldl").status().unwrap();
    assert!(status.success(), "cc: {status}");
    out
}
