//! The driver library: loaded once, checked, and its codes turned into statuses.

use std::ffi::{CStr, c_char, c_int};

use once_cell::sync::OnceCell;

use super::symbols::{self, Code, Functions, Object};
use crate::config;
use crate::error::{Error, Result, Status};

/// A loaded and initialised driver.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(super) functions: Functions,
    version: c_int,
    pid: u32,
}

impl Driver {
    /// The oldest driver that serves: its kernel images come from CUDA 13.0, and a driver of an older major refuses
    /// those whatever the GPU.
    pub(crate) const OLDEST: c_int = 13_000;

    /// The process's driver: the library that [`config::libcuda`] names, loaded at the first call that succeeds.
    ///
    /// # Errors
    /// Those of [`Driver::load`]; [`Status::WrongProcess`] in a child forked after the driver was loaded, where CUDA
    /// does not work.
    pub(crate) fn get() -> Result<&'static Self> {
        DRIVER.get_or_try_init(|| Self::load(&config::libcuda()?))?.of_this_process()
    }

    /// Loads the library at `path` and keeps it for the life of the process: a driver cannot be unloaded safely.
    ///
    /// # Errors
    /// [`Status::NoDriver`] if it cannot be loaded, is none or is a toolkit's stub; [`Status::DriverOld`];
    /// [`Status::NoDevice`] if no GPU is visible.
    pub(crate) fn load(path: &CStr) -> Result<Self> {
        // SAFETY: `path` ends in NUL; the driver's constructors expect to be run by `dlopen`.
        let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        let name = path.to_string_lossy();
        if library.is_null() {
            let text = format!("{name} could not be loaded: no NVIDIA driver; use device_kind CPU");
            return Err(Error::plain(Status::NoDriver, text));
        }
        // SAFETY: `library` was opened above and is never closed.
        if unsafe { symbols::find(library, c"cuInit") }.is_none() {
            return Err(Error::plain(
                Status::NoDriver,
                format!("{name} has no cuInit: not the NVIDIA driver"),
            ));
        }
        // SAFETY: as above; a library with cuInit is the driver, whose names keep their signatures for good.
        let functions = unsafe { Functions::find(library) };
        let functions =
            functions.map_err(|symbol| old(format!("one without {}", symbol.to_string_lossy())))?;
        let mut driver = Self { functions, version: 0, pid: std::process::id() };
        driver.init()?;
        tracing::debug!(path = %name, version = driver.version, "driver loaded");
        Ok(driver)
    }

    /// The newest CUDA version the driver serves: 1000 * major + 10 * minor.
    pub(crate) fn version(&self) -> c_int {
        self.version
    }

    /// False in a child of the process that loaded the driver.
    pub(super) fn is_of_this_process(&self) -> bool {
        self.pid == std::process::id()
    }

    /// `Ok` for code 0, else the error it stands for; `call` is the driver function that returned it.
    ///
    /// # Errors
    /// By what the code means: [`Status::OutOfMemory`], [`Status::ContextLost`], [`Status::Capture`],
    /// [`Status::Image`], [`Status::Arch`], [`Status::NoDriver`], [`Status::NoDevice`], [`Status::DriverOld`], else
    /// [`Status::Cuda`].
    pub(crate) fn check(&self, code: Code, call: &str) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        Err(Error::plain(status_of(code), format!("{call}: {} ({code})", self.error_name(code))))
    }

    fn of_this_process(&self) -> Result<&Self> {
        if self.is_of_this_process() {
            return Ok(self);
        }
        let text = "CUDA was initialised before this process was forked; start workers with exec (spawn)";
        Err(Error::plain(Status::WrongProcess, text))
    }

    fn init(&mut self) -> Result<()> {
        // SAFETY: the driver allows this call before cuInit; it writes one number.
        let code = unsafe { (self.functions.driver_get_version)(&raw mut self.version) };
        self.check(code, "cuDriverGetVersion")?;
        if self.version < Self::OLDEST {
            return Err(old(format!("one of CUDA {}.{}", self.version / 1000, self.version % 1000 / 10)));
        }
        // SAFETY: no arguments but the flags, which must be 0.
        let code = unsafe { (self.functions.init)(0) };
        self.check(code, "cuInit")
    }

    fn error_name(&self, code: Code) -> String {
        let mut name: *const c_char = std::ptr::null();
        // SAFETY: writes one pointer.
        let unknown = unsafe { (self.functions.get_error_name)(code, &raw mut name) };
        if unknown != 0 || name.is_null() {
            return "an unknown error".to_owned();
        }
        // SAFETY: the driver gave a string of its own, which ends in NUL and stays.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    }
}

