//! The command-line tool from outside: what it writes, what it says, how it exits.
#![cfg(feature = "cli")]
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod tool_run;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use half::bf16;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use tool_run::{stderr, stdout, text};

#[test]
fn demo_writes_a_row_per_selector_scope_and_density_and_three_files() {
    let dir = scratch("demo");
    let trace = synthetic(&dir, [1600, 2], [256, 4]);
    let out = dir.join("out");
    let run =
        tool(&["demo", "--trace", text(&trace), "--out", text(&out), "--threads", "1", "--device", "cpu"]);
    let printed = stdout(&run);
    assert!(run.status.success(), "{}", stderr(&run));
    for needed in ["Density .10", "Density .20", "Density .30", "path: CPU, 1 thread,", "skipped: attn_gate"]
    {
        assert!(printed.contains(needed), "{needed} is missing from\n{printed}");
    }
    // Not a terminal: no bar.
    assert_eq!(stderr(&run), "");
    check_summary(&out.join("summary.json"));
    for picture in ["selected_blocks.png", "error_density.png"] {
        let bytes = std::fs::read(out.join(picture)).unwrap();
        assert!(bytes.starts_with(b"\x89PNG") && bytes.len() > 5_000, "{picture}");
    }
}

fn check_summary(path: &Path) {
    let summary: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let rows = summary.as_array().unwrap();
    for row in rows {
        let words = ["selector", "scope"].iter().all(|&key| row[key].is_string());
        assert!(words && row["block_size"].is_u64(), "{row}");
        for (key, most) in [("density", 1.0), ("error", 2.0), ("ms", f64::INFINITY)] {
            let x = row[key].as_f64().unwrap();
            assert!((0.0..=most).contains(&x), "{key} of {row}");
        }
    }
    assert!(
        rows.iter().any(|row| row["block_size"] == 32 && row["scope"] == "head x chunk"),
        "the default's"
    );
    let plain = ["dense", "streaming", "oracle", "external", "quoka", "xattention"];
    for selector in plain.into_iter().chain(["sampled_exact", "flashprefill", "pooled_mass", "two_level"]) {
        let of: Vec<_> = rows.iter().filter(|row| row["selector"] == selector).collect();
        let targets: Vec<_> = of.iter().filter_map(|row| row["target_density"].as_f64()).collect();
        assert!(!of.is_empty(), "no row of {selector}");
        assert!(selector == "dense" || [0.1, 0.2, 0.3].iter().all(|t| targets.contains(t)), "{selector}");
    }
}

#[test]
fn demo_on_real_tensors_finds_sampled_exact_ahead_of_the_union_at_equal_density() {
    let out = scratch("real");
    let trace = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/smollm2_layer26.safetensors");
    let run = tool(&["demo", "--trace", text(&trace), "--out", text(&out)]);
    assert!(run.status.success(), "{}", stderr(&run));
    check_path(&stdout(&run));
    let summary = std::fs::read(out.join("summary.json")).unwrap();
    let rows: Vec<Value> = serde_json::from_slice(&summary).unwrap();
    let error = |selector: &str, scope: &str| {
        let found = rows.iter().find(|row| {
            let same = row["selector"] == selector && row["scope"] == scope && row["block_size"] == 128;
            same && row["target_density"] == 0.3
        });
        let row = found.unwrap();
        // One list's block among three lists of 55.
        assert!((row["density"].as_f64().unwrap() - 0.3).abs() < 1.0 / 165.0, "{row}");
        row["error"].as_f64().unwrap()
    };
    let union = error("flashprefill", "group x chunk");
    // As demo prints it for this layer; another instruction set changes only the last digits.
    assert!((error("sampled_exact", "group x chunk") / union - 0.75).abs() < 0.02);
    assert!((error("sampled_exact", "head x chunk") / union - 0.40).abs() < 0.02);
}

