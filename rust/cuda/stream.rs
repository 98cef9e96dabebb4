//! The caller's stream: checked, never created, owned or waited for.

use std::ffi::c_int;

use super::device::Device;
use super::driver::Handle;
use super::symbols::Object;
use crate::error::{Error, Result, Status};

/// A stream of the caller.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stream(Object);

impl Stream {
    /// The caller's handle: a `CUstream` or `cudaStream_t`, NULL, 1 (legacy) or 2 (per thread).
    ///
    /// # Safety
    /// It is one of those, and stays alive while this or a copy is used: the driver follows it.
    pub(crate) unsafe fn from_raw(raw: Object) -> Self {
        Self(raw)
    }

    /// Whether work of `device` may be put on it; allowed while it is being captured.
    ///
    /// The special streams belong to whichever context is current, hence to every device that is entered.
    ///
    /// # Errors
    /// [`Status::Stream`] for a stream of another context; [`Status::ContextLost`] and the like as they are.
    pub(crate) fn check(self, device: &Device) -> Result<()> {
        if SPECIAL.contains(&self.0.addr()) {
            return Ok(());
        }
        let driver = device.driver();
        let mut context = Handle::NONE;
        // SAFETY: a live stream by `from_raw`; writes one pointer.
        let code = unsafe { (driver.functions.stream_get_ctx)(self.0, &raw mut context.0) };
        if code == 0 && context == device.context() {
            return Ok(());
        }
        let answer = driver.check(code, "cuStreamGetCtx");
        // A lost context, say, is not the stream's fault.
        if answer.as_ref().is_err_and(|error| error.status() != Status::Cuda) {
            return answer;
        }
        let wanted = format!("one of the primary context of GPU {}", device.ordinal());
        let got = answer.map_or_else(|e| e.to_string(), |()| OTHER.to_owned());
        Err(Error::new(Status::Stream, "stream", wanted, got))
    }

    /// Whether what is put on it is recorded into a graph; the device is entered.
    ///
    /// # Errors
    /// [`Status::Capture`] for the legacy stream while another stream is captured.
    pub(crate) fn is_capturing(self, device: &Device) -> Result<bool> {
        let driver = device.driver();
        let mut status: c_int = 0;
        // SAFETY: a live stream by `from_raw`; writes one number.
        let code = unsafe { (driver.functions.stream_is_capturing)(self.0, &raw mut status) };
        driver.check(code, "cuStreamIsCapturing")?;
        Ok(status != 0)
    }

    /// Waits for all work on it; for tools and tests, never for a stage. The device is entered.
    ///
    /// # Errors
    /// What the work ended in.
    pub(crate) fn synchronize(self, device: &Device) -> Result<()> {
        // SAFETY: a live stream by `from_raw`.
        let code = unsafe { (device.driver().functions.stream_synchronize)(self.0) };
        device.driver().check(code, "cuStreamSynchronize")
    }

    /// The handle.
    pub(super) fn raw(self) -> Object {
        self.0
    }
}

/// NULL, CU_STREAM_LEGACY, CU_STREAM_PER_THREAD.
const SPECIAL: [usize; 3] = [0, 1, 2];
const OTHER: &str = "one of another context";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::fake::Fake;

    #[test]
    fn a_stream_of_another_context_is_refused_and_special_ones_are_not() {
        let fake = Fake::in_mode("");
        let device = Device::open_on(fake.driver(), 0).unwrap();
        for raw in [0, 1, 2, fake.number(c"fake_stream")] {
            // SAFETY: special streams and one that the fake driver knows.
            let stream = unsafe { Stream::from_raw(std::ptr::without_provenance_mut(raw)) };
            assert_eq!(stream.check(&device), Ok(()));
        }
        let raw = std::ptr::without_provenance_mut(fake.number(c"fake_foreign_stream"));
        // SAFETY: a stream that the fake driver knows.
        let foreign = unsafe { Stream::from_raw(raw) };
        assert_eq!(foreign.check(&device).unwrap_err().status(), Status::Stream);
    }

    #[test]
    fn a_stream_can_be_checked_while_it_is_captured_but_not_waited_for() {
        let fake = Fake::in_mode("capture");
        let device = Device::open_on(fake.driver(), 0).unwrap();
        let _entered = device.enter().unwrap();
        // SAFETY: a stream that the fake driver knows.
        let stream =
            unsafe { Stream::from_raw(std::ptr::without_provenance_mut(fake.number(c"fake_stream"))) };
        assert_eq!(stream.check(&device), Ok(()));
        assert_eq!(stream.is_capturing(&device), Ok(true));
        assert_eq!(stream.synchronize(&device).unwrap_err().status(), Status::Capture);
    }
}
