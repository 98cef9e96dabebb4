//! `view` and `stats` from outside: the page that a browser draws, the numbers that a terminal or a scraper sees.
#![cfg(feature = "cli")]
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod tool_run;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use half::bf16;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use tool_run::{stderr, stdout, text};

const LAYERS: [usize; 2] = [2, 11];
const VIEW: [&str; 7] = ["view", "--density", "0.3", "--scope", "group", "--block-size", "128"];

#[test]
fn a_page_shows_every_layer_and_list_and_asks_nobody_for_anything() {
    let dir = scratch("view");
    let trace = trace(&dir);
    let run = tool(&[&VIEW[..], &["--trace", text(&trace), "--out", text(&dir)]].concat());
    assert!(run.status.success(), "{}", stderr(&run));
    let record: Value = serde_json::from_slice(&std::fs::read(dir.join("record.json")).unwrap()).unwrap();
    check_record(&record);
    assert!(
        stdout(&run).lines().any(|line| line.split_whitespace().take(2).eq(["11", ".300"])),
        "{}",
        stdout(&run)
    );

    let page = std::fs::read_to_string(dir.join("view.html")).unwrap();
    let (head, tail) = page.split_once(r#"<script type="application/json" id="record">"#).unwrap();
    let (held, tail) = tail.split_once("</script>").unwrap();
    assert_eq!(serde_json::from_str::<Value>(held).unwrap(), record);
    for outside in ["http:", "https:", "//cdn", "src=", "href=", "@import", "url(", "fetch(", "XMLHttp"] {
        assert!(!head.contains(outside) && !tail.contains(outside), "{outside}");
    }
    assert!(head.contains("default-src 'none'"));
    check_drawn(&dir.join("view.html"));

    // What was recorded is drawn again as it was.
    let again = dir.join("again");
    let run = tool(&["view", "--record", text(&dir.join("record.json")), "--out", text(&again)]);
    assert!(run.status.success(), "{}", stderr(&run));
    let redrawn = std::fs::read_to_string(again.join("view.html")).unwrap();
    // Numbers that were read back may differ in their last bit.
    assert!(redrawn.starts_with(head) && redrawn.len().abs_diff(page.len()) < 1000);
    for list in
        record["layers"].as_array().unwrap().iter().flat_map(|layer| layer["lists"].as_array().unwrap())
    {
        assert!(redrawn.contains(list["kept"].as_str().unwrap()), "{list}");
    }
}

fn check_record(record: &Value) {
    assert_eq!((record["kv_len"].as_u64(), record["past_blocks"].as_u64()), (Some(1600), Some(10)));
    let layers = record["layers"].as_array().unwrap();
    assert_eq!(layers.iter().map(|layer| layer["layer"].as_str().unwrap()).collect::<Vec<_>>(), ["2", "11"]);
    for layer in layers {
        let lists = layer["lists"].as_array().unwrap();
        // One list a KV head; sink, local and the best, 3 of 10.
        assert_eq!(lists.len(), 2);
        for list in lists {
            let kept = list["kept"].as_str().unwrap();
            let ones = kept.matches('1').count();
            assert_eq!((kept.len(), ones as u64), (10, list["kept_blocks"].as_u64().unwrap()), "{list}");
            assert_eq!(list["mass_by_block"].as_str().unwrap().len(), 20);
            assert_eq!(list["heads"].as_array().unwrap().len(), 2);
            let mass = list["mass"].as_f64().unwrap();
            assert!(mass > 0.0 && mass < 1.0, "{list}");
        }
        let mean = lists.iter().map(|list| list["density"].as_f64().unwrap()).sum::<f64>() / 2.0;
        assert!((layer["density"].as_f64().unwrap() - mean).abs() < 1e-9, "{layer}");
        let stages = layer["stages_ms"].as_object().unwrap();
        assert!(stages.len() == 5 && stages.values().all(|ms| ms.as_f64().unwrap() >= 0.0));
        let error = layer["error"].as_f64().unwrap();
        assert!(error > 0.0 && error < 1.0, "{error}");
    }
}

/// In a real browser: what its DOM is after the scripts have run, and that pixels of the maps have the colours of what
/// was read and of what always is. CI sets `COMPACTATTN_TEST_BROWSER=require`; elsewhere a machine may have none.
fn check_drawn(page: &Path) {
    let browsers = ["chromium", "chromium-browser", "google-chrome"];
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).flat_map(|dir| browsers.map(|name| dir.join(name)));
    let Some(browser) = found.into_iter().find(|file| file.is_file()) else {
        let required = std::env::var("COMPACTATTN_TEST_BROWSER").is_ok_and(|word| word == "require");
        assert!(!required, "no chromium on PATH");
        // Past the test's capture: a page that nobody has drawn is no page that was found right.
        let said = format!("NOT RUN: no chromium on PATH to draw {}\n", page.display());
        std::io::stderr().write_all(said.as_bytes()).unwrap();
        return;
    };
    let profile = page.with_file_name("profile");
    let shot = page.with_file_name("page.png");
    let run = |what: &str| {
        Command::new(&browser)
            .args(["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", what])
            .args(["--blink-settings=preferredColorScheme=1", "--window-size=1200,1400"])
            .arg(format!("--user-data-dir={}", profile.display()))
            .arg(format!("file://{}", page.display()))
            .output()
            .unwrap()
    };
    let drawn = run(&format!("--screenshot={}", shot.display()));
    assert!(shot.is_file(), "no picture: {}", stderr(&drawn));
    check_colours(&shot);
    let run = run("--dump-dom");
    let dom = stdout(&run);
    assert!(dom.contains(&format!("data-drawn=\"{}\"", LAYERS.len())), "{dom}\n{}", stderr(&run));
    for layer in LAYERS {
        assert!(dom.contains(&format!("data-layer=\"{layer}\"")), "{dom}");
        assert!(dom.contains(&format!("<summary>2 lists of layer {layer}</summary>")), "{dom}");
    }
    // Two layers and four lists, each with a row; three tables' heads.
    assert_eq!(dom.matches("<tr>").count(), 3 + 2 + 4, "{dom}");
}