#[test]
fn a_gate_file_brings_attn_gate_into_demo_and_attend() {
    let dir = scratch("gate");
    let trace = synthetic(&dir, [1600, 2], [256, 4]);
    let key = |layer: usize| format!("model.layers.{layer}.self_attn.attn_gate.mask_linear_k.weight");
    let gate = dir.join("gate.safetensors");
    write(&gate, &[0, 1, 2, 3].map(|layer| Made::bf16(&key(layer), &[4, 192, 64])));
    let options = ["--gate", text(&gate), "--rope-theta", "10000"];
    let out = dir.join("out");
    let run = tool(&[&["demo", "--trace", text(&trace), "--out", text(&out)], &options[..]].concat());
    assert!(run.status.success(), "{}", stderr(&run));
    assert!(!stdout(&run).contains("skipped"));
    let summary: Vec<Value> =
        serde_json::from_slice(&std::fs::read(out.join("summary.json")).unwrap()).unwrap();
    let rows = summary.iter().filter(|row| row["selector"] == "attn_gate" && row["block_size"] == 64);
    assert_eq!(rows.count(), 6);
    let output = dir.join("attended");
    let fixed = ["attend", "--input", text(&trace), "--output", text(&output), "--selector", "attn_gate"];
    let run = tool(&[&fixed, &options[..]].concat());
    assert!(run.status.success(), "{}", stderr(&run));
}

#[test]
fn attend_in_pages_of_any_size_and_order_gives_the_same_result() {
    let dir = scratch("attend");
    let trace = synthetic(&dir, [700, 2], [100, 4]);
    let mut results = Vec::new();
    for (i, engine) in [["16", "nhd"], ["64", "hnd"]].iter().enumerate() {
        let output = dir.join(format!("out{i}.safetensors"));
        let run = tool(&[
            "attend",
            "--input",
            text(&trace),
            "--output",
            text(&output),
            "--density",
            "0.4",
            "--block-size",
            "64",
            "--scope",
            "head:chunk",
            "--page-size",
            engine[0],
            "--kv-layout",
            engine[1],
        ]);
        assert!(run.status.success(), "{}", stderr(&run));
        results.push(std::fs::read(&output).unwrap());
    }
    let tensors = SafeTensors::deserialize(&results[0]).unwrap();
    assert_eq!(tensors.tensor("layer3.out").unwrap().shape(), [100, 4, 64]);
    assert_eq!(tensors.tensor("layer3.lse").unwrap().shape(), [4, 100]);
    assert!(floats(&tensors.tensor("layer3.lse").unwrap()).iter().all(|x| x.is_finite()));
    // Pages only say where tokens lie: not a bit may change.
    assert_eq!(results[0], results[1]);
}

#[test]
fn attend_with_everything_kept_is_dense_attention() {
    let dir = scratch("attend_all");
    let trace = synthetic(&dir, [700, 2], [100, 4]);
    let run = |name: &str, options: &[&str]| {
        let output = dir.join(name);
        let fixed = ["attend", "--input", text(&trace), "--output", text(&output)];
        let run = tool(&[&fixed[..], options].concat());
        assert!(run.status.success(), "{}", stderr(&run));
        std::fs::read(&output).unwrap()
    };
    let dense = run("dense", &["--selector", "dense"]);
    assert_eq!(run("all", &["--density", "1"]), dense);
    assert_ne!(run("some", &["--density", "0.2"]), dense);
}

/// A path, and if it is the CPU, why.
fn check_path(printed: &str) {
    let line = printed.lines().find(|line| line.starts_with("path: ")).unwrap();
    match compactattn::cuda::Context::open(0) {
        Ok(context) => assert!(line.contains("CUDA") && line.contains(context.name()), "{line}"),
        Err(error) => {
            assert!(
                line.starts_with("path: CPU, ") && line.ends_with(&format!("(no GPU: {error})")),
                "{line}"
            );
        }
    }
}

