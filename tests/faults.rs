//! Faults that a process must survive (docs/reliability.md), on tests/gpu/counting_driver.c: each ends in a status that
//! names it; nothing hangs, aborts, leaks or is half done; afterwards the context works, or says that it is lost.
//!
//! A process loads one driver once, so each fault gets a child. Faults of the driver need a build with kernels
//! (`make faults`); without one they are said to be left out. Elsewhere: 3 to 6, drivers and GPUs that cannot serve, in
//! tests/cuda_host.rs; 12, forks, in tests/capi_bad_handles.rs; 13, panics, in rust/capi/guard.rs and below; 14, a
//! log sink, in tests/log_sink.rs; 17 and 18, an engine's hooks, in tests/python/test_hooks.py.

#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small numbers")]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests that say what they did")]

mod capi_world;
mod gpu_world;

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use capi_world::{Q, World};
use compactattn::capi::{compactattn_status as status, *};
use gpu_world::*;

/// What a child said, line by line.
type Said = Vec<(String, String)>;

#[test]
fn every_call_of_the_driver_may_fail_once() {
    if !kernels() {
        return;
    }
    let driver = compile("faults");
    let whole = child(&driver, "a_life", &[]);
    assert_eq!((of(&whole, "forward"), of(&whole, "blocks")), ("OK", "0"), "{whole:?}");
    let calls: u64 = of(&whole, "calls").parse().unwrap();
    assert!(calls > 50, "{calls}");
    // 1 of 3 here, all with `COMPACTATTN_FAULTS=all`: a child takes a few hundredths of a second.
    let step = if std::env::var_os("COMPACTATTN_FAULTS").is_some() { 1 } else { 3 };
    for n in (1..=calls).step_by(step) {
        // Not 1: that is how cuFuncGetParamInfo says that a kernel has no more parameters.
        let code = [304, 2, 200, 719, 700, 999][(n % 6) as usize];
        let said = child(&driver, "a_life", &[("FAKE_FAIL", &format!("*:{n}:{code}"))]);
        judge_life(&said, n, code);
    }
}

/// 1: memory, each allocation in turn. 9: launches, each in turn. Codes that lose the context and codes that do not.
#[test]
fn each_allocation_and_each_launch_may_fail() {
    if !kernels() {
        return;
    }
    let driver = compile("each");
    let whole = child(&driver, "a_life", &[]);
    for (function, codes) in [
        ("cuMemAlloc_v2", &[2][..]),
        ("cuMemHostAlloc", &[2]),
        ("cuLaunchKernelEx", &[1, 2, 701, 700, 719]),
        ("cuModuleLoadData", &[200, 209, 2]),
    ] {
        let calls: u64 = of(&whole, function).parse().unwrap();
        for (n, &code) in (1..=calls).flat_map(|n| codes.iter().map(move |code| (n, code))) {
            let said = child(&driver, "a_life", &[("FAKE_FAIL", &format!("{function}:{n}:{code}"))]);
            judge_life(&said, n, code);
            let failed = said.iter().find(|(_, verdict)| verdict.contains("E_"));
            let (_, text) =
                failed.unwrap_or_else(|| panic!("{function} {n} {code}: nothing failed: {said:?}"));
            assert!(
                text.contains(function.trim_end_matches("_v2")) || code == 209,
                "{function} {n} {code}: {text}"
            );
        }
    }
}

/// One fault, one failure, which says the driver's function or the code's meaning; then everything works, or all is
/// lost; and nothing stays allocated either way.
fn judge_life(said: &Said, n: u64, code: i32) {
    let lost = matches!(code, 700 | 702 | 709..=719);
    let failed: Vec<_> = said.iter().filter(|(_, verdict)| verdict.contains("E_")).collect();
    let what = format!("call {n}, code {code}: {said:?}");
    assert_eq!(of(said, "end"), "OK", "{what}");
    // What a lost context held goes with it: the driver takes nothing back. And a failed free leaves its block.
    let kept = if failed.is_empty() { "1" } else { "0" };
    assert!(lost || ["0", kept].contains(&of(said, "blocks")), "leaked: {what}");
    assert!(lost || failed.len() <= 1, "{what}");
    for (_, text) in failed {
        assert!(text.is_ascii() && text.len() <= 310 && !text.contains("0x"), "{what}");
        assert!(!text.contains("E_PANIC") && !text.contains("E_INTERNAL"), "{what}");
    }
    if lost && said.iter().any(|(_, verdict)| verdict.contains("E_CONTEXT_LOST")) {
        let again = of(said, "again");
        assert!(again.is_empty() || again.starts_with("E_CONTEXT_LOST"), "{what}");
    }
}