/// Two maps of 60 rows of pixels and 1,100 columns: 3 of 13 blocks are open, 3 of 10 past ones were read.
fn check_colours(shot: &Path) {
    let mut reader = png::Decoder::new(std::fs::File::open(shot).unwrap()).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size()];
    let info = reader.next_frame(&mut pixels).unwrap();
    let pixels: Vec<[u8; 3]> =
        pixels.chunks(info.color_type.samples()).map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect();
    let count = |is: &dyn Fn([u8; 3]) -> bool| pixels.iter().filter(|&&pixel| is(pixel)).count();
    let open = count(&|pixel| pixel == [0xb9, 0xbe, 0xc5]);
    // A fourth of the way from the empty cell's grey to blue, or further.
    let read = count(&|[r, _, b]| b > r.saturating_add(40));
    assert!(open > 20_000 && read > 20_000, "open {open}, read {read}");
}

#[test]
fn what_is_no_record_is_refused() {
    let dir = scratch("view_refused");
    let file = dir.join("record.json");
    std::fs::write(&file, r#"{"record": 99, "layers": []}"#).unwrap();
    for (arguments, named) in [
        (["--record", text(&file)], "E_CONFIG: --record: wanted a record of version 1"),
        (["--record", "/nowhere"], "E_IO: --record"),
    ] {
        let run = tool(&[&["view", "--out", text(&dir)][..], &arguments].concat());
        assert!(run.status.code() == Some(2) && stderr(&run).contains(named), "{}", stderr(&run));
    }
    assert_eq!(tool(&["view"]).status.code(), Some(2));
}

#[test]
fn stages_say_how_long_they_took_at_the_finest_level_of_the_log() {
    let dir = scratch("spans");
    let trace = trace(&dir);
    let output = dir.join("out");
    let run = tool(&["-vv", "attend", "--input", text(&trace), "--output", text(&output), "--device", "cpu"]);
    for stage in ["select", "union", "table", "attend", "combine"] {
        let closed = stderr(&run).lines().filter(|line| line.contains(&format!("{stage}: "))).count();
        assert!(closed >= LAYERS.len(), "{stage}: {}", stderr(&run));
    }
}

#[test]
fn a_profiler_gets_a_range_for_each_stage_if_one_asks_for_them() {
    let dir = scratch("ranges");
    let (trace, output, log) = (trace(&dir), dir.join("out"), dir.join("log"));
    let profiler = profiler(&dir, &[]);
    let attend = |nvtx: &str| {
        let arguments = ["attend", "--input", text(&trace), "--output", text(&output), "--device", "cpu"];
        let mut run = Command::new(env!("CARGO_BIN_EXE_compactattn"));
        run.args(arguments).env("NVTX_INJECTION64_PATH", &profiler).env("FAKE_NVTX_LOG", &log);
        run.env("COMPACTATTN_NVTX", nvtx).output().unwrap()
    };
    assert!(attend("0").status.success() && !log.exists(), "not asked, and not even attached");
    assert!(attend("1").status.success());
    let found = std::fs::read_to_string(&log).unwrap();
    let stages = ["select", "union", "table", "attend", "combine"];
    let layer: String = stages.map(|stage| format!("(compactattn {stage})")).concat();
    assert!(found.matches(&layer).count() >= LAYERS.len(), "{found}");
    let refused = attend("maybe");
    let said = stderr(&refused);
    assert!(
        refused.status.code() == Some(2) && said.contains("E_CONFIG: COMPACTATTN_NVTX: wanted 0 or 1"),
        "{said}"
    );
}

#[test]
fn doctor_says_what_became_of_the_wish_for_ranges() {
    let dir = scratch("ranges_doctor");
    let deaf = profiler(&dir, &["-DFAKE_DEAF"]);
    for (nvtx, library, said) in [
        ("0", text(&deaf), "off"),
        ("1", "", "NVTX_INJECTION64_PATH is not set"),
        ("1", "/nowhere/p.so", "/nowhere/p.so could not be loaded"),
        ("1", text(&deaf), "has attached to no ranges"),
    ] {
        let mut run = Command::new(env!("CARGO_BIN_EXE_compactattn"));
        run.args(["doctor", "--json", "--python", "/nowhere/python3"]);
        let run = run.env("COMPACTATTN_NVTX", nvtx).env("NVTX_INJECTION64_PATH", library).output().unwrap();
        let report: Value = serde_json::from_slice(&run.stdout).unwrap();
        assert!(report["settings"]["nvtx"].as_str().unwrap().contains(said), "{nvtx} {library}: {report}");
    }
}

/// The stand-in of tests/gpu/counting_profiler.c.
fn profiler(dir: &Path, flags: &[&str]) -> PathBuf {
    let (source, out) =
        (concat!(env!("CARGO_MANIFEST_DIR"), "/tests/gpu/counting_profiler.c"), dir.join("p.so"));
    let mut cc = Command::new("cc");
    cc.args(["-std=gnu11", "-O1", "-shared", "-fPIC"]).args(flags).args(["-o", text(&out), source]);
    assert!(cc.status().unwrap().success());
    out
}

#[test]
fn counters_are_shown_again_and_again_as_json_and_over_http() {
    let dir = scratch("stats");
    for pid in [7, 8] {
        let text = format!(r#"{{"pid": {pid}, "split_steps": 12, "plans": []}}"#);
        std::fs::write(dir.join(format!("{pid}.json")), text).unwrap();
    }
    let run = tool(&["stats", text(&dir), "--watch", "0.01", "--times", "3"]);
    assert_eq!((stdout(&run).matches("pid 8\n").count(), stdout(&run).matches("\x1b[2J").count()), (3, 3));
    let run = tool(&["stats", text(&dir), "--json"]);
    let all: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!((all[0]["pid"].as_u64(), all[1]["pid"].as_u64()), (Some(7), Some(8)));
    assert_eq!(tool(&["stats", text(&dir), "--json", "--prom"]).status.code(), Some(2));

    let mut exporter = Command::new(env!("CARGO_BIN_EXE_compactattn"))
        .args(["stats", text(&dir), "--serve", "127.0.0.1:0"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    BufReader::new(exporter.stdout.take().unwrap()).read_line(&mut said).unwrap();
    let address = said.trim().strip_prefix("serving http://").unwrap().strip_suffix("/metrics").unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    exporter.kill().unwrap();
    exporter.wait().unwrap();
    assert!(answer.contains("compactattn_split_steps_total{pid=\"8\"} 12\n"), "{answer}");
}

#[test]
fn the_board_asks_for_metrics_that_are_exported() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let board = std::fs::read_to_string(root.join("docs/grafana.json")).unwrap();
    let board: Value = serde_json::from_str(&board).unwrap();
    let exported = std::fs::read_to_string(root.join("rust/cli/prometheus.rs")).unwrap();
    let panels = board["panels"].as_array().unwrap();
    let asked: Vec<_> = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap()).collect();
    assert!(asked.len() >= panels.len() && panels.len() >= 6);
    for target in asked {
        let expression = target["expr"].as_str().unwrap();
        let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let metrics: Vec<_> = words.filter(|word| word.starts_with("compactattn_")).collect();
        assert!(!metrics.is_empty(), "{expression}");
        for metric in metrics {
            assert!(exported.contains(&format!("\"{metric}\"")), "{metric} is not exported: {expression}");
        }
    }
}

#[test]
fn eval_asks_the_interpreter_beside_the_program() {
    let dir = scratch("beside");
    let program = dir.join("compactattn");
    std::fs::copy(env!("CARGO_BIN_EXE_compactattn"), &program).unwrap();
    // `echo` stands in for Python.
    std::os::unix::fs::symlink("/bin/echo", dir.join("python3")).unwrap();
    let run = Command::new(program).args(["eval", "--out", "x"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&run.stdout).trim(), "-m compactattn.eval --out x");
}

/// Two layers of four query heads over two KV heads, waves of many lengths.
fn trace(dir: &Path) -> PathBuf {
    let mut tensors = Vec::new();
    for layer in LAYERS {
        for (name, rows, heads) in [("q", 256, 4), ("k", 1600, 2), ("v", 1600, 2)] {
            let phase = (layer * 7 + name.len()) as f32 + f32::from(name.as_bytes()[0]);
            let wave = |i: usize| {
                let (row, x) = ((i / 64) as f32, (i % 64) as f32);
                bf16::from_f32(1.5 * (row * (0.05 + 0.013 * x) + phase * (1.0 + x)).sin()).to_le_bytes()
            };
            let bytes: Vec<u8> = (0..rows * heads * 64).flat_map(wave).collect();
            tensors.push((format!("layer{layer}.{name}"), vec![rows, heads, 64], bytes));
        }
    }
    let views = tensors
        .iter()
        .map(|(name, dims, bytes)| (name, TensorView::new(Dtype::BF16, dims.clone(), bytes).unwrap()));
    let path = dir.join("trace.safetensors");
    let bytes = safetensors::serialize(views, None::<HashMap<String, String>>).unwrap();
    std::fs::write(&path, bytes).unwrap();
    path
}

fn tool(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_compactattn"));
    command.args(arguments).env_remove("COMPACTATTN_MODE").env_remove("COMPACTATTN_CONFIG");
    command.output().unwrap()
}

/// An empty folder of the test's own.
fn scratch(name: &str) -> PathBuf {
    tool_run::scratch(&format!("observe_{name}"))
}
