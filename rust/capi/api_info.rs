//! Exported: errors, versions, build.

use std::ffi::{c_char, c_int};

use super::guard::{copy_out, last_error};
use super::status;

/// Copies the text of this thread's last failed call into buf, cut to cap bytes and ended by NUL: status name,
/// argument, what was wanted, what came. ASCII, at most 300 bytes, no addresses, no tensor contents.
///
/// Returns the length of the whole text without the NUL; 0 if no call on this thread has failed. A call that
/// succeeds leaves the text as it is.
///
/// # Safety
/// buf: NULL, or writable for cap bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn compactattn_last_error(buf: *mut c_char, cap: usize) -> usize {
    // SAFETY: this function's contract.
    unsafe { copy_out(&last_error(), buf, cap) }
}

/// The name of a compactattn_status without its prefix: "E_SHAPE". Static; never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn compactattn_status_string(status: c_int) -> *const c_char {
    status::name(status).as_ptr()
}

/// The library's version: major << 24 | minor << 16 | patch << 8.
#[unsafe(no_mangle)]
pub extern "C" fn compactattn_version() -> u32 {
    VERSION
}

/// The library's ABI; a caller built with another COMPACTATTN_ABI_VERSION is refused by compactattn_context_create.
#[unsafe(no_mangle)]
pub extern "C" fn compactattn_abi_version() -> u32 {
    ABI_VERSION
}

/// Copies one line on how the library was built into buf, as compactattn_last_error does.
///
/// # Safety
/// buf: NULL, or writable for cap bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn compactattn_build_info(buf: *mut c_char, cap: usize) -> usize {
    let target = format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS);
    let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
    let version = env!("CARGO_PKG_VERSION");
    let kernels = crate::cuda::kernels();
    let text =
        format!("compactattn {version}; abi {ABI_VERSION}; {target}; {profile}; GPU kernels: {kernels}");
    // SAFETY: this function's contract.
    unsafe { copy_out(&text, buf, cap) }
}

/// `major << 24 | minor << 16 | patch << 8`.
const VERSION: u32 = MAJOR << 24 | MINOR << 16 | PATCH << 8;

/// `major << 16`, or the minor before 1.0, where a minor may break.
pub(super) const ABI_VERSION: u32 = if MAJOR == 0 { MINOR } else { MAJOR << 16 };

const MAJOR: u32 = number(env!("CARGO_PKG_VERSION_MAJOR"));
const MINOR: u32 = number(env!("CARGO_PKG_VERSION_MINOR"));
const PATCH: u32 = number(env!("CARGO_PKG_VERSION_PATCH"));

const fn number(digits: &str) -> u32 {
    let digits = digits.as_bytes();
    let (mut i, mut x) = (0, 0);
    while i < digits.len() {
        x = x * 10 + (digits[i] - b'0') as u32;
        i += 1;
    }
    x
}
