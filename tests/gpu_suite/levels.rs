//! What a leak would show in, and whose it is: memory that the library holds, as a counting driver tells it; this
//! process's pages and files; and the GPU's free memory, which is everybody's.

use super::abi::{Plan, Refusal};
use super::counters::{self, Held};
use super::device::Device;
use super::driver::Cuda;
use super::step::{Done, Given};
use crate::common::case::Case;

/// At one time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Level {
    device_free: usize,
    resident_bytes: usize,
    files: usize,
    /// The library's own on the GPU, where a counting driver sees it.
    held: Option<Held>,
}

impl Level {
    pub(crate) fn now(device: &Device) -> Self {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
        let pages: usize = statm.split(' ').nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
        let files = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
        let device_free = device.cuda.as_ref().map_or(0, Cuda::free_bytes);
        Self { device_free, resident_bytes: pages * 4096, files, held: counters::held() }
    }

    /// What came since `warm`, in words.
    pub(crate) fn growth(&self, warm: &Self) -> String {
        let more = |now: usize, then: usize| now as i64 - then as i64;
        let own = match (self.held, warm.held) {
            (Some(now), Some(then)) => {
                format!("{} B in {} allocations", more(now.bytes, then.bytes), more(now.blocks, then.blocks))
            }
            _ => "not counted".into(),
        };
        format!(
            "{} KiB of the host, {} files; of the GPU the library's own: {own}, everybody's: {} KiB",
            more(self.resident_bytes, warm.resident_bytes) / 1024,
            more(self.files, warm.files),
            more(warm.device_free, self.device_free) / 1024
        )
    }

    /// Whether nothing grew since `warm`. `alone`: nobody else uses the GPU, whose free memory then is this process's.
    pub(crate) fn judge(&self, warm: &Self, alone: bool) -> Done {
        if self.files > warm.files {
            return Err("files leaked".into());
        }
        if let (Some(now), Some(then)) = (self.held, warm.held)
            && (now.bytes > then.bytes || now.blocks > then.blocks)
        {
            return Err("the library's own device memory leaked".into());
        }
        if alone && self.device_free < warm.device_free {
            return Err("device memory leaked".into());
        }
        // The C library's heap breathes by this much; a leak of a step would be thousands of times larger.
        if self.resident_bytes > warm.resident_bytes + (16 << 20) {
            return Err("host memory grows".into());
        }
        Ok(())
    }
}

/// On a GPU that others use, only the counting driver sees a leak: it must be there, and see a plan come and go.
pub(crate) fn sees_a_plan(device: &Device, case: &Case, shared: bool) -> Result<(), Refusal> {
    if device.cuda.is_none() {
        return Ok(());
    }
    let Some(before) = counters::held() else {
        let why = format!("--shared 1, and nothing judges device memory: {}", counters::WANTED);
        return if shared { Err(Refusal::Fault(why)) } else { Ok(()) };
    };
    let plan = Plan::new(device, case, &Given::Nothing)?;
    let during = counters::held();
    drop(plan);
    let after = counters::held();
    if during.is_some_and(|during| during.bytes > before.bytes) && after == Some(before) {
        return Ok(());
    }
    Err(Refusal::Fault(format!("a plan came and went, and was counted as {before:?}, {during:?}, {after:?}")))
}