// SAFETY: function pointers and numbers; driver functions may be called from any thread.
unsafe impl Send for Driver {}
// SAFETY: as above.
unsafe impl Sync for Driver {}

/// A driver object that any thread may use: a context, a module or a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct Handle(pub(super) Object);

// SAFETY: an opaque name that only the driver follows, and the driver locks its own objects.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Handle {
    /// Names nothing yet.
    pub(super) const NONE: Self = Self(std::ptr::null_mut());
}

/// The status a code becomes.
fn status_of(code: Code) -> Status {
    match code {
        2 => Status::OutOfMemory,
        // CUDA_ERROR_STUB_LIBRARY: a toolkit's stub lies before the driver on the library path.
        34 => Status::NoDriver,
        // CALL_REQUIRES_NEWER_DRIVER, UNSUPPORTED_PTX_VERSION, SYSTEM_DRIVER_MISMATCH.
        36 | 222 | 803 => Status::DriverOld,
        100 => Status::NoDevice,
        200 | 218 => Status::Image,
        209 => Status::Arch,
        // Each of these leaves the context unusable, as the driver's documentation says of it.
        700 | 702 | 709 | 710 | 714..=719 => Status::ContextLost,
        900..=908 => Status::Capture,
        _ => Status::Cuda,
    }
}

fn old(got: impl std::fmt::Display) -> Error {
    Error::new(Status::DriverOld, "driver", "one of CUDA 13.0 or newer (release 580)", got)
}

static DRIVER: OnceCell<Driver> = OnceCell::new();

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::fake::Fake;

    impl Driver {
        /// As a forked child finds it.
        pub(crate) fn belongs_to_another_process(&mut self) {
            self.pid += 1;
        }
    }

    #[test]
    fn a_missing_library_and_one_that_is_no_driver_are_told_apart() {
        let missing = Driver::load(c"libcompactattn_no_such.so.1").unwrap_err();
        assert_eq!(missing.status(), Status::NoDriver);
        let other = Driver::load(c"libc.so.6").unwrap_err();
        assert!(other.status() == Status::NoDriver && other.to_string().contains("cuInit"), "{other}");
    }

    #[test]
    fn each_way_a_driver_can_fail_to_start_has_its_status() {
        for (mode, status) in [
            ("nodevice", Status::NoDevice),
            ("init34", Status::NoDriver),
            ("old", Status::DriverOld),
            ("mismatch", Status::DriverOld),
        ] {
            let error = Driver::load(&Fake::in_mode(mode).path).unwrap_err();
            assert_eq!(error.status(), status, "{mode}: {error}");
        }
    }

    #[test]
    fn a_forked_child_is_told_so() {
        let mut driver = Driver::load(&Fake::in_mode("").path).unwrap();
        assert!(driver.of_this_process().is_ok());
        driver.belongs_to_another_process();
        assert_eq!(driver.of_this_process().unwrap_err().status(), Status::WrongProcess);
    }

    #[test]
    fn a_code_is_named_and_has_a_status() {
        let fake = Fake::in_mode("");
        let driver = fake.driver();
        assert!(driver.version() >= Driver::OLDEST);
        assert_eq!(driver.check(0, "cuInit"), Ok(()));
        for (code, status) in [
            (2, Status::OutOfMemory),
            (200, Status::Image),
            (209, Status::Arch),
            (700, Status::ContextLost),
            (719, Status::ContextLost),
            (720, Status::Cuda),
            (900, Status::Capture),
            (907, Status::Capture),
            (1, Status::Cuda),
        ] {
            assert_eq!(driver.check(code, "cuX").unwrap_err().status(), status, "{code}");
        }
        let text = driver.check(700, "cuLaunchKernel").unwrap_err().to_string();
        assert_eq!(text, "E_CONTEXT_LOST: cuLaunchKernel: CUDA_ERROR_ILLEGAL_ADDRESS (700)");
    }
}
