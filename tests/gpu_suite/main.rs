//! GPU tests in one program, carried to a GPU machine as it is: no cargo, no files beside it.
//!
//! Every call goes through the C ABI, on a context of GPU 0 (`--device cpu`: of the CPU, which tests these tests).
//! Results are judged by the f64 oracle on the host. Without arguments a short part of each runs; without a GPU, or
//! in a build without kernels, that is said and is no failure. tests/gpu/run.sh runs all of it.
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::print_stdout,
    clippy::wildcard_imports,
    reason = "sizes of tests are small; a test's output is its report; the C ABI is one flat list of names"
)]

mod abi;
mod bad_input;
mod big_pool;
mod cases;
mod check;
mod checked;
mod classes;
mod combine;
#[path = "../common/mod.rs"]
mod common;
mod counters;
mod device;
mod differential;
mod driver;
mod engine;
mod exact;
mod exports;
mod gate;
mod graph;
mod laws;
mod levels;
mod means;
mod memory;
mod metamorphic;
mod perturb;
mod repeats;
mod reuse;
mod rounds;
mod rows;
mod scenes;
mod soak;
mod spoils;
mod stale;
mod step;
mod tables;
mod views;

use std::process::ExitCode;
use std::time::Instant;

use compactattn::types::Dtype;
use device::{Device, Missing};
use differential::Range;
use memory::Packing;
use rounds::Rounds;

const USAGE: &str = "gpu_suite [PART] [OPTION VALUE]...
  differential      random cases against the f64 oracle   --cases 20000 --seed 1 --case I --threads N
  laws              each request of batches of 16 alone
  metamorphic       laws M1 to M12                        --count (of each) --seed --case --seconds
  means             mean correction over lists of the caller's own    --count --seed --case --seconds
  tables            corrupted block tables, canary pages  --count --seed --case --seconds --apart 1
  big-pool          pools of more than 2^31 elements      --count 200 --seed --case --seconds
  reuse             pages another tenant has used         --count --seed --case --seconds
  exact             contents for which the output is exact, bit by bit    --count --seed --case --seconds
  soak              an engine's life: arrivals, aborts, a full pool, modes    --seconds --count (steps) --seed
                    --kv e4m3; --shared 1 beside others on the GPU: its free memory and time are not judged, the
                    library's own is, by the counting driver of counters; --leak 1 leaks, to see it found
  stale             summaries kept while pages are used again     --count
  combine           two results merged, against f64       --count
  gate              selector attn_gate, its weights in every form  --count
  sanitizer-cases   40 small cases through every kernel, for compute-sanitizer
  repeats           bits over repeats                     --count 1000
  perturb           bits over repeats beside a hog of bandwidth    --count 1000 --seed
  graph             replays against eager calls           --replays 1000
  counters          no synchronisation, no allocation     (FAKE_CUDA=forward COMPACTATTN_LIBCUDA=libcounting_driver.so)
  checked           tables damaged before attend            --count --seed --case (COMPACTATTN_CHECK=1)
  classes           the table of bad inputs, class by class  --count --seed --case --seconds
  bad-input         what must be refused with a GPU at hand, and how
  quick             a little of each (the default)
 --device cpu runs a part on the CPU context; --seconds S starts no case after S seconds.";

struct Options {
    part: String,
    cpu: bool,
    cases: u64,
    seed: u64,
    case: Option<u64>,
    threads: usize,
    count: usize,
    replays: usize,
    seconds: u64,
    apart: bool,
    kv: Dtype,
    shared: bool,
    leak: bool,
}

/// Parts of [`USAGE`], in the order they run.
const PARTS: [&str; 20] = [
    "differential",
    "exact",
    "laws",
    "means",
    "metamorphic",
    "tables",
    "reuse",
    "big-pool",
    "soak",
    "stale",
    "combine",
    "gate",
    "sanitizer-cases",
    "repeats",
    "perturb",
    "graph",
    "counters",
    "checked",
    "classes",
    "bad-input",
];

fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(options) => options,
        // Cargo hands its filters and switches to every test: none of ours is meant.
        Err(why) if by_cargo() => {
            println!("gpu_suite: filtered out ({why})");
            return ExitCode::SUCCESS;
        }
        Err(why) => {
            eprintln!("{why}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let device = match if options.cpu { Device::cpu() } else { Device::gpu() } {
        Ok(device) => device,
        Err(Missing::NoGpu(why)) => {
            let parts = if options.part == "quick" { PARTS.len() } else { 1 };
            println!("no GPU: {parts} parts not run ({why})");
            // Whoever names a part wants it run; to cargo it may be the name of another file's test.
            return ExitCode::from(if options.part == "quick" || by_cargo() { 0 } else { 3 });
        }
        Err(Missing::Fault(why)) => {
            println!("no context: {why}");
            return ExitCode::FAILURE;
        }
    };
    println!("gpu_suite {} on {}", options.part, device.describe());
    let right = run(&device, &options);
    println!("{}", if right { "PASS" } else { "FAIL" });
    // A broken GPU context cannot be closed, and need not be.
    if right {
        device.close();
    }
    ExitCode::from(u8::from(!right))
}

