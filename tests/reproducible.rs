//! Kernel images depend on their sources and the compiler alone, and not on whether the cache of images was used. (Line
//! tables, which `NVCC_APPEND_FLAGS=-lineinfo` adds, would name the folder of the build; so do names that CuTe's headers
//! leave in images of TMA. `packaging/again.sh` compares whole packages.) Runs where there is an nvcc;
//! elsewhere it says that it did not.
#![cfg(unix)]
#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "../cuda/toolchain/mod.rs"]
mod toolchain;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use toolchain::Place;

/// A small one; all are built by the same command.
const UNIT: &str = "union/keep_rows.cu";

#[test]
fn two_builds_without_a_cache_and_one_with_it_give_the_same_images() {
    let tree = Tree::new();
    let images = match tree.build("cache") {
        Ok(images) => images,
        Err(text) if text.contains("run cuda/toolkit.sh") => return println!("not run: {text}"),
        Err(text) => panic!("{text}"),
    };
    assert!(images.len() > 1 && images.values().all(|image| image.len() > 1000), "{:?}", images.keys());
    assert!(tree.build("another").unwrap() == images, "compiled again");
    assert!(tree.build("cache").unwrap() == images, "from the cache");
}

/// The kernels' sources without any unit but one, in a folder of its own.
struct Tree(PathBuf);

impl Tree {
    fn new() -> Self {
        let root = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("reproducible");
        let _ = fs::remove_dir_all(&root);
        copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda"), &root.join("cuda"));
        Self(root)
    }

    /// Names and bytes of the images, kept in a cache folder of that name.
    fn build(&self, cache: &str) -> Result<BTreeMap<String, Vec<u8>>, String> {
        let (out, cache) = (self.0.join("out"), self.0.join(cache));
        fs::create_dir_all(&out).unwrap();
        let _ = fs::remove_dir_all(out.join("kernels"));
        let env = |name: &str| match name {
            "COMPACTATTN_CUDA" => Some("require".to_owned()),
            "COMPACTATTN_KERNEL_CACHE" => Some(cache.to_string_lossy().into_owned()),
            "NUM_JOBS" => Some("2".to_owned()),
            _ => std::env::var(name).ok().filter(|value| !value.is_empty()),
        };
        let system = "/usr/local/cuda".as_ref();
        toolchain::build(&Place { root: &self.0, out: &out, system, env: &env })?;
        let entries = fs::read_dir(out.join("kernels")).unwrap().flatten();
        let images = entries.filter(|entry| entry.path().extension().is_some_and(|kind| kind == "fatbin"));
        Ok(images.map(|entry| (name_of(&entry), fs::read(entry.path()).unwrap())).collect())
    }
}

fn name_of(entry: &fs::DirEntry) -> String {
    entry.file_name().to_string_lossy().into_owned()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten() {
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        let unit = path.extension().is_some_and(|kind| kind == "cu");
        if path.is_dir() {
            copy(&path, &target);
        } else if !unit || path.ends_with(UNIT) {
            fs::copy(&path, &target).unwrap();
        }
    }
}