#[test]
fn attend_says_which_path_ran_and_why_and_fails_where_the_gpu_it_was_told_to_use_is_not_there() {
    let dir = scratch("device");
    let trace = synthetic(&dir, [700, 2], [100, 4]);
    let attend = |input: &Path, device: &str| {
        let output = dir.join(device);
        tool(&["attend", "--input", text(input), "--output", text(&output), "--device", device])
    };
    let run = attend(&trace, "auto");
    assert!(run.status.success(), "{}", stderr(&run));
    check_path(&stdout(&run));
    assert!(stdout(&attend(&trace, "cpu")).contains("(--device cpu)"));
    let run = attend(&trace, "cuda");
    match compactattn::cuda::Context::open(0) {
        Ok(_) => assert!(stdout(&run).contains("path: CUDA"), "{}", stderr(&run)),
        Err(error) => {
            assert_eq!(run.status.code(), Some(1));
            assert_eq!(stderr(&run), format!("error: {error}\n"));
        }
    }
    check_refusal(&attend(&trace, "tpu"), "--device");

    // No kernel takes f32, GPU or not: the CPU does, and says why.
    let tensor = |name: &str, dims: &[usize]| {
        let halves = Made::bf16(name, dims);
        let wide = halves.data.chunks(2).flat_map(|half| [0, 0, half[0], half[1]]).collect();
        Made { dtype: Dtype::F32, data: wide, ..halves }
    };
    let path = dir.join("f32.safetensors");
    write(&path, &[tensor("q", &[100, 4, 64]), tensor("k", &[700, 2, 64]), tensor("v", &[700, 2, 64])]);
    let printed = stdout(&attend(&path, "auto"));
    assert!(printed.contains("path: CPU, ") && printed.contains(" GPU: E_"), "{printed}");
}

#[test]
fn inspect_prints_a_row_per_kv_head_and_draws_it() {
    let dir = scratch("inspect");
    let trace = synthetic(&dir, [1600, 2], [256, 4]);
    let run = tool(&["inspect", "--trace", text(&trace), "--out", text(&dir)]);
    assert!(run.status.success(), "{}", stderr(&run));
    assert_eq!(stdout(&run).lines().filter(|line| line.trim_start().starts_with("3  ")).count(), 2);
    assert!(std::fs::read(dir.join("union.png")).unwrap().starts_with(b"\x89PNG"));
}

#[test]
fn extract_copies_a_layer_bit_for_bit() {
    let dir = scratch("extract");
    let trace = synthetic(&dir, [300, 2], [100, 4]);
    let copy = dir.join("copy.safetensors");
    let run = tool(&["extract", "--trace", text(&trace), "--layer", "3", "--output", text(&copy)]);
    assert!(run.status.success(), "{}", stderr(&run));
    let (a, b) = (std::fs::read(&trace).unwrap(), std::fs::read(&copy).unwrap());
    let (a, b) = (SafeTensors::deserialize(&a).unwrap(), SafeTensors::deserialize(&b).unwrap());
    for name in ["layer3.q", "layer3.k", "layer3.v"] {
        assert_eq!(a.tensor(name).unwrap(), b.tensor(name).unwrap());
    }
    let run = tool(&["extract", "--trace", text(&trace), "--layer", "4", "--output", text(&copy)]);
    check_refusal(&run, "--layer");

    // Five names of metadata, which a hash map would order anew in each run.
    let real = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/smollm2_layer26.safetensors");
    let again = ["first", "second"].map(|name| dir.join(name)).map(|file| {
        tool(&["extract", "--trace", text(&real), "--layer", "26", "--output", text(&file)]);
        std::fs::read(file).unwrap()
    });
    assert!(again[0] == again[1]);
}

#[test]
fn calibrate_writes_what_the_library_reads_and_meets_its_target() {
    let dir = scratch("calibrate");
    let trace = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/smollm2_layer26.safetensors");
    let file = dir.join("settings.json");
    let calibrate = ["calibrate", "--trace", text(&trace), "--output", text(&file)];
    let run = tool(&[&calibrate[..], &["--error", "0.02", "--block-size", "64"]].concat());
    assert!(run.status.success(), "{}", stderr(&run));
    let last = stdout(&run).lines().find(|line| line.starts_with(" mean")).unwrap().to_owned();
    let [pages, error] = [1, 2].map(|i| last.split_whitespace().nth(i).unwrap().parse::<f64>().unwrap());
    assert!(error <= 0.02 && error > 0.005 && pages < 0.3, "{last}");

    let vars = [("COMPACTATTN_MODE", "compactattn"), ("COMPACTATTN_CONFIG", text(&file))];
    let vars = vars.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let config =
        compactattn::config::resolve(vars.into_iter(), |path| std::fs::read_to_string(path)).unwrap();
    let settings = config.layer(26);
    assert!(matches!(settings.keep, compactattn::settings::Keep::Mass(_)), "{settings:?}");
    assert_eq!((settings.block_size, settings.dense.below_kv_len), (64, 8192));
    // Layers without a trace get a value too.
    assert_eq!((config.layer(0).block_size, config.layer(0).max_density), (64, 1.0));
}

