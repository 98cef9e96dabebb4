//! Units to images: nvcc in parallel, and a cache by content, so that no image is made twice and none is stale.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use sha2::{Digest, Sha256};

use super::search::Toolkit;
use super::units::{self, Unit};
use super::{Place, make_folder, report, search};

/// One cubin, no PTX: PTX newer than the driver is refused, and that of an `a` architecture runs nowhere else anyway.
/// `CUTLASS_ENABLE_GDC_FOR_SM90`: without it waits for and signals to other kernels compile to nothing. Line tables would
/// be three quarters of an image; `NVCC_APPEND_FLAGS=-lineinfo` brings them back for a profiler.
const FLAGS: [&str; 9] = [
    "-fatbin",
    "-Xfatbin=-compress-all",
    "-O3",
    "-std=c++17",
    "-DNDEBUG",
    "-DCUTLASS_ENABLE_GDC_FOR_SM90",
    "--expt-relaxed-constexpr",
    "-Xptxas",
    "-v",
];

/// They reach nvcc by themselves and change what it makes.
const FLAG_VARIABLES: [&str; 3] = ["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN"];

/// One unit compiled for one architecture.
pub(super) struct Image {
    pub(super) unit: String,
    /// "sm_90a".
    pub(super) arch: String,
    pub(super) kernels: Vec<String>,
    /// In the cache.
    pub(super) fatbin: PathBuf,
    report: String,
}

impl Image {
    /// What ptxas complains about, with where.
    pub(super) fn faults(&self) -> Vec<String> {
        let faults = report::faults(&self.report);
        faults.into_iter().map(|fault| format!("{} for {}: {fault}", self.unit, self.arch)).collect()
    }
}

/// Every image of the tree, in the order of units and architectures.
///
/// # Errors
/// nvcc's words on every unit that does not compile; a cache that cannot be written.
pub(super) fn all(place: &Place, toolkit: &Toolkit) -> Result<Vec<Image>, String> {
    let units = units::all(place.root)?;
    let cache = (place.env)("COMPACTATTN_KERNEL_CACHE").map(PathBuf::from);
    let cache = cache.or_else(|| Some(search::cache_folder(place)?.join("kernels")));
    let cache = cache.ok_or("no folder for the kernel cache: set COMPACTATTN_KERNEL_CACHE or HOME")?;
    // nvcc runs in the source tree, where a relative path would name another place.
    let cache = place.root.join(cache);
    make_folder(&cache)?;
    let context = Context { root: place.root, toolkit, cache, seed: seed(place, toolkit)? };
    let jobs: Vec<_> =
        units.iter().flat_map(|unit| unit.archs.iter().map(move |arch| (unit, *arch))).collect();
    let threads = (place.env)("NUM_JOBS").and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    in_parallel(threads, &jobs, |(unit, arch)| context.image(unit, arch))
}

/// In hex.
pub(super) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// One digest of all parts, each with its length, so that none runs into the next.
fn digest(parts: &[&[u8]]) -> String {
    let framed = parts.iter().flat_map(|part| [&(part.len() as u64).to_le_bytes()[..], part].concat());
    sha256(&framed.collect::<Vec<_>>())
}

/// What is the same for every image.
struct Context<'a> {
    root: &'a Path,
    toolkit: &'a Toolkit,
    cache: PathBuf,
    seed: String,
}

/// What an image depends on besides its own sources.
fn seed(place: &Place, toolkit: &Toolkit) -> Result<String, String> {
    let version = toolkit.cutlass.join("cutlass/version.h");
    let cutlass = fs::read(&version).map_err(|e| format!("{}: {e}", version.display()))?;
    let given: Vec<_> = FLAG_VARIABLES.iter().map(|name| (place.env)(name).unwrap_or_default()).collect();
    let (flags, given) = (FLAGS.join("\n"), given.join("\n"));
    Ok(digest(&[toolkit.version.banner.as_bytes(), flags.as_bytes(), given.as_bytes(), &cutlass]))
}

