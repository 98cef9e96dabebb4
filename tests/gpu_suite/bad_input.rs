//! What a GPU context must refuse, and how: by status before anything runs, or on the device, request by request.
//!
//! Numbers are those of the table of bad inputs (tests/capi_bad_*.rs hold the classes that need no GPU). Not here: 32
//! (no fp8 cache is offered), 65 as far as destroyed streams go (no driver tells them from live ones), 67 (needs a GPU
//! without kernels).

use std::process::Command;

use compactattn::capi::{compactattn_status as status, *};
use compactattn::settings::Selector;
use compactattn::types::Dtype;

use super::abi::Refusal;
use super::check::Worker;
use super::device::{Device, last_error};
use super::driver::Cuda;
use super::memory::Packing;
use super::scenes;
use super::step::{Done, Given, Step};
use crate::common::case::{Case, Lens};
use crate::common::rng::Rng;

/// A change to a good call.
pub(crate) type Spoil<'a> = dyn Fn(&mut compactattn_batch, &mut compactattn_forward_args) + 'a;

pub(crate) fn run(device: &Device) -> bool {
    let mut right = said("68: a driver that is missing, or none at all", &drivers());
    let Some(cuda) = &device.cuda else {
        println!("  40-43, 46-58, 64-66 not run: they need a GPU context");
        return right;
    };
    right &= said("40, 43, 46: memory that is not the device's", &foreign_memory(device, cuda));
    right &= said("41, 42: tensors said to be elsewhere", &other_devices(device, cuda));
    right &= said("64-66: streams and capture", &streams(device, cuda));
    right &= said("47-58: lengths and tables, on the device", &contents(device));
    if cuda.devices() < 2 {
        println!("  46 in part: one GPU, so no workspace on another");
    }
    right
}

fn said(what: &str, verdict: &Done) -> bool {
    if let Err(why) = verdict {
        println!("  {what}: {why}");
    }
    verdict.is_ok()
}

fn case_of(selector: Selector) -> Case {
    let shape = scenes::shape([4, 2], 128, 16, Dtype::Bf16);
    let lens = [Lens { q: 40, kv: 300 }, Lens { q: 30, kv: 220 }, Lens { q: 25, kv: 180 }];
    let mut case = Case::with(&mut Rng::new(11), shape, scenes::settings(selector, 32), &lens);
    // Room for lengths that the row of the table holds and the plan's limit does not.
    case.limits.max_kv_len = 300;
    case
}

/// Runs `body` on a step that has given a good result, and sees that a good call gives the same bits after it.
fn on_good_step(device: &Device, selector: Selector, body: impl FnOnce(&mut Step) -> Done) -> Done {
    let case = case_of(selector);
    let mut worker = Worker::new(device, Packing::Together);
    let stream = worker.stream;
    let made = Step::new(device, &mut worker.memory, &case, &Given::Nothing, stream);
    let mut step = made.map_err(|e| match e {
        Refusal::Unsupported(why) | Refusal::Fault(why) => why,
    })?;
    step.update_summaries()?;
    let good = results(&step, status::COMPACTATTN_OK, &|_, _| {})?;
    body(&mut step)?;
    let again = results(&step, status::COMPACTATTN_OK, &|_, _| {})?;
    if again == good { Ok(()) } else { Err("a good call after it has other bits".into()) }
}

/// out and lse of a call that ends in `want`; untouched if that is a refusal.
pub(crate) fn results(step: &Step, want: status, spoil: &Spoil) -> Result<[Vec<u8>; 2], String> {
    step.poison_results();
    let poison = step.parts.whole.map(|part| step.memory.get(part));
    let got = step.forward_with(spoil);
    if got != want {
        return Err(format!("{got:?}, not {want:?} ({})", last_error()));
    }
    let results = step.parts.whole.map(|part| step.memory.get(part));
    if want != status::COMPACTATTN_OK && results != poison {
        return Err(format!("{want:?}, but something was written"));
    }
    Ok(results)
}

fn refused(step: &Step, want: status, name: &str, spoil: &Spoil) -> Done {
    results(step, want, spoil).map_err(|e| format!("{name}: {e}"))?;
    let text = last_error();
    if text.contains(name) { Ok(()) } else { Err(format!("{text:?} does not name {name}")) }
}