#[test]
fn argument_errors_are_one_line_and_exit_code_2() {
    for (arguments, named) in [
        (vec!["demo", "--pages", "16"], "--pages"),
        (vec!["attend", "--input", "x"], "--output"),
        (vec!["attend", "--input", "x", "--output", "y", "--density", "0.2", "--mass", "0.9"], "--mass"),
        (vec!["attend", "--input", "x", "--output", "y", "--density", "2"], "(0, 1]"),
        (vec!["attend", "--input", "x", "--output", "y", "--selector", "best"], "sampled_exact"),
        (vec!["demo", "--gate", "x"], "--rope-theta"),
        (vec!["attend", "--input", "x", "--output", "y", "--scope", "all"], "HEADS"),
        (vec!["attend", "--input", "x", "--output", "y", "--block-size", "48"], "block_size"),
        (vec!["inspct"], "inspct"),
        (vec!["demo", "--trace", "/nowhere.safetensors"], "/nowhere.safetensors"),
    ] {
        check_refusal(&tool(&arguments), named);
    }
    let dir = scratch("arguments");
    // Where there is no source tree.
    check_refusal(
        &command(&["demo"]).current_dir(&dir).output().unwrap(),
        "or name a trace with --trace FILE",
    );
    let trace = synthetic(&dir, [1600, 2], [256, 4]);
    check_refusal(&tool(&["demo", "--trace", text(&trace), "--page-size", "1"]), "page_size");
    check_refusal(&tool(&["demo", "--trace", text(&trace), "--chunk", "0"]), "chunk");
    let gated = ["attend", "--input", text(&trace), "--output", "y", "--selector", "attn_gate"];
    check_refusal(&tool(&gated), "attn_gate");
    let short = synthetic(&dir, [300, 2], [256, 4]);
    check_refusal(&tool(&["demo", "--trace", text(&short)]), "KV tokens before the queries");
}

#[test]
fn a_trace_that_cannot_be_used_is_refused_by_tensor() {
    let dir = scratch("refused");
    let path = dir.join("bad.safetensors");
    let good = || {
        let q = Made::bf16("layer0.q", &[8, 4, 64]);
        [q, Made::bf16("layer0.k", &[32, 2, 64]), Made::bf16("layer0.v", &[32, 2, 64])]
    };
    let [q, k, v] = good();
    let cases = [
        (vec![q.clone(), k.clone()], "layer0.v"),
        (vec![q.clone(), k.clone(), Made::bf16("layer0.v", &[31, 2, 64])], "layer0.v"),
        (vec![q.clone(), Made::bf16("layer0.k", &[32, 128]), v.clone()], "layer0.k"),
        (
            vec![q.clone(), Made::bf16("layer0.k", &[32, 2, 96]), Made::bf16("layer0.v", &[32, 2, 96])],
            "layer0.k",
        ),
        (vec![Made::bf16("layer0.q", &[33, 4, 64]), k.clone(), v.clone()], "layer0.q"),
        (vec![Made::bf16("layer0.q", &[8, 3, 64]), k.clone(), v.clone()], "layer0.q"),
        (vec![q.clone(), Made { dtype: Dtype::U16, ..k.clone() }, v.clone()], "layer0.k"),
        (vec![Made::bf16("weights", &[8, 3, 64])], "layerN.q"),
    ];
    for (tensors, named) in cases {
        write(&path, &tensors);
        let run = tool(&["attend", "--input", text(&path), "--output", text(&dir.join("out"))]);
        check_refusal(&run, named);
    }
    std::fs::write(&path, b"not tensors").unwrap();
    let run = tool(&["attend", "--input", text(&path), "--output", text(&dir.join("out"))]);
    check_refusal(&run, "not a safetensors file");
}

