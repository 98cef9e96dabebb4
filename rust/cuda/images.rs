//! The kernels this build holds, as `build.rs` made them (`cuda/toolchain`).

use std::collections::BTreeSet;

/// One unit of `cuda/` compiled for one architecture.
#[derive(Debug)]
pub(crate) struct Image {
    /// Path of the source below `cuda/`, without its ending: "plan/plan".
    pub(crate) unit: &'static str,
    /// "sm_90a".
    pub(crate) arch: &'static str,
    /// Names of its kernels.
    pub(crate) kernels: &'static [&'static str],
    /// For `cuLibraryLoadData`: one cubin, compressed, no PTX; 64-byte aligned.
    pub(crate) fatbin: &'static [u8],
}

/// One line on the kernels of this build: "none", or units, kernels, architectures and the compiler.
pub(crate) fn summary() -> String {
    describe(IMAGES, NVCC_VERSION)
}

fn describe(images: &[Image], nvcc: &str) -> String {
    if images.is_empty() {
        return "none".to_owned();
    }
    let distinct = |names: Vec<&'static str>| names.into_iter().collect::<BTreeSet<_>>();
    let units = distinct(images.iter().map(|image| image.unit).collect()).len();
    let kernels = distinct(images.iter().flat_map(|image| image.kernels).copied().collect()).len();
    let mut archs = Vec::from_iter(distinct(images.iter().map(|image| image.arch).collect()));
    archs.sort_by_key(|arch| arch.len());
    let archs = archs.join(" ");
    let kib = images.iter().map(|image| image.fatbin.len()).sum::<usize>() / 1024;
    format!("{kernels} kernels in {units} units for {archs}, {kib} KiB, nvcc {nvcc}")
}

// IMAGES: &[Image], sorted by unit; NVCC_VERSION: &str, "13.0.88". Both empty in a build without kernels.
include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_kernels_and_architectures_are_counted_once() {
        let image = |unit, arch| Image { unit, arch, kernels: &["a", "b"], fatbin: &[0; 1024] };
        let images = [image("x", "sm_100a"), image("x", "sm_80"), image("y", "sm_80")];
        assert_eq!(
            describe(&images, "13.0.88"),
            "2 kernels in 2 units for sm_80 sm_100a, 3 KiB, nvcc 13.0.88"
        );
        assert_eq!(describe(&[], ""), "none");
    }
}
