//! The committed C header is what rust/capi says today.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::Path;

#[test]
fn the_committed_header_is_what_the_code_says() {
    let path = root().join("include/compactattn.h");
    let fresh = generated();
    if std::env::var_os(REWRITE).is_some() {
        std::fs::write(&path, &fresh).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    let line = committed.lines().zip(fresh.lines()).position(|(a, b)| a != b);
    assert!(
        committed == fresh,
        "first differing line: {line:?}; {REWRITE}=1 cargo test --test header rewrites it"
    );
}

#[test]
fn version_macros_are_those_of_the_crate() {
    let header = std::fs::read_to_string(root().join("include/compactattn.h")).unwrap();
    let abi = compactattn::capi::compactattn_abi_version();
    assert!(header.contains(&format!("#define COMPACTATTN_ABI_VERSION {abi}u\n")));
    assert!(
        header.contains(&format!("#define COMPACTATTN_VERSION_STRING \"{}\"\n", env!("CARGO_PKG_VERSION")))
    );
}

fn generated() -> String {
    let mut config = cbindgen::Config::from_file(root().join("cbindgen.toml")).unwrap();
    config.after_includes = Some(version_macros());
    let mut builder = cbindgen::Builder::new().with_config(config);
    for file in SOURCES {
        builder = builder.with_src(root().join("rust/capi").join(file));
    }
    let mut header = Vec::new();
    builder.generate().unwrap().write(&mut header);
    // What Rust calls safety is, to a C reader, about memory.
    String::from_utf8(header).unwrap().replace("// # Safety\n", "// Memory:\n")
}

fn version_macros() -> String {
    let abi = compactattn::capi::compactattn_abi_version();
    format!(
        "\n#define COMPACTATTN_VERSION_MAJOR {}\n#define COMPACTATTN_VERSION_MINOR {}\n\
         #define COMPACTATTN_VERSION_PATCH {}\n#define COMPACTATTN_VERSION_STRING \"{}\"\n\
         /* What compactattn_context_desc.abi_version must hold. */\n#define COMPACTATTN_ABI_VERSION {abi}u",
        env!("CARGO_PKG_VERSION_MAJOR"),
        env!("CARGO_PKG_VERSION_MINOR"),
        env!("CARGO_PKG_VERSION_PATCH"),
        env!("CARGO_PKG_VERSION"),
    )
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// In the header's order.
const SOURCES: [&str; 11] = [
    "status.rs",
    "structs.rs",
    "structs_step.rs",
    "api_info.rs",
    "api_context.rs",
    "api_settings.rs",
    "api_plan.rs",
    "api_stages.rs",
    "api_export.rs",
    "api_attend.rs",
    "api_combine.rs",
];
/// Set it to rewrite the header instead of comparing.
const REWRITE: &str = "COMPACTATTN_UPDATE_HEADER";