#[test]
fn doctor_reports_settings_with_their_source_and_exits_by_health() {
    let run = tool(&["doctor"]);
    assert_eq!(run.status.code(), Some(0), "{}", stdout(&run));
    assert!(stdout(&run).contains("mode: dense (default)"), "{}", stdout(&run));

    let run = command(&["doctor", "--json"]).env("COMPACTATTN_MODE", "compactattn").output().unwrap();
    let report: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(report["settings"]["mode"], "compactattn (COMPACTATTN_MODE)");
    assert_eq!(report["self_test"]["result"], "passed");
    match compactattn::cuda::Context::open(0) {
        Ok(context) => {
            assert_eq!(report["cuda"]["gpu"], context.name());
            assert_eq!(report["gpu_self_test"]["result"], "passed");
        }
        Err(error) => {
            assert_eq!(report["cuda"]["status"], error.status().name());
            assert_eq!(report["cuda"]["reason"], error.to_string());
        }
    }
    assert_eq!(report["build"]["version"], env!("CARGO_PKG_VERSION"));

    let run = command(&["doctor"]).env("COMPACTATTN_MODE", "fast").output().unwrap();
    assert_eq!(run.status.code(), Some(2));
    assert!(stdout(&run).contains("dense|compactattn|block_sparse") && stdout(&run).contains("self_test"));
}

/// The driver of tests/gpu/counting_driver.c, whose GPU computes nothing.
#[test]
fn a_gpu_that_these_kernels_cannot_use_is_told_from_none_and_one_that_computes_nothing_fails() {
    let dir = scratch("fake_gpu");
    let fake = dir.join("libcuda.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gpu/counting_driver.c");
    let mut cc = Command::new("cc");
    cc.args(["-std=gnu11", "-O1", "-shared", "-fPIC", "-pthread", "-o"]).arg(&fake);
    assert!(cc.arg(source).arg("-ldl").status().unwrap().success());
    let on_fake = |arguments: &[&str], mode: &str| {
        command(arguments).env("COMPACTATTN_LIBCUDA", &fake).env("FAKE_CUDA", mode).output().unwrap()
    };
    let doctor = |mode: &str| {
        let run = on_fake(&["doctor", "--json"], mode);
        (run.status.code(), serde_json::from_slice::<Value>(&run.stdout).unwrap())
    };
    let trace = synthetic(&dir, [1600, 2], [256, 4]);
    let demo = ["demo", "--trace", text(&trace), "--out", text(&dir), "--device", "cuda"];

    let (code, report) = doctor("old");
    assert_eq!((code, &report["cuda"]["status"]), (Some(0), &Value::from("E_DRIVER_OLD")));
    let run = on_fake(&demo, "old");
    assert!(run.status.code() == Some(1) && stderr(&run).contains("E_DRIVER_OLD"), "{}", stderr(&run));

    let (code, report) = doctor("");
    let run = on_fake(&demo, "");
    assert_eq!(run.status.code(), Some(1));
    if compactattn::cuda::architectures().contains(&"sm_90a") {
        assert_eq!((code, &report["cuda"]["gpu"]), (Some(1), &Value::from("fake GPU")));
        assert_eq!(report["gpu_self_test"]["result"], "failed");
    } else if compactattn::cuda::architectures().is_empty() {
        assert_eq!((code, &report["cuda"]["status"]), (Some(0), &Value::from("E_NOT_BUILT")));
        assert!(stderr(&run).contains("E_NOT_BUILT"), "{}", stderr(&run));
    }
}

#[test]
fn version_and_help_are_no_errors() {
    let run = tool(&["version"]);
    assert_eq!(stdout(&run), format!("compactattn {}\n", env!("CARGO_PKG_VERSION")));
    assert!(tool(&["--help"]).status.success());
    assert_eq!(tool(&[]).status.code(), Some(2));
}

