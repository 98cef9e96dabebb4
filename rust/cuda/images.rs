//! The kernel images of this build. None yet.

/// One compiled unit for one architecture.
#[derive(Debug)]
pub(crate) struct Image {
    /// The source it was made from.
    pub(crate) unit: &'static str,
    /// What it runs on, as the compiler names it: `sm_90a`.
    pub(crate) arch: &'static str,
    /// Entry points.
    pub(crate) kernels: &'static [&'static str],
    /// A fatbin or cubin.
    pub(crate) fatbin: &'static [u8],
}

/// Every unit for every architecture.
pub(crate) static IMAGES: &[Image] = &[];
