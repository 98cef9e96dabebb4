//! What is compiled, and for which architectures.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Architectures of a unit that needs none in particular: Ampere and Ada, Hopper, data-centre and consumer Blackwell.
/// Machine code only, no PTX: code for 80 runs on every 8.x, the ones with an `a` on exactly theirs.
const ARCHS: [&str; 4] = ["80", "90a", "100a", "120a"];

/// Folders whose kernels are written in one architecture's own instructions, or for those with GPUs of little shared memory.
const OWN_ARCHS: [(&str, &[&str]); 3] =
    [("attend/sm90/", &["90a"]), ("select/sm90/", &["90a"]), ("select/small/", &["80", "120a"])];

/// One `.cu` file.
pub(super) struct Unit {
    /// Path below `cuda/`, without the ending: "attend/sm90/inst/bf16_d128".
    pub(super) name: String,
    pub(super) archs: &'static [&'static str],
    /// Path and text of the source and of every header of the tree it reads, in the order of their paths.
    pub(super) sources: BTreeMap<PathBuf, Vec<u8>>,
}

/// Every `cuda/**/*.cu` below `root`, by name: a new kernel needs no list.
pub(super) fn all(root: &Path) -> Result<Vec<Unit>, String> {
    let mut paths = Vec::new();
    walk(&root.join("cuda"), &mut paths)?;
    paths.sort();
    paths.iter().map(|path| unit(root, path)).collect()
}

fn unit(root: &Path, path: &Path) -> Result<Unit, String> {
    let below = path.strip_prefix(root.join("cuda")).unwrap_or(path).with_extension("");
    let name = below.to_string_lossy().into_owned();
    let own = OWN_ARCHS.iter().find(|(folder, _)| name.starts_with(folder));
    let archs = own.map_or(&ARCHS[..], |(_, archs)| archs);
    let mut sources = BTreeMap::new();
    read_with_headers(root, path.strip_prefix(root).unwrap_or(path), &mut sources)?;
    Ok(Unit { name, archs, sources })
}

/// Follows `#include "..."` whether or not the preprocessor would: more than is needed, never less. What is not in the
/// tree belongs to CUDA or CUTLASS, whose versions stand for it.
fn read_with_headers(
    root: &Path,
    path: &Path,
    sources: &mut BTreeMap<PathBuf, Vec<u8>>,
) -> Result<(), String> {
    let text = fs::read(root.join(path)).map_err(|e| format!("{}: {e}", path.display()))?;
    let names: Vec<_> = String::from_utf8_lossy(&text).lines().filter_map(included).collect();
    sources.insert(path.to_owned(), text);
    for name in names {
        let header = normal(&path.with_file_name(name));
        if !sources.contains_key(&header) && root.join(&header).is_file() {
            read_with_headers(root, &header, sources)?;
        }
    }
    Ok(())
}

fn included(line: &str) -> Option<String> {
    let rest = line.trim_start().strip_prefix('#')?.trim_start().strip_prefix("include")?;
    let (name, _) = rest.trim_start().strip_prefix('"')?.split_once('"')?;
    Some(name.to_owned())
}

/// Without `..`, so that a header has one name.
fn normal(path: &Path) -> PathBuf {
    let mut parts = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::ParentDir => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts
}

fn walk(folder: &Path, found: &mut Vec<PathBuf>) -> Result<(), String> {
    let entries = fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            walk(&path, found)?;
        } else if path.extension().is_some_and(|kind| kind == "cu") {
            found.push(path);
        }
    }
    Ok(())
}