fn by_cargo() -> bool {
    std::env::var_os("CARGO").is_some()
}

fn run(device: &Device, options: &Options) -> bool {
    let quick = options.part == "quick";
    let parts: Vec<&'static str> = PARTS.into_iter().filter(|&part| quick || part == options.part).collect();
    let mut right = true;
    for part in parts {
        let start = Instant::now();
        let passed = run_part(device, options, part, quick);
        let verdict = if passed { "ok" } else { "FAILED" };
        println!("{part}: {verdict}, {:.1} s", start.elapsed().as_secs_f64());
        right &= passed;
    }
    right
}

fn run_part(device: &Device, options: &Options, part: &'static str, quick: bool) -> bool {
    let few = |full: usize| if quick { full.min(20) } else { full };
    match part {
        "differential" => {
            let count = if quick { 200 } else { options.cases };
            let (first, count) = options.case.map_or((0, count), |case| (case, 1));
            let until = options.rounds(part, quick).until();
            let range = Range { seed: options.seed, first, count, threads: options.threads, until };
            differential::run(device, range)
        }
        "laws" => differential::batches_of_16(device),
        "means" => means::run(device, &options.rounds(part, quick)),
        "metamorphic" => metamorphic::run(device, &options.rounds(part, quick)),
        "exact" => exact::run(device, &options.rounds(part, quick)),
        "tables" => tables::run(device, &options.rounds(part, quick)),
        "reuse" => reuse::run(device, &options.rounds(part, quick)),
        "big-pool" => big_pool::run(device, &options.rounds(part, quick)),
        "soak" => soak::run(device, &options.rounds(part, quick)),
        "classes" => classes::run(device, &options.rounds(part, quick)),
        "perturb" => perturb::run(device, few(options.count), options.seed),
        "stale" => stale::run(device, few(options.count)),
        "combine" => combine::run(device, few(options.count.min(200)), Packing::Together),
        "gate" => gate::run(device, few(options.count.min(120)), Packing::Together),
        "sanitizer-cases" => {
            repeats::miniatures(device)
                & gate::run(device, 6, Packing::Apart)
                & combine::run(device, 6, Packing::Apart)
        }
        "repeats" => repeats::run(device, few(options.count)),
        "graph" => graph::run(device, few(options.replays)),
        // The counting driver must be there before the context is made, so a quick run does without.
        "counters" if quick && !counters::available() => {
            println!("  not run: {}", counters::WANTED);
            true
        }
        "counters" => counters::run(device),
        "checked" if quick && !checked::available(device) => {
            println!("  not run: {}", checked::WANTED);
            true
        }
        "checked" => checked::run(device, &options.rounds(part, quick)),
        _ => bad_input::run(device),
    }
}

impl Options {
    fn rounds(&self, part: &'static str, quick: bool) -> Rounds {
        let few = match part {
            "metamorphic" => 4,
            "means" => 12,
            "soak" => 400,
            _ => 40,
        };
        Rounds {
            part,
            seed: self.seed,
            case: self.case,
            count: if quick { few } else { self.count as u64 },
            seconds: self.seconds,
            threads: self.threads,
            kv: self.kv,
            shared: self.shared,
            leak: self.leak,
            packing: if self.apart { Packing::Apart } else { Packing::Together },
        }
    }
}

fn parse(args: impl Iterator<Item = String>) -> Result<Options, String> {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut options = Options {
        part: "quick".into(),
        cpu: false,
        cases: 20_000,
        seed: 1,
        case: None,
        threads,
        count: 1000,
        replays: 1000,
        seconds: 0,
        apart: false,
        kv: Dtype::Bf16,
        shared: false,
        leak: false,
    };
    let mut args = args.peekable();
    if let Some(part) = args.next_if(|arg| !arg.starts_with('-')) {
        if part != "quick" && !PARTS.contains(&part.as_str()) {
            return Err(format!("no part {part}"));
        }
        options.part = part;
    }
    while let Some(name) = args.next() {
        let value = args.next().ok_or_else(|| format!("{name} needs a value"))?;
        let number = || value.parse::<u64>().map_err(|e| format!("{name} {value}: {e}"));
        match name.as_str() {
            "--device" if value == "cpu" || value == "cuda" => options.cpu = value == "cpu",
            "--cases" => options.cases = number()?,
            "--seed" => options.seed = number()?,
            "--case" => options.case = Some(number()?),
            "--threads" => options.threads = number()?.max(1) as usize,
            "--count" => options.count = number()? as usize,
            "--seconds" => options.seconds = number()?,
            "--kv" if value == "e4m3" || value == "bf16" => {
                options.kv = if value == "e4m3" { Dtype::E4m3 } else { Dtype::Bf16 };
            }
            "--shared" => options.shared = number()? > 0,
            "--leak" => options.leak = number()? > 0,
            "--apart" => options.apart = number()? > 0,
            "--replays" => options.replays = number()? as usize,
            _ => return Err(format!("no option {name} {value}")),
        }
    }
    Ok(options)
}