/// 2: room for a workspace is the caller's to find, and the refusal says how much is wanted. 10: a context that another
/// kernel has lost. 21: a pool that was given back, and one at a new place. 20: another driver named too late.
#[test]
fn a_context_meets_what_engines_do_to_it() {
    if !kernels() {
        return;
    }
    let said = child(&compile("meets"), "an_engine", &[]);
    let starts = |name: &str, wanted: &str| assert!(of(&said, name).starts_with(wanted), "{name}: {said:?}");
    starts("short workspace", "E_WORKSPACE: args.workspace: wanted ");
    starts("beyond plan", "E_OVERFLOW: limits: wanted max_total_q, num_q_heads and max_kv_len ");
    starts("huge", "OK");
    starts("huge plan", "E_WORKSPACE: args.workspace: wanted ");
    starts("freed pool", "E_NOT_DEVICE: batch.k");
    starts("new pool", "OK");
    starts("other driver", "OK");
    starts("lost", "E_CONTEXT_LOST");
    starts("lost later", "E_CONTEXT_LOST");
    let micros: u64 = of(&said, "lost takes").parse().unwrap();
    assert!(micros < 1000, "{micros} us to say that a context is lost");
    starts("end", "OK");
}

/// 7: an image that is damaged, or holds nothing for this GPU.
#[test]
fn a_damaged_image_is_told_by_its_status() {
    if !kernels() {
        return;
    }
    let driver = compile("images");
    for (mode, wanted) in [("badimage", "E_IMAGE"), ("nobinary", "E_ARCH")] {
        let said = child(&driver, "a_life", &[("FAKE_CUDA", mode)]);
        assert!(said.iter().any(|(_, verdict)| verdict.starts_with(wanted)), "{mode}: {said:?}");
        assert_eq!(of(&said, "end"), "OK", "{said:?}");
    }
}

/// 8: no home, no temporary folder, nothing that could be written to.
#[test]
fn nothing_is_written_to_disk() {
    let nowhere = [("HOME", "/nonexistent"), ("TMPDIR", "/nonexistent"), ("XDG_CACHE_HOME", "/nonexistent")];
    let said = child(&compile("disk"), "on_the_cpu", &nowhere);
    assert_eq!(of(&said, "plan"), "OK", "{said:?}");
    assert_eq!(of(&said, "end"), "OK");
}

/// 11: a signal ends a process in the middle of its calls. 16: so does its own exit, with work in flight.
#[test]
fn a_process_ends_when_it_is_told_to() {
    for (name, ends_by) in [("exits_at_work", None), ("works_on", Some(libc::SIGTERM))] {
        let mut process = start(&compile(name), name, &[]);
        let start = Instant::now();
        if let Some(signal) = ends_by {
            std::thread::sleep(Duration::from_millis(500));
            // SAFETY: a child of this process that nobody has waited for.
            unsafe { libc::kill(process.id().cast_signed(), signal) };
        }
        let ended = loop {
            if let Some(ended) = process.try_wait().unwrap() {
                break ended;
            }
            assert!(start.elapsed() < Duration::from_secs(10), "{name} does not end");
            std::thread::sleep(Duration::from_millis(5));
        };
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(
            (ended.code(), ended.signal()),
            if ends_by.is_some() { (None, ends_by) } else { (Some(0), None) }
        );
    }
}

/// 15: eight threads make, use and destroy; no handle, file or byte stays.
#[test]
fn contexts_and_plans_come_and_go_on_eight_threads() {
    let said = child(&compile("threads"), "come_and_go", &[]);
    assert_eq!(of(&said, "end"), "OK", "{said:?}");
}

/// 22: NaN in one row of q stays in that row under dense lists; under others, where it may keep more blocks for whoever
/// shares its list, it stays in its request.
#[test]
fn a_row_of_nan_stays_where_it_is() {
    let mut dense = 0;
    for seed in 0..100 {
        let (clean, mut spoiled) = (World::random(seed), World::random(seed));
        let heads = spoiled.desc.num_q_heads as usize;
        let row = spoiled.memory[Q].len() / heads / spoiled.reqs.iter().map(|r| r.0 as usize).sum::<usize>();
        let token = spoiled.rng.range(0, spoiled.reqs[0].0) as usize;
        let head = spoiled.rng.range(0, heads as i32) as usize;
        let at = (token * heads + head) * row;
        // All bits set is a NaN in each of the three types.
        spoiled.memory[Q].bytes_mut()[at..at + row].fill(0xFF);
        let [clean_out, _] = clean.results();
        let [out, lse] = spoiled.results();
        let [values, _] = spoiled.floats(&[out[at..at + row].to_vec(), lse]);
        assert!(values.iter().all(|x| x.is_nan()), "seed {seed}: the row hides that it was NaN");
        let only_dense = spoiled.settings.selector == compactattn_selector::COMPACTATTN_SELECTOR_DENSE as i32;
        let mine = if only_dense { at..at + row } else { 0..spoiled.reqs[0].0 as usize * heads * row };
        assert!(
            out[..mine.start] == clean_out[..mine.start] && out[mine.end..] == clean_out[mine.end..],
            "seed {seed}"
        );
        dense += usize::from(only_dense);
        clean.close();
        spoiled.close();
    }
    assert!(dense > 5, "{dense}");
}