fn check_refusal(run: &Output, named: &str) {
    let said = stderr(run);
    assert_eq!(run.status.code(), Some(2), "{said}");
    assert!(said.starts_with("error: ") && said.lines().count() == 1, "{said}");
    assert!(said.contains(named), "{named} is missing from {said}");
}

/// One tensor to write.
#[derive(Clone)]
struct Made {
    name: String,
    dims: Vec<usize>,
    dtype: Dtype,
    data: Vec<u8>,
}

impl Made {
    /// Waves of many lengths, so that blocks differ.
    fn bf16(name: &str, dims: &[usize]) -> Self {
        let width = dims[dims.len() - 1];
        let phase = name.len() as f32 + f32::from(name.as_bytes()[name.len() - 1]);
        let values = (0..dims.iter().product()).map(|i: usize| {
            let (row, x) = ((i / width) as f32, (i % width) as f32);
            bf16::from_f32(1.5 * (row * (0.05 + 0.013 * x) + phase * (1.0 + x)).sin())
        });
        let data = values.flat_map(bf16::to_le_bytes).collect();
        Self { name: name.to_owned(), dims: dims.to_vec(), dtype: Dtype::BF16, data }
    }
}

#[test]
fn bench_lists_its_questions_and_hands_over_to_python_as_eval_does() {
    let listed = tool(&["bench"]);
    assert!(listed.status.success(), "{}", stderr(&listed));
    assert!(stdout(&listed).lines().any(|line| line == "dense"), "{}", stdout(&listed));
    // `echo` stands in for Python: what it would be given.
    let run = tool(&["bench", "--python", "echo", "sparse", "--out", "x", "--repro", "a,b,16,1"]);
    let given = stdout(&run);
    let words: Vec<_> = given.split_whitespace().collect();
    assert!(
        words[0].ends_with("tests/bench/bench.py") && words[1].ends_with("definitions/sparse.toml"),
        "{given}"
    );
    assert_eq!(words[2..], ["--out", "x", "--repro", "a,b,16,1"]);
    assert_eq!(tool(&["bench", "--python", "false", "sparse"]).status.code(), Some(1));
    let eval = tool(&["eval", "--python", "echo", "--out", "x", "--help"]);
    assert_eq!(stdout(&eval).trim(), "-m compactattn.eval --out x --help");
}

#[test]
fn bench_says_what_it_does_not_find() {
    for (arguments, text) in [
        (["bench", "--folder", "/nowhere"].as_slice(), "E_IO: bench: wanted the source tree's tests/bench"),
        (&["bench", "--python", "no-such-python", "dense"], "E_IO: --python: wanted a Python 3.11"),
        (&["eval", "--python", "no-such-python"], "E_IO: --python: wanted a Python with compactattn"),
    ] {
        let run = tool(arguments);
        assert_eq!(run.status.code(), Some(2));
        assert!(stderr(&run).contains(text), "{}", stderr(&run));
    }
}

/// A trace of one layer, number 3: `[tokens, heads]` of keys and of queries.
fn synthetic(dir: &Path, [kv_len, kv_heads]: [usize; 2], [q_len, q_heads]: [usize; 2]) -> PathBuf {
    let path = dir.join(format!("trace{kv_len}.safetensors"));
    let q = Made::bf16("layer3.q", &[q_len, q_heads, 64]);
    let k = Made::bf16("layer3.k", &[kv_len, kv_heads, 64]);
    write(&path, &[q, k, Made::bf16("layer3.v", &[kv_len, kv_heads, 64])]);
    path
}

fn write(path: &Path, tensors: &[Made]) {
    let views = tensors.iter().map(|t| (&t.name, TensorView::new(t.dtype, t.dims.clone(), &t.data).unwrap()));
    let bytes = safetensors::serialize(views, None::<HashMap<String, String>>).unwrap();
    std::fs::write(path, bytes).unwrap();
}

fn floats(view: &TensorView) -> Vec<f32> {
    view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_compactattn"));
    command.args(arguments).env_remove("COMPACTATTN_MODE").env_remove("COMPACTATTN_CONFIG");
    command
}

fn tool(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

/// An empty folder of the test's own.
fn scratch(name: &str) -> PathBuf {
    tool_run::scratch(&format!("cli_{name}"))
}
