//! The GPU side. This build holds no kernels; it can tell whether a driver is there.

mod images;

use std::ffi::CStr;

use crate::error::{Error, Result, Status};

/// Whether a context on GPU `ordinal` can be made.
///
/// # Errors
/// [`Status::NoDriver`] without `libcuda.so.1`, else [`Status::NotBuilt`].
pub fn probe(_ordinal: usize) -> Result<()> {
    probe_library(c"libcuda.so.1")
}

/// One line on the GPU kernels of this build: "none", or units, kernels, architectures and the compiler.
#[must_use]
pub fn kernels() -> String {
    images::summary()
}

fn probe_library(name: &CStr) -> Result<()> {
    if !is_loadable(name) {
        let text = "libcuda.so.1 could not be loaded: no NVIDIA driver; use device_kind CPU";
        return Err(Error::plain(Status::NoDriver, text));
    }
    let text = "no GPU kernels in this build yet (a driver was found); use device_kind CPU";
    Err(Error::plain(Status::NotBuilt, text))
}

fn is_loadable(name: &CStr) -> bool {
    // SAFETY: `name` ends in NUL; libraries named here have no constructors that break the process.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if library.is_null() {
        return false;
    }
    // SAFETY: `library` was opened above and is not used again.
    unsafe { libc::dlclose(library) };
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_driver_and_missing_kernels_are_told_apart() {
        let missing = probe_library(c"libcompactattn_no_such.so.1").unwrap_err();
        assert_eq!(missing.status(), Status::NoDriver);
        assert_eq!(probe_library(c"libc.so.6").unwrap_err().status(), Status::NotBuilt);
    }
}
