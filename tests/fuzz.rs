//! Bytes and calls that nobody would write, many of them: gates G4 and G11.
//!
//! `make fuzz` runs a million calls and longer mutations; `cargo test` a few seconds of each. A failure prints the line
//! that repeats it: COMPACTATTN_FUZZ names a target, a seed and a case.

#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small numbers")]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests that say what they did")]

mod capi_world;
mod fuzz_targets;
mod gpu_world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::time::{Duration, Instant};

use capi_world::memory::Rng;
use capi_world::{CU, LENS, TABLE, World};
use compactattn::capi::{compactattn_status as status, *};
use fuzz_targets::{TARGETS, seeds, sound};
use gpu_world::{Call, Driver};

/// Every parser on mutations of its seeds.
#[test]
fn no_bytes_break_a_parser() {
    for (name, target) in TARGETS {
        let seeds = seeds(name);
        let done = run(name, (u64::MAX, seconds(3)), |rng| {
            let mut bytes = rng.pick(&seeds).clone();
            for _ in 0..rng.range(1, 12) {
                mutate(&mut bytes, rng);
            }
            target(&bytes);
        });
        assert!(done > 100, "{name}: {done}");
    }
}

/// Seeds themselves: what is well formed is taken.
#[test]
fn what_mutations_start_from_is_sound() {
    for (name, target) in TARGETS {
        seeds(name).iter().for_each(|bytes| target(bytes));
    }
}

/// Calls on a CPU context whose numbers are garbage; memory is as large as its storage says, so nothing else may be
/// touched.
#[test]
fn no_call_with_garbage_breaks_a_cpu_context() {
    let calls = run("cpu", (50_000, seconds(8)), |rng| {
        let mut world = World::random(rng.next().into());
        for _ in 0..20 {
            garbage_on_cpu(&mut world, rng);
        }
        assert!(world.canaries_hold());
        world.close();
    });
    println!("{} calls", calls * 20);
}

/// The same on the fake driver, where addresses may be garbage too: they are asked about, never followed.
#[test]
fn no_call_with_garbage_breaks_a_cuda_context() {
    if compactattn::cuda::architectures().is_empty() {
        println!("not run: this build has no kernels (make fuzz builds one)");
        return;
    }
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "garbage_on_this_driver", "--ignored", "--nocapture"])
        .env("COMPACTATTN_LIBCUDA", gpu_world::compile("fuzz"))
        .output()
        .unwrap();
    let out = String::from_utf8_lossy(&child.stdout).into_owned();
    assert!(child.status.success(), "{}\n{out}{}", child.status, String::from_utf8_lossy(&child.stderr));
    print!("{out}");
}

#[test]
#[ignore = "run by the one above, with a driver in its environment"]
fn garbage_on_this_driver() {
    let driver = Driver::open();
    let (mut context, mut plan) = (std::ptr::null_mut(), std::ptr::null_mut());
    assert_eq!(gpu_world::create_context(&mut context), status::COMPACTATTN_OK);
    assert_eq!(gpu_world::create_plan(context, &gpu_world::desc(), &mut plan), status::COMPACTATTN_OK);
    let mut call = Call::new(&driver, plan);
    let (batch, args) = (*call.batch, call.args);
    let done = run("cuda", (1_000_000, seconds(8)), |rng| {
        (*call.batch, call.args) = (batch, args);
        call.args.batch = &raw const *call.batch;
        for _ in 0..rng.range(1, 5) {
            garbage(&mut call.batch, &mut call.args, rng, true);
        }
        sound(call.forward(plan));
    });
    (*call.batch, call.args) = (batch, args);
    call.args.batch = &raw const *call.batch;
    assert_eq!(call.forward(plan), status::COMPACTATTN_OK, "{}", gpu_world::last_error());
    println!("{done} calls on the fake driver");
}

/// One call of which some numbers are garbage, or whose lengths and table are.
fn garbage_on_cpu(world: &mut World, rng: &mut Rng) {
    let (batch, args) = (*world.batch, world.args);
    let parts = [CU, LENS, TABLE].map(|part| world.memory[part].bytes().to_vec());
    if rng.range(0, 2) == 0 {
        for _ in 0..rng.range(1, 4) {
            garbage(&mut world.batch, &mut world.args, rng, false);
        }
    } else {
        let part = *rng.pick(&[CU, LENS, TABLE]);
        let ints = world.memory[part].ints_mut();
        for _ in 0..rng.range(1, 4) {
            let i = rng.range(0, ints.len() as i32) as usize;
            ints[i] = number(rng) as i32;
        }
    }
    sound(world.forward());
    (*world.batch, world.args) = (batch, args);
    world.args.batch = &raw const *world.batch;
    for (part, bytes) in [CU, LENS, TABLE].into_iter().zip(parts) {
        world.memory[part].bytes_mut().copy_from_slice(&bytes);
    }
}

