//! The stages as whoever watches sees them: `tracing` spans, and NVTX ranges where `COMPACTATTN_NVTX` asks for them.
//!
//! On a GPU both are the host's time: a range holds the launches of its stage, and a profiler projects it onto the
//! kernels that those launches started. Where nobody watches, each costs one branch.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::cuda::nvtx;
use crate::error::Result;

/// A word of the pipeline that takes time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Spans of queries that share lists, on the device.
    Plan,
    /// Scores, and where a selector's kernels make them too, lists.
    Select,
    /// Scores or masks to lists; on a GPU to boxes of pages in the same kernel.
    Union,
    /// Lists to boxes of pages.
    Table,
    /// Attention over boxes; on a GPU the division of work before it, and combine in the same kernel.
    Attend,
    /// Pieces by their log-sum-exp.
    Combine,
    /// Block means.
    Summaries,
}

impl Stage {
    /// Runs `body` as this stage.
    pub(crate) fn run<T>(self, body: impl FnOnce() -> T) -> T {
        let span = Watched(Some(self.span()));
        let _entered = Watched(span.0.as_ref().map(tracing::Span::enter));
        let _range = nvtx::range(self.label());
        body()
    }

    fn span(self) -> tracing::Span {
        match self {
            Self::Plan => tracing::trace_span!("plan"),
            Self::Select => tracing::trace_span!("select"),
            Self::Union => tracing::trace_span!("union"),
            Self::Table => tracing::trace_span!("table"),
            Self::Attend => tracing::trace_span!("attend"),
            Self::Combine => tracing::trace_span!("combine"),
            Self::Summaries => tracing::trace_span!("summaries"),
        }
    }

    /// With our name, since a profile shows everybody's ranges.
    fn label(self) -> &'static std::ffi::CStr {
        match self {
            Self::Plan => c"compactattn plan",
            Self::Select => c"compactattn select",
            Self::Union => c"compactattn union",
            Self::Table => c"compactattn table",
            Self::Attend => c"compactattn attend",
            Self::Combine => c"compactattn combine",
            Self::Summaries => c"compactattn summaries",
        }
    }
}

/// What a subscriber hears the end of. It is the host program's and may panic: the first is the border's to stop, but a
/// second, while that one unwinds, would end the process.
struct Watched<T>(Option<T>);

impl<T> Drop for Watched<T> {
    fn drop(&mut self) {
        let watched = self.0.take();
        if std::thread::panicking() {
            // Dropping a payload may panic again.
            catch_unwind(AssertUnwindSafe(|| drop(watched))).unwrap_or_else(std::mem::forget);
        }
    }
}

/// Reads the wish for ranges and attaches to the profiler, once a process; every plan asks, so that no step does.
///
/// # Errors
/// [`crate::Status::Config`] for a wish that is neither yes nor no. A profiler that is not there is no error.
pub(crate) fn watch() -> Result<()> {
    nvtx::state().map(drop)
}