impl Context<'_> {
    /// From the cache, or compiled into it.
    fn image(&self, unit: &Unit, arch: &str) -> Result<Image, String> {
        let mut parts = vec![self.seed.as_bytes(), unit.name.as_bytes(), arch.as_bytes()];
        for (path, text) in &unit.sources {
            parts.extend([path.as_os_str().as_encoded_bytes(), text]);
        }
        let stem = format!("{}.sm_{arch}-{}", unit.name.replace('/', "-"), &digest(&parts)[..32]);
        let fatbin = self.cache.join(format!("{stem}.fatbin"));
        let report = self.cache.join(format!("{stem}.txt"));
        // The report is written first: with the image there is always one.
        let kept = fs::metadata(&fatbin).is_ok_and(|file| file.len() > 0);
        let report = match fs::read_to_string(&report) {
            Ok(text) if kept => text,
            _ => self.compile(unit, arch, &fatbin, &report)?,
        };
        let kernels = report::kernels(&report);
        if kernels.is_empty() {
            return Err(format!("cuda/{}.cu holds no kernel for sm_{arch}:\n{report}", unit.name));
        }
        Ok(Image { unit: unit.name.clone(), arch: format!("sm_{arch}"), kernels, fatbin, report })
    }

    /// The compiler's report. Files get their names when whole; builds at the same time write the same bytes.
    fn compile(&self, unit: &Unit, arch: &str, fatbin: &Path, report: &Path) -> Result<String, String> {
        let unnamed = |path: &Path| PathBuf::from(format!("{}.{}", path.display(), std::process::id()));
        let (new, new_report) = (unnamed(fatbin), unnamed(report));
        let mut nvcc = Command::new(&self.toolkit.nvcc);
        nvcc.current_dir(self.root).args(FLAGS).arg("-I").arg(&self.toolkit.cutlass);
        nvcc.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
        nvcc.arg("-o").arg(&new).arg(format!("cuda/{}.cu", unit.name));
        let output = nvcc.output().map_err(|e| format!("{}: {e}", self.toolkit.nvcc.display()))?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        if !output.status.success() {
            let _ = fs::remove_file(&new);
            return Err(format!("cuda/{}.cu does not compile for sm_{arch}:\n{text}", unit.name));
        }
        let failed = |e| format!("{}: {e}", self.cache.display());
        fs::write(&new_report, &text).map_err(failed)?;
        fs::rename(&new_report, report).map_err(failed)?;
        fs::rename(&new, fatbin).map_err(failed)?;
        Ok(text)
    }
}

/// Results in the order of `jobs`, or all errors together.
fn in_parallel<J: Sync, R: Send>(
    threads: usize,
    jobs: &[J],
    run: impl Fn(&J) -> Result<R, String> + Sync,
) -> Result<Vec<R>, String> {
    let (next, run) = (&AtomicUsize::new(0), &run);
    let (sender, results) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..threads.clamp(1, jobs.len().max(1)) {
            let sender = sender.clone();
            let take = move || next.fetch_add(1, Ordering::Relaxed);
            scope.spawn(move || {
                while let Some((i, job)) = Some(take()).and_then(|i| Some((i, jobs.get(i)?))) {
                    // The receiver outlives the scope.
                    let _ = sender.send((i, run(job)));
                }
            });
        }
    });
    drop(sender);
    let mut results: Vec<_> = results.into_iter().collect();
    results.sort_by_key(|(i, _)| *i);
    let (done, failed): (Vec<_>, Vec<_>) =
        results.into_iter().map(|(_, result)| result).partition(Result::is_ok);
    let failed: Vec<_> = failed.into_iter().filter_map(Result::err).collect();
    if failed.is_empty() { Ok(done.into_iter().flatten().collect()) } else { Err(failed.join("\n")) }
}
