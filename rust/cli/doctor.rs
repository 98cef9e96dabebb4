//! `doctor`: what this build and machine can do, which settings are in force, and whether the arithmetic is right.
//!
//! Exit code 0: all is well, with or without a GPU, whatever engines there are. 1: a self-test failed, or Python cannot
//! load the library. 2: the settings cannot be understood.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use compactattn::config::{self, Config};
use compactattn::cuda::{Context, nvtx};
use compactattn::settings::{Keep, KeepAt, Settings};
use compactattn::{Error, Parallel, Result};
use serde_json::{Map, Value, json};

use crate::gpu::{self, Gpu};
use crate::selftest::{self, SelfTest};
use crate::{Failure, doctor_python, host};

/// Options of `doctor`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// One JSON object instead of text.
    #[arg(long)]
    json: bool,
    /// The Python whose packages and engines are looked at; default: the one beside this program.
    #[arg(long, value_name = "PROGRAM")]
    python: Option<PathBuf>,
}

/// Prints everything there is to know before reporting a problem.
///
/// # Errors
/// Those of `out`.
pub(crate) fn run(args: &Args, out: &mut impl Write) -> std::result::Result<ExitCode, Failure> {
    let config = config::from_env();
    let gpu = Context::open(0).map(Arc::new);
    let test = selftest::run();
    let gpu_test = gpu.as_ref().ok().map(|context| selftest::run_on(&Gpu::on(Arc::clone(context))));
    let passed = |test: &Result<SelfTest>| test.as_ref().is_ok_and(SelfTest::passed);
    let python = doctor_python::sections(args.python.as_deref());
    let library_fails = python[0].1["library"].as_str().is_some_and(|text| text.starts_with("error"));
    let code = match config {
        Err(_) => 2,
        Ok(_) if passed(&test) && gpu_test.as_ref().is_none_or(passed) && !library_fails => 0,
        Ok(_) => 1,
    };
    let mut sections = vec![
        ("build", build()),
        ("cpu", cpu()),
        ("cuda", cuda(gpu.as_deref())),
        ("settings", settings(&config)),
        ("self_test", self_test(&test)),
        (
            "gpu_self_test",
            gpu_test.as_ref().map_or_else(|| json!({ "result": "not run: no GPU" }), self_test),
        ),
    ];
    sections.extend(python);
    print(args.json, sections, out)?;
    Ok(ExitCode::from(code))
}

fn print(as_json: bool, sections: Vec<(&str, Value)>, out: &mut impl Write) -> io::Result<()> {
    if as_json {
        let all: Map<_, _> = sections.into_iter().map(|(name, fields)| (name.to_owned(), fields)).collect();
        return writeln!(out, "{:#}", Value::Object(all));
    }
    for (name, fields) in sections {
        writeln!(out, "{name}")?;
        for (key, value) in fields.as_object().into_iter().flatten() {
            writeln!(out, "  {key}: {}", plain(value))?;
        }
    }
    Ok(())
}

fn build() -> Value {
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "profile": if cfg!(debug_assertions) { "debug" } else { "release" },
        "target": format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
        "cxx_bridge": if cfg!(feature = "cxx") { "built" } else { "not in this build" },
        "gpu_kernels": compactattn::cuda::kernels(),
    })
}

fn cpu() -> Value {
    json!({ "threads": Parallel::new(0).threads(), "instruction_set": host::instruction_set() })
}

/// What can be seen of the driver without loading it, and the GPU, or why there is none.
fn cuda(gpu: std::result::Result<&Context, &Error>) -> Value {
    let version = std::fs::read_to_string("/proc/driver/nvidia/version");
    let version = version.ok().and_then(|text| text.lines().next().map(str::to_owned));
    let mut all = json!({
        "kernel_module": version.unwrap_or_else(|| "not loaded".to_owned()),
        "libcuda.so.1": if driver_library() { "found" } else { "not found" },
        "gpu_kernels": compactattn::cuda::kernels(),
    });
    match gpu {
        Ok(context) => {
            all["gpu"] = json!(context.name());
            all["sms"] = json!(context.num_sms());
            all["driver"] = json!(format!("CUDA {}", gpu::driver(context)));
        }
        Err(error) => {
            all["gpu"] = json!("none");
            all["status"] = json!(error.status().name());
            all["reason"] = json!(error.to_string());
        }
    }
    all
}

