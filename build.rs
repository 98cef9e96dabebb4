//! Builds what cargo cannot: the shared library's SONAME, and the C++ side of the bridge (feature `cxx`).

use std::env;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    name_shared_library();
    #[cfg(feature = "cxx")]
    build_bridge();
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
