//! Where nvcc and CUTLASS's headers are.

use std::env::split_paths;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Place, compile};

/// The first that knows every architecture of `units`.
const OLDEST: (u32, u32) = (12, 8);
/// What kernels are written and measured with.
const TESTED_MAJOR: u32 = 13;

/// Where a toolkit's parts lie.
pub(super) struct Toolkit {
    pub(super) nvcc: PathBuf,
    pub(super) version: Version,
    /// CUTLASS's include folder.
    pub(super) cutlass: PathBuf,
}

/// Of an nvcc.
pub(super) struct Version {
    /// "13.0.88".
    pub(super) text: String,
    /// All that `nvcc --version` prints.
    pub(super) banner: String,
    number: (u32, u32),
}

/// The first place that has them, in the order of `nvcc_candidates`; `notes` say why others were passed over.
///
/// # Errors
/// What is missing.
pub(super) fn toolkit(place: &Place, notes: &mut Vec<String>) -> Result<Toolkit, String> {
    let cache = cached_toolkit(place);
    let wheels = Wheels::of(place);
    let Some((nvcc, version)) = find_nvcc(nvcc_candidates(place, &cache, &wheels), notes) else {
        return Err(format!("no nvcc {}.{} or newer was found", OLDEST.0, OLDEST.1));
    };
    if version.number.0 != TESTED_MAJOR {
        notes.push(format!("nvcc {}: kernels are tested with CUDA {TESTED_MAJOR} only", version.text));
    }
    let Some(cutlass) = find_cutlass(place, &nvcc, &cache, &wheels) else {
        return Err("CUTLASS's headers were not found (CUTLASS_DIR)".to_owned());
    };
    Ok(Toolkit { nvcc, version, cutlass })
}

/// With the name each place goes by. A variable's candidate stands even if the file is missing: someone meant it.
fn nvcc_candidates(place: &Place, cache: &Option<PathBuf>, wheels: &Wheels) -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    let env = |name: &str| (place.env)(name).map(PathBuf::from);
    found.extend(env("NVCC").map(|nvcc| ("NVCC".to_owned(), nvcc)));
    for name in ["CUDA_HOME", "CUDA_PATH"] {
        found.extend(env(name).map(|home| (name.to_owned(), home.join("bin/nvcc"))));
    }
    let path = (place.env)("PATH").unwrap_or_default();
    let folders = cache.iter().map(|folder| folder.join("nvidia/cu13/bin"));
    let folders = split_paths(&path).chain(folders);
    let folders = folders.chain(wheels.nvidia.iter().map(|folder| folder.join("cu13/bin")));
    let folders = folders.chain([place.system.join("bin")]);
    let files = folders.map(|folder| folder.join("nvcc")).filter(|nvcc| nvcc.is_file());
    found.extend(files.map(|nvcc| (nvcc.display().to_string(), nvcc)));
    found
}

fn find_nvcc(candidates: Vec<(String, PathBuf)>, notes: &mut Vec<String>) -> Option<(PathBuf, Version)> {
    for (name, nvcc) in candidates {
        // nvcc finds its own parts beside its real name.
        let nvcc = fs::canonicalize(&nvcc).unwrap_or(nvcc);
        match Version::of(&nvcc) {
            None => notes.push(format!("{name}: {} does not run", nvcc.display())),
            Some(version) if version.number < OLDEST => notes.push(format!(
                "{name}: nvcc {} is too old; {}.{} or newer is wanted",
                version.text, OLDEST.0, OLDEST.1
            )),
            Some(version) => return Some((nvcc, version)),
        }
    }
    None
}

fn find_cutlass(place: &Place, nvcc: &Path, cache: &Option<PathBuf>, wheels: &Wheels) -> Option<PathBuf> {
    let named = (place.env)("CUTLASS_DIR").map(PathBuf::from);
    // Wheels in one folder: DIR/nvidia/cu13/bin/nvcc, DIR/cutlass_library.
    let beside = nvcc.ancestors().nth(4).map(|folder| folder.join("cutlass_library/source"));
    let cached = cache.as_ref().map(|folder| folder.join("cutlass_library/source"));
    let wheel = wheels.cutlass.as_ref().map(|folder| folder.join("source"));
    let roots = [named, beside, cached, wheel].into_iter().flatten();
    roots.map(|root| root.join("include")).find(|include| include.join("cutlass/version.h").is_file())
}

/// The folder that `cuda/toolkit.sh` fills; it has that name only when complete.
fn cached_toolkit(place: &Place) -> Option<PathBuf> {
    let wheels = fs::read(place.root.join("cuda/requirements.txt")).ok()?;
    let hash = compile::sha256(&wheels);
    let folder = cache_folder(place)?.join(format!("toolkit-{}", &hash[..16]));
    folder.is_dir().then_some(folder)
}

/// The user's cache folder of this project.
pub(super) fn cache_folder(place: &Place) -> Option<PathBuf> {
    let base = (place.env)("XDG_CACHE_HOME").map(PathBuf::from);
    let base = base.or_else(|| Some(PathBuf::from((place.env)("HOME")?).join(".cache")))?;
    Some(base.join("compactattn"))
}

impl Version {
    fn of(nvcc: &Path) -> Option<Self> {
        let output =
            Command::new(nvcc).arg("--version").output().ok().filter(|output| output.status.success())?;
        let banner = String::from_utf8(output.stdout).ok()?;
        // "Cuda compilation tools, release 13.0, V13.0.88"
        let text = banner.split_once(", V")?.1.split_whitespace().next()?.to_owned();
        let mut numbers = text.split('.').map(str::parse);
        let number = (numbers.next()?.ok()?, numbers.next()?.ok()?);
        Some(Self { text, banner, number })
    }
}

/// Folders of packages that a Python has.
struct Wheels {
    nvidia: Option<PathBuf>,
    cutlass: Option<PathBuf>,
}

impl Wheels {
    fn of(place: &Place) -> Self {
        let python = (place.env)("COMPACTATTN_PYTHON").unwrap_or_else(|| "python3".to_owned());
        let program = "import importlib.util as u\n\
            for name in ('nvidia', 'cutlass_library'):\n  \
            spec = u.find_spec(name)\n  \
            print(next(iter(spec.submodule_search_locations), '') if spec else '')";
        let output = Command::new(python).args(["-c", program]).output();
        let text =
            output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        let mut lines = text.lines().map(|line| (!line.is_empty()).then(|| PathBuf::from(line)));
        Self { nvidia: lines.next().flatten(), cutlass: lines.next().flatten() }
    }
}