/// Garbage in one field. Where memory is real, its address and size stay what they are.
fn garbage(
    batch: &mut compactattn_batch,
    args: &mut compactattn_forward_args,
    rng: &mut Rng,
    anywhere: bool,
) {
    let value = number(rng);
    let tensors = [
        &mut batch.q,
        &mut batch.k,
        &mut batch.v,
        &mut batch.cu_seqlens_q,
        &mut batch.seq_lens,
        &mut batch.block_table,
        &mut args.out,
        &mut args.lse,
    ];
    let i = rng.range(0, 8) as usize;
    if let Some(tensor) = tensors.into_iter().nth(i).filter(|_| rng.range(0, 4) > 0) {
        let at = rng.range(0, 4) as usize;
        match rng.range(0, if anywhere { 8 } else { 6 }) {
            0 => tensor.shape[at] = value,
            1 => tensor.stride[at] = value,
            2 => tensor.dtype = value as i32,
            3 => tensor.ndim = value as i32,
            4 => tensor.device_kind = value as i32,
            5 => tensor.device_ordinal = value as i32,
            6 => tensor.storage_bytes = value,
            _ => tensor.data = std::ptr::without_provenance_mut(value as usize),
        }
        return;
    }
    match rng.range(0, if anywhere { 6 } else { 3 }) {
        0 => args.layer = value as i32,
        1 => batch.reserved = value as u32,
        2 => args.workspace_bytes = value.min(args.workspace_bytes),
        3 => args.workspace_bytes = value,
        4 => args.workspace = std::ptr::without_provenance_mut(value as usize),
        _ => batch.workspace = std::ptr::without_provenance_mut(value as usize),
    }
}

/// Numbers that break things: borders of every width, and any.
fn number(rng: &mut Rng) -> i64 {
    let wide = i64::from(rng.next()) << 32 | i64::from(rng.next());
    let shift = rng.range(0, 64) as u32;
    let near = i64::from(rng.range(-2, 3));
    match rng.range(0, 5) {
        0 => near,
        1 => 1_i64.wrapping_shl(shift).wrapping_add(near),
        2 => i64::MAX.wrapping_add(near),
        3 => wide >> shift,
        _ => i64::from(rng.range(0, 200)),
    }
}

fn mutate(bytes: &mut Vec<u8>, rng: &mut Rng) {
    let at = rng.range(0, bytes.len().max(1) as i32) as usize;
    let end = (at + rng.range(1, 16) as usize).min(bytes.len());
    match rng.range(0, 7) {
        0 if at < bytes.len() => bytes[at] ^= 1 << rng.range(0, 8),
        1 if at < bytes.len() => bytes[at] = rng.next() as u8,
        2 if bytes.len() < 1 << 16 => bytes.insert(at.min(bytes.len()), rng.next() as u8),
        3 if at < end => drop(bytes.drain(at..end)),
        4 if at < end => {
            let piece = bytes[at..end].to_vec();
            let to = rng.range(0, bytes.len() as i32) as usize;
            bytes.splice(to..to, piece);
        }
        5 if at + 8 <= bytes.len() => {
            let value = number(rng).to_le_bytes();
            bytes[at..at + 8].copy_from_slice(&value);
        }
        _ => {
            let words =
                ["-1", "1e999", "null", "{}", "[[", "\"", "18446744073709551616", "\u{0}", "true", "\\u0000"];
            let word = rng.pick(&words).as_bytes().to_vec();
            let to = at.min(bytes.len());
            bytes.splice(to..to, word);
        }
    }
}

/// Runs numbered cases until there are as many or time is up; how many.
fn run(name: &str, (most, time): (u64, Duration), mut one: impl FnMut(&mut Rng)) -> u64 {
    let (wanted, seed, only) = asked();
    if wanted.as_deref().is_some_and(|wanted| wanted != name) {
        return u64::MAX;
    }
    let start = Instant::now();
    let mut done = 0;
    let first = only.unwrap_or(0);
    while done < only.map_or(most, |_| 1) && start.elapsed() < time {
        let case = first + done;
        let mut rng = Rng::new(seed.wrapping_mul(0x9E37_79B9).wrapping_add(case));
        if catch_unwind(AssertUnwindSafe(|| one(&mut rng))).is_err() {
            panic!("COMPACTATTN_FUZZ={name}:{seed}:{case} cargo test --release --test fuzz");
        }
        done += 1;
    }
    println!("{name}: seed {seed}, {done} cases in {:.1} s", start.elapsed().as_secs_f64());
    if only.is_some() { u64::MAX } else { done }
}

/// Target, seed and case of COMPACTATTN_FUZZ.
fn asked() -> (Option<String>, u64, Option<u64>) {
    let text = std::env::var("COMPACTATTN_FUZZ").unwrap_or_default();
    let mut parts = text.split(':');
    let name = parts.next().filter(|name| !name.is_empty()).map(str::to_owned);
    let mut number = || parts.next().and_then(|part| part.parse().ok());
    (name, number().unwrap_or(1), number())
}

/// COMPACTATTN_FUZZ_SECONDS for each target, or a few.
fn seconds(few: u64) -> Duration {
    let asked = std::env::var("COMPACTATTN_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(asked.unwrap_or(few))
}
