//! What this machine is, as far as it decides which code runs.

use compactattn::Parallel;

/// The instruction set the CPU path's inner loops were dispatched to.
pub(crate) fn instruction_set() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        let avx512 = std::is_x86_feature_detected!("avx512f") && std::is_x86_feature_detected!("avx512vl");
        let fma = std::is_x86_feature_detected!("fma");
        match (avx512 && fma, std::is_x86_feature_detected!("avx2") && fma) {
            (true, _) => "AVX-512",
            (_, true) => "AVX2",
            _ => "baseline x86-64",
        }
    }
    #[cfg(target_arch = "aarch64")]
    {
        if std::arch::is_aarch64_feature_detected!("neon") { "NEON" } else { "baseline AArch64" }
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        "portable"
    }
}

/// What the CPU path runs on.
pub(crate) fn processors(parallel: Parallel) -> String {
    let threads = parallel.threads();
    let plural = if threads == 1 { "" } else { "s" };
    format!("{threads} thread{plural}, {}", instruction_set())
}
