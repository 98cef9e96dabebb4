//! The border's edge: panics stop here, and the text of the last failure is kept per thread.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::c_char;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::compactattn_status;
use crate::error::{Error, Result, Status};

/// Runs `body`; a failure or panic becomes a status and this thread's last error.
pub(super) fn guard(body: impl FnOnce() -> Result<()>) -> compactattn_status {
    // Unwind safety: objects are immutable or atomic, and a plan that saw a panic refuses to work on.
    let result = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| Err(of_panic(payload)));
    match result {
        Ok(()) => compactattn_status::COMPACTATTN_OK,
        Err(error) => {
            let status = error.status();
            // A thread that is ending may have none any more: the status says enough.
            let _ = LAST_ERROR.try_with(|last| *last.borrow_mut() = error.to_string());
            status.into()
        }
    }
}

/// The text of this thread's last failure; empty before the first, and while the thread ends.
pub(super) fn last_error() -> String {
    LAST_ERROR.try_with(|last| last.borrow().clone()).unwrap_or_default()
}

/// Copies `text` and a NUL into `buf`, cut to `cap` bytes; the bytes the whole text needs, without the NUL.
///
/// # Safety
/// `buf`: NULL, or writable for `cap` bytes.
pub(super) unsafe fn copy_out(text: &str, buf: *mut c_char, cap: usize) -> usize {
    if buf.is_null() || cap == 0 {
        return text.len();
    }
    let bytes = &text.as_bytes()[..text.len().min(cap - 1)];
    // SAFETY: `bytes` is at most `cap - 1` long and `buf` holds `cap` bytes by this function's contract.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr().cast(), buf, bytes.len()) };
    // SAFETY: as above; the index is at most `cap - 1`.
    unsafe { buf.wrapping_add(bytes.len()).write(0) };
    text.len()
}

/// What a caught panic is reported as. The payload's own text stays on stderr: it may quote contents.
fn of_panic(payload: Box<dyn Any + Send>) -> Error {
    // Dropping a payload may panic again.
    std::mem::forget(payload);
    Error::plain(
        Status::Panic,
        "a panic was stopped at the border (its text is on stderr); destroy the handle",
    )
}

thread_local! {
    static LAST_ERROR: RefCell<String> = const { RefCell::new(String::new()) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_a_status_and_the_thread_goes_on() {
        let status = guard(|| panic!("on purpose"));
        assert_eq!(status, compactattn_status::COMPACTATTN_E_PANIC);
        assert!(last_error().starts_with("E_PANIC: ") && !last_error().contains("on purpose"));
        assert_eq!(guard(|| Ok(())), compactattn_status::COMPACTATTN_OK);
    }

    #[test]
    fn a_thread_that_ends_may_still_fail_and_ask() {
        struct Late;
        impl Drop for Late {
            fn drop(&mut self) {
                let status = guard(|| Err(Error::plain(Status::Value, "late")));
                assert_eq!(status, compactattn_status::COMPACTATTN_E_VALUE);
                assert_eq!(last_error(), "");
                DROPPED.store(true, std::sync::atomic::Ordering::Relaxed);
            }
        }
        thread_local!(static LATE: Late = const { Late });
        static DROPPED: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
        // What a thread used first goes last: the text of its last error is gone by then.
        let late_then_error = || {
            LATE.with(|_| ());
            assert_eq!(
                guard(|| Err(Error::plain(Status::Value, "early"))),
                compactattn_status::COMPACTATTN_E_VALUE
            );
        };
        std::thread::spawn(late_then_error).join().unwrap();
        assert!(DROPPED.load(std::sync::atomic::Ordering::Relaxed));
    }

    #[test]
    fn texts_are_cut_to_the_buffer_and_always_end() {
        for cap in 0..8 {
            let mut buf = [b'#'.cast_signed(); 8];
            // SAFETY: `buf` holds 8 bytes and `cap` is less.
            let needed = unsafe { copy_out("hello", buf.as_mut_ptr(), cap) };
            let written = cap.saturating_sub(1).min(5);
            assert_eq!(needed, 5);
            assert!(cap == 0 || buf[written] == 0);
            assert!(buf[cap..].iter().all(|&c| c == b'#'.cast_signed()));
        }
    }
}