/// 13: a panic stops at the border, so every exported function that can fail stands behind it.
#[test]
fn every_exported_function_has_its_guard() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("rust/capi");
    let mut guarded = 0;
    for entry in std::fs::read_dir(root).unwrap().flatten() {
        let text = std::fs::read_to_string(entry.path()).unwrap();
        for body in text.split("#[unsafe(no_mangle)]").skip(1) {
            let name = body.split("fn ").nth(1).and_then(|rest| rest.split('(').next()).unwrap_or("?");
            let fails =
                body.split('{').next().is_some_and(|signature| signature.contains("-> compactattn_status"));
            // Those on a plan share a body that has it.
            let guarded_inside = ["guard(", "on_plan("].iter().any(|inside| body.contains(inside));
            assert!(!fails || guarded_inside, "{name} has no guard");
            guarded += usize::from(fails);
        }
    }
    assert!(guarded >= 19, "{guarded}");
}

/// 19: nothing that computes asks what time it is.
#[test]
fn no_result_depends_on_the_wall_clock() {
    let mut folders = vec![std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("rust")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            match path.is_dir() {
                true if !path.ends_with("cli") => folders.push(path),
                true => {}
                false => {
                    let text = std::fs::read_to_string(&path).unwrap();
                    assert!(!text.contains("SystemTime"), "{}", path.display());
                }
            }
        }
    }
}

// ---- children ----

/// A context, a plan and two calls, as far as it gets.
#[test]
#[ignore = "run by the others, with a driver in its environment"]
fn a_life() {
    let (mut context, mut plan) = (std::ptr::null_mut(), std::ptr::null_mut());
    let driver = Driver::open();
    if say("context", create_context(&mut context)) {
        // A caller that is refused once asks again.
        let made = say("plan", create_plan(context, &desc(), &mut plan));
        if made || say("plan again", create_plan(context, &desc(), &mut plan)) {
            let call = Call::new(&driver, plan);
            say("forward", call.forward(plan));
            say("again", call.forward(plan));
            for address in call.memory {
                driver.free(address);
            }
        }
        say("destroy plan", compactattn_plan_destroy(plan));
        say("destroy context", compactattn_context_destroy(context));
    }
    println!("said calls: {}", driver.calls("*"));
    for function in ["cuMemAlloc_v2", "cuMemHostAlloc", "cuLaunchKernelEx", "cuModuleLoadData"] {
        println!("said {function}: {}", driver.calls(function));
    }
    println!("said blocks: {}", driver.number(c"fake_blocks"));
    println!("said end: OK");
}

#[test]
#[ignore = "run by the others, with a driver in its environment"]
fn an_engine() {
    let (mut context, mut plan) = (std::ptr::null_mut(), std::ptr::null_mut());
    let driver = Driver::open();
    say("context", create_context(&mut context));
    say("plan", create_plan(context, &desc(), &mut plan));
    let mut call = Call::new(&driver, plan);
    say("forward", call.forward(plan));
    let enough = call.args.workspace_bytes;
    call.args.workspace_bytes = enough - 1;
    say("short workspace", call.forward(plan));
    call.args.workspace_bytes = enough;
    let mut huge = desc();
    (huge.max_total_q, huge.max_kv_len, huge.max_num_reqs) = (1 << 20, 1 << 24, 1024);
    let mut large = std::ptr::null_mut();
    say("beyond plan", create_plan(context, &huge, &mut large));
    huge.max_kv_len = 1 << 22;
    say("huge", create_plan(context, &huge, &mut large));
    say("huge plan", call.forward(large));
    say("destroy huge", compactattn_plan_destroy(large));
    let pool = call.batch.k.data;
    driver.free(pool.addr() as u64);
    say("freed pool", call.forward(plan));
    call.batch.k.data = std::ptr::with_exposed_provenance_mut(
        driver.alloc(call.batch.k.storage_bytes.unsigned_abs() as usize) as usize,
    );
    say("new pool", call.forward(plan));
    // SAFETY: no other thread of this child reads the environment.
    unsafe { std::env::set_var("COMPACTATTN_LIBCUDA", "/nowhere/libcuda.so") };
    say("other driver", call.forward(plan));
    driver.set_mode("lost");
    say("lost", call.forward(plan));
    let start = Instant::now();
    let later = call.forward(plan);
    println!("said lost takes: {}", start.elapsed().as_micros());
    say("lost later", later);
    say("destroy plan", compactattn_plan_destroy(plan));
    say("destroy context", compactattn_context_destroy(context));
    println!("said end: OK");
}