/// Tensors of a call by their names in messages.
pub(crate) fn tensors<'a>(
    batch: &'a mut compactattn_batch,
    args: &'a mut compactattn_forward_args,
) -> [(&'static str, &'a mut compactattn_tensor); 8] {
    [
        ("batch.q", &mut batch.q),
        ("batch.k", &mut batch.k),
        ("batch.v", &mut batch.v),
        ("batch.cu_seqlens_q", &mut batch.cu_seqlens_q),
        ("batch.seq_lens", &mut batch.seq_lens),
        ("batch.block_table", &mut batch.block_table),
        ("args.out", &mut args.out),
        ("args.lse", &mut args.lse),
    ]
}

const NAMES: [&str; 8] = [
    "batch.q",
    "batch.k",
    "batch.v",
    "batch.cu_seqlens_q",
    "batch.seq_lens",
    "batch.block_table",
    "args.out",
    "args.lse",
];

/// Host memory, and freed memory, where each tensor and the workspace should be.
fn foreign_memory(device: &Device, cuda: &Cuda) -> Done {
    on_good_step(device, Selector::SampledExact, |step| {
        let mut host = vec![0_u64; 1 << 20];
        let host = host.as_mut_ptr().wrapping_byte_add(256 - host.as_ptr().addr() % 256);
        let freed = cuda.alloc(64 << 20);
        cuda.free(freed);
        let freed = std::ptr::with_exposed_provenance_mut::<u64>(freed as usize);
        for (i, name) in NAMES.into_iter().enumerate() {
            for data in [host, freed] {
                refused(step, status::COMPACTATTN_E_NOT_DEVICE, name, &|batch, args| {
                    tensors(batch, args)[i].1.data = data.cast();
                })?;
            }
        }
        for data in [host, freed] {
            refused(step, status::COMPACTATTN_E_NOT_DEVICE, "workspace", &|_, args| {
                args.workspace = data.cast();
            })?;
        }
        Ok(())
    })
}

/// Tensors said to lie on the host, or on another GPU.
fn other_devices(device: &Device, cuda: &Cuda) -> Done {
    on_good_step(device, Selector::Dense, |step| {
        for (i, name) in NAMES.into_iter().enumerate() {
            for (kind, ordinal) in [
                (compactattn_device_kind::COMPACTATTN_DEVICE_CPU, 0),
                (compactattn_device_kind::COMPACTATTN_DEVICE_CUDA, cuda.devices()),
            ] {
                refused(step, status::COMPACTATTN_E_DEVICE, name, &|batch, args| {
                    let tensor = &mut *tensors(batch, args)[i].1;
                    (tensor.device_kind, tensor.device_ordinal) = (kind as i32, ordinal);
                })?;
            }
        }
        Ok(())
    })
}

/// A foreign context's stream is refused; so is the legacy stream, and a stage that must wait, while a capture runs,
/// without breaking it.
fn streams(device: &Device, cuda: &Cuda) -> Done {
    on_good_step(device, Selector::SampledExact, |step| {
        let (stream, context) = cuda.foreign_stream();
        let foreign = refused(step, status::COMPACTATTN_E_STREAM, "stream", &|_, args| {
            args.stream = stream;
        });
        cuda.destroy_context(context);
        foreign?;
        let (graph, answers) = cuda.capture(step.stream, || {
            let legacy = step.forward_with(|_, args| args.stream = std::ptr::null_mut());
            let text = last_error();
            (legacy, text, step.stages(), step.forward())
        });
        let (legacy, text, stages, captured) = answers;
        if legacy != status::COMPACTATTN_E_CAPTURE {
            return Err(format!("legacy stream under capture: {legacy:?}, {text}"));
        }
        match stages {
            Err(text) if text.contains("E_CAPTURE") => {}
            other => return Err(format!("a stage on the legacy stream under capture: {other:?}")),
        }
        captured.map_err(|e| format!("the capture beside them: {e}"))?;
        graph.map(|_| ()).map_err(|e| format!("the capture was broken: {e}"))?;
        if cuda.current().is_null() { Err("the thread lost its context".into()) } else { Ok(()) }
    })
}

/// What is refused on the device, for selectors that read lengths and tables in kernels of their own.
fn contents(device: &Device) -> Done {
    for selector in [Selector::Dense, Selector::SampledExact, Selector::FlashPrefill] {
        let of = |e: String| format!("{}: {e}", selector.name());
        for req in 0..3 {
            on_good_step(device, selector, |step| refused_request(step, req)).map_err(of)?;
        }
        on_good_step(device, selector, broken_offsets).map_err(of)?;
    }
    Ok(())
}

