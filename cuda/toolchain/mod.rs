//! How `build.rs` makes the kernels: finds nvcc, compiles every unit for each of its architectures, hands over images.
//!
//! ```text
//! units (what, for whom) ─► search (nvcc, CUTLASS) ─► compile (by content, in parallel) ─► report ─► kernels.rs
//! ```
//!
//! | variable | meaning |
//! |---|---|
//! | `COMPACTATTN_CUDA` | `auto` (default): kernels if nvcc is found; `require`: kernels or an error; `off`: none |
//! | `COMPACTATTN_KERNEL_CACHE` | where images are kept; default `compactattn/kernels` of the user's cache folder |
//! | `COMPACTATTN_PYTHON` | whose wheels are searched; default `python3` |
//!
//! Nothing here downloads: `cuda/toolkit.sh` does. Nothing here prints or reads the environment: `build.rs` does.

mod compile;
mod report;
mod search;
mod units;

use std::fmt::Write;
use std::fs;
use std::path::Path;

use compile::Image;

/// What a build starts from.
pub(crate) struct Place<'a> {
    /// The source tree: holds `cuda/`.
    pub(crate) root: &'a Path,
    /// Where `kernels.rs` and `kernels/` are written.
    pub(crate) out: &'a Path,
    /// Where a system keeps CUDA: the last place to look.
    pub(crate) system: &'a Path,
    /// A variable of the environment; an empty one counts as not set.
    pub(crate) env: &'a dyn Fn(&str) -> Option<String>,
}

/// Writes `kernels.rs` for `rust/cuda/images.rs`; the lines that cargo is to read.
///
/// # Errors
/// A text for the user: an unknown mode, a kernel that does not compile, a file that cannot be written, and under
/// `require` whatever else keeps the build from having all its kernels in order.
pub(crate) fn build(place: &Place) -> Result<Vec<String>, String> {
    let mode = Mode::of(place)?;
    let watched = |names: &[&str]| names.iter().map(|name| format!("rerun-if-env-changed={name}")).collect();
    let mut lines: Vec<_> = watched(&SWITCHES);
    if mode == Mode::Off {
        write_kernels(place.out, "", &[])?;
        return Ok(lines);
    }
    lines.push("rerun-if-changed=cuda".to_owned());
    lines.append(&mut watched(&VARIABLES));
    let mut notes = Vec::new();
    let toolkit = search::toolkit(place, &mut notes);
    match (&toolkit, mode) {
        (Ok(toolkit), _) => {
            lines.push(format!("rerun-if-changed={}", toolkit.nvcc.display()));
            let images = compile::all(place, toolkit)?;
            let faults = images.iter().flat_map(Image::faults).collect::<Vec<_>>();
            if mode == Mode::Require && !faults.is_empty() {
                return Err(format!("kernels that ptxas complains about:\n  {}", faults.join("\n  ")));
            }
            notes.extend(faults);
            write_kernels(place.out, &toolkit.version.text, &images)?;
            // Tools that read images lie beside the compiler: tests/gpu/check_sass.py.
            write_file(&place.out.join("kernels/nvcc"), &toolkit.nvcc.to_string_lossy())?;
        }
        (Err(missing), Mode::Require) => {
            let seen: String = notes.iter().map(|note| format!("\n  {note}")).collect();
            return Err(format!("COMPACTATTN_CUDA=require, but {missing}; run cuda/toolkit.sh{seen}"));
        }
        (Err(missing), _) => {
            notes.push(format!(
                "building without GPU kernels: {missing}; run cuda/toolkit.sh, or set COMPACTATTN_CUDA=off"
            ));
            write_kernels(place.out, "", &[])?;
        }
    }
    lines.extend(notes.iter().map(|note| format!("warning={note}")));
    Ok(lines)
}

/// What decides whether kernels are built.
const SWITCHES: [&str; 2] = ["COMPACTATTN_CUDA", "DOCS_RS"];

/// What decides how.
const VARIABLES: [&str; 12] = [
    "COMPACTATTN_KERNEL_CACHE",
    "COMPACTATTN_PYTHON",
    "CUDA_HOME",
    "CUDA_PATH",
    "CUTLASS_DIR",
    "HOME",
    "NVCC",
    "NVCC_APPEND_FLAGS",
    "NVCC_CCBIN",
    "NVCC_PREPEND_FLAGS",
    "PATH",
    "XDG_CACHE_HOME",
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Auto,
    Require,
    Off,
}

impl Mode {
    fn of(place: &Place) -> Result<Self, String> {
        // docs.rs has no compiler for kernels, and documentation needs none.
        if (place.env)("DOCS_RS").is_some() {
            return Ok(Self::Off);
        }
        match (place.env)("COMPACTATTN_CUDA").as_deref() {
            None | Some("auto") => Ok(Self::Auto),
            Some("require") => Ok(Self::Require),
            Some("off") => Ok(Self::Off),
            Some(other) => Err(format!("COMPACTATTN_CUDA is {other}; it can be auto, require or off")),
        }
    }
}

/// Images are copied beside `kernels.rs`, so that a build outlives the cache.
fn write_kernels(out: &Path, version: &str, images: &[Image]) -> Result<(), String> {
    let folder = out.join("kernels");
    // A file of an earlier build would pass for one of this.
    let _ = fs::remove_dir_all(&folder);
    make_folder(&folder)?;
    let mut text = format!("pub(crate) const NVCC_VERSION: &str = {version:?};\n");
    if !images.is_empty() {
        // Loaders read words of an image.
        text.push_str("#[repr(C, align(64))]\nstruct Aligned<Bytes>(Bytes);\n");
    }
    text.push_str("pub(crate) static IMAGES: &[Image] = &[\n");
    for image in images {
        let name = format!("{}.{}.fatbin", image.unit.replace('/', "-"), image.arch);
        fs::copy(&image.fatbin, folder.join(&name))
            .map_err(|e| format!("{}: {e}", image.fatbin.display()))?;
        let Image { unit, arch, kernels, .. } = image;
        let bytes = format!("include_bytes!(concat!(env!(\"OUT_DIR\"), \"/kernels/{name}\"))");
        let fields =
            format!("unit: {unit:?}, arch: {arch:?}, kernels: &{kernels:?}, fatbin: &Aligned(*{bytes}).0");
        let _ = writeln!(text, "    Image {{ {fields} }},");
    }
    text.push_str("];\n");
    write_file(&out.join("kernels.rs"), &text)
}

fn write_file(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
}

fn make_folder(path: &Path) -> Result<(), String> {
    fs::create_dir_all(path).map_err(|e| format!("{}: {e}", path.display()))
}