#[test]
#[ignore = "run by the others"]
fn on_the_cpu() {
    let (context, mut plan) = (cpu_context(), std::ptr::null_mut());
    say("plan", create_plan(context, &desc(), &mut plan));
    say("destroy plan", compactattn_plan_destroy(plan));
    say("destroy context", compactattn_context_destroy(context));
    println!("said end: OK");
}

#[test]
#[ignore = "run by the others"]
fn exits_at_work() {
    at_work();
    std::thread::sleep(Duration::from_millis(200));
    std::process::exit(0);
}

#[test]
#[ignore = "run by the others"]
fn works_on() {
    at_work();
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
#[ignore = "run by the others"]
fn come_and_go() {
    let rounds = 1250;
    let before = level();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..rounds {
                    let (context, mut plan) = (cpu_context(), std::ptr::null_mut());
                    assert_eq!(create_plan(context, &desc(), &mut plan), status::COMPACTATTN_OK);
                    assert!(workspace_bytes(plan) > 0);
                    assert_eq!(compactattn_context_destroy(context), status::COMPACTATTN_OK);
                    assert_eq!(compactattn_plan_destroy(plan), status::COMPACTATTN_OK);
                    assert_eq!(compactattn_plan_destroy(plan), status::COMPACTATTN_E_HANDLE);
                }
            });
        }
    });
    let after = level();
    // A handle and its plan are a kilobyte at least: 10,000 of them are more than an allocator's slack.
    assert!(after.0 < before.0 + (8 << 20), "{before:?}, then {after:?}");
    assert_eq!(after.1, before.1, "files stay open");
    println!("said end: OK");
}

/// Resident bytes and open files.
fn level() -> (usize, usize) {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = statm.split(' ').nth(1).unwrap().parse().unwrap();
    (pages * 4096, std::fs::read_dir("/proc/self/fd").unwrap().count())
}

/// Threads that make plans for as long as the process lives.
fn at_work() {
    for _ in 0..4 {
        std::thread::spawn(|| {
            let context = cpu_context();
            loop {
                let mut plan = std::ptr::null_mut();
                assert_eq!(create_plan(context, &desc(), &mut plan), status::COMPACTATTN_OK);
                assert_eq!(compactattn_plan_destroy(plan), status::COMPACTATTN_OK);
            }
        });
    }
}

fn cpu_context() -> *mut compactattn_context {
    let desc = compactattn_context_desc {
        struct_size: u32::try_from(size_of::<compactattn_context_desc>()).unwrap(),
        abi_version: compactattn_abi_version(),
        device_kind: compactattn_device_kind::COMPACTATTN_DEVICE_CPU as i32,
        num_threads: 1,
        ..zeroed()
    };
    let mut context = std::ptr::null_mut();
    // SAFETY: both point to locals.
    let made = unsafe { compactattn_context_create(&raw const desc, &raw mut context) };
    assert_eq!(made, status::COMPACTATTN_OK);
    context
}

/// Prints what a call ended in; whether that was well.
fn say(name: &str, got: status) -> bool {
    let ok = got == status::COMPACTATTN_OK;
    println!("said {name}: {}", if ok { "OK".to_owned() } else { last_error() });
    ok
}

// ---- parents ----

/// Runs one of the children to its end, which must come within 20 seconds and by itself.
fn child(driver: &std::path::Path, name: &str, env: &[(&str, &str)]) -> Said {
    let mut process = start(driver, name, env);
    let start = Instant::now();
    let ended = loop {
        if let Some(ended) = process.try_wait().unwrap() {
            break ended;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "{name} {env:?} hangs");
        std::thread::sleep(Duration::from_millis(1));
    };
    let mut out = String::new();
    process.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    assert!(ended.success(), "{name} {env:?}: {ended}\n{out}");
    let said = out.lines().filter_map(|line| line.split_once("said ")?.1.split_once(": "));
    said.map(|(name, verdict)| (name.to_owned(), verdict.to_owned())).collect()
}

fn start(driver: &std::path::Path, name: &str, env: &[(&str, &str)]) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--ignored", "--nocapture"])
        .env("COMPACTATTN_LIBCUDA", driver)
        .envs(env.iter().copied())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn of<'a>(said: &'a Said, name: &str) -> &'a str {
    said.iter().find(|(what, _)| what == name).map_or("", |(_, verdict)| verdict)
}

fn kernels() -> bool {
    let built = !compactattn::cuda::architectures().is_empty();
    if !built {
        println!("not run: this build has no kernels (make faults builds one)");
    }
    built
}
