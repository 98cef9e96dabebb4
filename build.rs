//! Builds what cargo cannot: the kernels (`cuda/toolchain`), the shared library's SONAME, and the C++ side of the bridge
//! (feature `cxx`).

#[path = "cuda/toolchain/mod.rs"]
mod toolchain;

use std::env;
use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    println!("cargo:rerun-if-changed=build.rs");
    name_shared_library();
    #[cfg(feature = "cxx")]
    build_bridge();
    match build_kernels() {
        Ok(lines) => {
            lines.iter().for_each(|line| println!("cargo:{line}"));
            ExitCode::SUCCESS
        }
        Err(text) => {
            eprintln!("{text}");
            ExitCode::FAILURE
        }
    }
}

fn build_kernels() -> Result<Vec<String>, String> {
    // Of this run, not of this program's own build: a target folder can serve several trees.
    let folder =
        |name| env::var_os(name).map(PathBuf::from).ok_or(format!("{name} is not set: cargo runs this"));
    let (root, out) = (folder("CARGO_MANIFEST_DIR")?, folder("OUT_DIR")?);
    let variable = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
    let system = "/usr/local/cuda".as_ref();
    toolchain::build(&toolchain::Place { root: &root, out: &out, system, env: &variable })
}

/// Without a SONAME a program records the path it was linked with, and an upgrade in place goes unnoticed.
fn name_shared_library() {
    if env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        let major = env!("CARGO_PKG_VERSION_MAJOR");
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcompactattn.so.{major}");
    }
}

/// Dependents' own bridges find `compactattn/block_map.hpp` on their include path (`links` in Cargo.toml).
#[cfg(feature = "cxx")]
fn build_bridge() {
    let include = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("cpp_shim/include");
    cxx_build::CFG.exported_header_dirs.push(&include);
    cxx_build::bridge("rust/bridge.rs")
        .file("cpp_shim/block_map.cpp")
        .std("c++17")
        .warnings_into_errors(true)
        .compile("compactattn_bridge");
    for file in ["rust/bridge.rs", "cpp_shim/block_map.cpp", "cpp_shim/include/compactattn/block_map.hpp"] {
        println!("cargo:rerun-if-changed={file}");
    }
}
