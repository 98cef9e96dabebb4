//! The header and both libraries from C99 and C++17, and the symbols the shared one shows.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

#[test]
fn c99_runs_a_forward_pass_on_the_shared_library() {
    build_and_run("gcc", "c99", "smoke.c", Library::Shared);
}

#[test]
fn c99_runs_a_forward_pass_on_the_static_library() {
    build_and_run("gcc", "c99", "smoke.c", Library::Static);
}

#[test]
fn cpp17_runs_a_forward_pass_on_the_shared_library() {
    build_and_run("g++", "c++17", "smoke.cpp", Library::Shared);
}

#[test]
fn cpp17_runs_a_forward_pass_on_the_static_library() {
    build_and_run("g++", "c++17", "smoke.cpp", Library::Static);
}

#[test]
fn the_shared_library_shows_exactly_the_functions_of_the_header() {
    let nm = run(Command::new("nm").args(["-D", "--defined-only"]).arg(library("libcompactattn.so")));
    let shown: BTreeSet<_> = nm.lines().filter_map(|line| line.split_whitespace().last()).collect();
    let header = std::fs::read_to_string(root().join("include/compactattn.h")).unwrap();
    let declared: BTreeSet<_> = header.lines().filter_map(function_of).collect();
    assert!(declared.len() > 15, "{declared:?}");
    assert_eq!(shown, declared);
}

/// The function a line of the header declares; comments and structs have no `name(` at the start of a declaration.
fn function_of(line: &str) -> Option<&str> {
    let (before, _) = line.split_once('(')?;
    let name = before.rsplit([' ', '*']).next()?;
    (name.starts_with("compactattn_") && before.contains(' ') && !line.starts_with(['/', ' ']))
        .then_some(name)
}

#[derive(Clone, Copy, Debug)]
enum Library {
    Shared,
    Static,
}

fn build_and_run(compiler: &str, standard: &str, source: &str, kind: Library) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("smoke-{source}-{kind:?}"));
    std::fs::create_dir_all(&folder).unwrap();
    let out = folder.join("smoke");
    let mut command = Command::new(compiler);
    command.arg(format!("-std={standard}"));
    command.args(["-O1", "-Wall", "-Wextra", "-Werror", "-pedantic", "-Wno-unused-function"]);
    command.arg("-I").arg(root().join("include")).arg(root().join("tests/c").join(source));
    match kind {
        Library::Shared => {
            install(&folder);
            command.arg("-L").arg(&folder).arg("-lcompactattn");
            command.arg(format!("-Wl,-rpath,{}", folder.display()));
        }
        Library::Static => {
            command.arg(library("libcompactattn.a")).args(["-lpthread", "-ldl"]);
        }
    }
    run(command.arg("-lm").arg("-o").arg(&out));
    // Cargo's own search path may name an older build's folder.
    run(Command::new(out).env_remove("LD_LIBRARY_PATH"));
}

/// The shared library under the name to link and the name to load (its SONAME).
fn install(folder: &Path) {
    let versioned = concat!("libcompactattn.so.", env!("CARGO_PKG_VERSION_MAJOR"));
    for name in ["libcompactattn.so", versioned] {
        std::fs::copy(library("libcompactattn.so"), folder.join(name)).unwrap();
    }
}

/// Runs to success; its output.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}\n{text}");
    String::from_utf8(output.stdout).unwrap()
}

/// Cargo leaves the libraries this test was built with beside it.
fn library(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.parent().unwrap().join(name);
    assert!(path.exists(), "{} is not built", path.display());
    path
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