/// Whether the dynamic loader would find the driver's library: in its cache or a default folder.
fn driver_library() -> bool {
    let cache = std::fs::read("/etc/ld.so.cache").unwrap_or_default();
    let name = b"libcuda.so.1\0";
    cache.windows(name.len()).any(|window| window == name)
        || ["/usr/lib", "/usr/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"]
            .iter()
            .any(|folder| Path::new(folder).join("libcuda.so.1").exists())
}

/// Every setting with its source: the preset, or the variable or file that changed it.
fn settings(config: &Result<Config>) -> Value {
    let config = match config {
        Ok(config) => config,
        Err(error) => return json!({ "error": error.to_string() }),
    };
    let source = |name: &str| {
        let last = config.sources.iter().rev().find(|(known, _, _)| known == name);
        last.map_or_else(|| format!("preset {}", config.mode.name()), |(_, _, source)| source.clone())
    };
    let mode = config.sources.iter().find(|(name, _, _)| name == "mode");
    let mode = mode.map_or("default", |(_, _, source)| source);
    let mut all = Map::new();
    all.insert("mode".to_owned(), json!(format!("{} ({mode})", config.mode.name())));
    let ranges = nvtx::state().map_or_else(|error| error.to_string(), ToString::to_string);
    all.insert("nvtx".to_owned(), json!(ranges));
    let checked = config.sources.iter().find(|(name, _, _)| name == "check");
    let checked = checked.map_or_else(|| "off".to_owned(), |(_, _, source)| format!("on ({source})"));
    all.insert("check".to_owned(), json!(checked));
    for (name, value) in fields(&config.settings) {
        all.insert(name.to_owned(), json!(format!("{value} ({})", source(name))));
    }
    for (name, value, source) in config.sources.iter().filter(|(name, _, _)| name.starts_with("layers.")) {
        all.insert(name.clone(), json!(format!("{value} ({source})")));
    }
    if !config.unknown.is_empty() {
        all.insert("unknown_variables".to_owned(), json!(config.unknown.join(", ")));
    }
    Value::Object(all)
}

/// Each setting by the name a configuration file gives it.
fn fields(settings: &Settings) -> [(&'static str, String); 22] {
    let (keep, share) = match settings.keep {
        Keep::Threshold(x) => ("keep_threshold", x),
        Keep::Mass(x) => ("keep_mass", x),
        Keep::Density(x) => ("keep_density", x),
    };
    let keep_at = match settings.keep_at {
        KeepAt::Row => "row",
        KeepAt::List => "list",
    };
    [
        ("selector", settings.selector.name().to_owned()),
        ("block_size", settings.block_size.to_string()),
        ("query_span", settings.scope.query_span.to_string()),
        ("heads_per_list", settings.scope.heads_per_list.to_string()),
        (keep, share.to_string()),
        ("keep_at", keep_at.to_owned()),
        ("min_density", settings.min_density.to_string()),
        ("max_density", settings.max_density.to_string()),
        ("sink_blocks", settings.sink_blocks.to_string()),
        ("local_blocks", settings.local_blocks.to_string()),
        ("density_guard", settings.density_guard.to_string()),
        ("mean_correction", settings.mean_correction.to_string()),
        ("dense_below_kv_len", settings.dense.below_kv_len.to_string()),
        ("dense_max_q_len", settings.dense.max_q_len.to_string()),
        ("dense_prefix_tokens", settings.dense.prefix_tokens.to_string()),
        ("sample_rows", settings.sample_rows.to_string()),
        ("flashprefill_non_voting_spans", settings.flashprefill.non_voting_spans.to_string()),
        ("flashprefill_min_budget", settings.flashprefill.min_budget.to_string()),
        ("flashprefill_relative_to_past", settings.flashprefill.relative_to_past.to_string()),
        ("quoka_query_ratio", settings.quoka_query_ratio.to_string()),
        ("xattention_stride", settings.xattention_stride.to_string()),
        ("two_level_factor", settings.two_level_factor.to_string()),
    ]
}

fn self_test(test: &Result<SelfTest>) -> Value {
    match test {
        Err(error) => json!({ "result": "failed", "error": error.to_string() }),
        Ok(test) => json!({
            "result": if test.passed() { "passed" } else { "failed" },
            "largest_error_over_bound": test.worst,
            "ms": test.ms.round(),
        }),
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