/// A request refused on the device gives what an empty one gives: out 0, lse -inf, all others as if it were not there.
fn refused_request(step: &mut Step, req: usize) -> Done {
    let (parts, case) = (step.parts, step.case);
    let emptied = spoiled(step, parts.lens, &case.seq_lens, (req, 0), status::COMPACTATTN_OK)?;
    blind(step, req, &emptied)?;
    for bad in [-1, i32::MIN, i32::MAX, 301, (case.table_width * 16) as i32 + 1] {
        let got = spoiled(step, parts.lens, &case.seq_lens, (req, bad), status::COMPACTATTN_OK)?;
        same(&got, &emptied, &format!("seq_lens[{req}] = {bad}"))?;
    }
    // Of 16 tokens each.
    let pages = case.seq_lens[req].unsigned_abs().div_ceil(16) as usize;
    let bads = [-1, i32::MIN, i32::MAX, case.pools.num_pages as i32, 1 << 28];
    for (entry, bad) in [0, pages / 2, pages - 1].into_iter().flat_map(|at| bads.map(|bad| (at, bad))) {
        let got = spoiled(
            step,
            parts.table,
            &case.table,
            (req * case.table_stride + entry, bad),
            status::COMPACTATTN_OK,
        )?;
        same(&got, &emptied, &format!("page {entry} of request {req} = {bad}"))?;
    }
    Ok(())
}

/// A last chunk that ends outside q asks nothing.
fn broken_offsets(step: &mut Step) -> Done {
    let (part, cu) = (step.parts.cu, step.case.cu_seqlens_q.clone());
    let idle = spoiled(step, part, &cu, (3, cu[2]), status::COMPACTATTN_OK)?;
    for bad in [cu[3] + 1, i32::MAX, -1, i32::MIN, cu[2] - 1] {
        let got = spoiled(step, part, &cu, (3, bad), status::COMPACTATTN_OK)?;
        same(&got, &idle, &format!("cu_seqlens_q[3] = {bad}"))?;
    }
    Ok(())
}

/// Results with one entry of a tensor changed; the tensor is put right again.
pub(crate) fn spoiled(
    step: &mut Step,
    part: super::memory::Part,
    good: &[i32],
    (at, bad): (usize, i32),
    want: status,
) -> Result<[Vec<u8>; 2], String> {
    let mut changed = good.to_vec();
    changed[at] = bad;
    step.memory.set(part, bytemuck::cast_slice(&changed));
    let got = results(step, want, &|_, _| {});
    step.memory.set(part, bytemuck::cast_slice(good));
    got
}

fn same(got: &[Vec<u8>; 2], want: &[Vec<u8>; 2], what: &str) -> Done {
    if got == want { Ok(()) } else { Err(format!("{what}: not as if the request held nothing")) }
}

/// Every row of the request has seen nothing.
pub(crate) fn blind(step: &Step, req: usize, [out, lse]: &[Vec<u8>; 2]) -> Done {
    let (case, size) = (step.case, step.case.shape.dtype.size_bytes());
    let lse: Vec<f32> = bytemuck::pod_collect_to_vec(lse);
    let tokens = case.cu_seqlens_q[req] as usize..case.cu_seqlens_q[req + 1] as usize;
    for (token, head) in tokens.flat_map(|t| (0..case.shape.num_q_heads).map(move |h| (t, h))) {
        let at = (token * case.q.stride_token + head * case.q.stride_head) * size;
        let zero = out[at..at + case.shape.head_dim * size].iter().all(|&byte| byte == 0);
        let lse = lse[head * super::step::lse_stride(case) + token];
        if !zero || lse != f32::NEG_INFINITY {
            return Err(format!("an empty request's token {token}, head {head}: lse {lse}, out 0: {zero}"));
        }
    }
    Ok(())
}

/// This program, told of a driver that is not there or is none, says so and does not crash.
fn drivers() -> Done {
    let program = std::env::current_exe().map_err(|e| e.to_string())?;
    for (driver, codes) in [("/nonexistent/libcuda.so.1", &[3][..]), ("libc.so.6", &[1, 3])] {
        let child = Command::new(&program)
            .arg("laws")
            .env("COMPACTATTN_LIBCUDA", driver)
            .env_remove("CARGO")
            .output();
        let child = child.map_err(|e| e.to_string())?;
        if !child.status.code().is_some_and(|code| codes.contains(&code)) {
            let said = String::from_utf8_lossy(&child.stdout).into_owned();
            return Err(format!("{driver}: {}, {said}", child.status));
        }
    }
    Ok(())
}
