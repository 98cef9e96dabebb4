//! The table of bad inputs, class by class, on any context; each class in as many variants as there are cases.
//!
//! By status, before anything runs: 1-7, 10-30, 34-39, 41, 42, 44, 45, 62. By content, on the device of a GPU context
//! and by status on the CPU's: 47-49, 53-58. Odd but legal: 18, 19, 50-52, 57, 59-61, 63. With a GPU beside these, in
//! `bad_input.rs`: 40, 43, 64-66. Elsewhere: 8 and 9 (threads, forks) in tests/capi_bad_handles.rs, 31 ends in 29, 67
//! and 68 in tests/cuda_host.rs and tests/faults.rs. Not offered, so not there: 32, 33 in part, 46 on one GPU.

use std::cell::{Cell, RefCell};

use compactattn::capi::{compactattn_status as status, *};
use compactattn::settings::Selector;

use super::abi::{Refusal, desc_of, settings_of};
use super::bad_input::{results, spoiled};
use super::cases;
use super::check::Worker;
use super::device::{Device, last_error, struct_size};
use super::rounds::Rounds;
use super::scenes;
use super::spoils::{CALLS, DESCS};
use super::step::{Done, Given, Step, lse_stride};
use crate::common::case::{Case, Lens};
use crate::common::rng::Rng;
use crate::common::tenants;

/// Every class on each of `count` random steps.
pub(crate) fn run(device: &Device, rounds: &Rounds) -> bool {
    println!(
        "  {} ways to spoil a call, {} a plan, {} contents, {} handles; each once a case",
        CALLS.len(),
        DESCS.len(),
        CONTENTS.len(),
        HANDLES.len()
    );
    rounds.run(device, |worker, rng, _| one(worker, rng))
}

fn one(worker: &mut Worker, rng: &mut Rng) -> Result<(), Refusal> {
    let case = step_of(rng);
    let device = worker.device;
    let mut step = Step::new(device, &mut worker.memory, &case, &Given::Nothing, worker.stream)?;
    step.update_summaries().map_err(Refusal::Fault)?;
    let good = results(&step, status::COMPACTATTN_OK, &|_, _| {}).map_err(Refusal::Fault)?;
    all(device, &mut step, rng, &good)
        .map_err(|why| Refusal::Fault(format!("class {why} ({})", cases::describe(&case))))
}

fn all(device: &Device, step: &mut Step, rng: &mut Rng, good: &[Vec<u8>; 2]) -> Done {
    let shared = RefCell::new(std::mem::replace(rng, Rng::new(0)));
    for (class, want, spoil) in CALLS {
        let name = Cell::new("");
        let spoiled = |batch: &mut compactattn_batch, args: &mut compactattn_forward_args| {
            name.set(spoil(&mut shared.borrow_mut(), step, batch, args));
        };
        results(step, want, &spoiled).map_err(|e| format!("{class}: {}: {e}", name.get()))?;
        names(name.get()).map_err(|e| format!("{class}: {e}"))?;
    }
    *rng = shared.into_inner();
    still_good(step, good, "calls")?;
    for (class, want, spoil) in DESCS {
        let mut settings = settings_of(&step.case.settings);
        let mut desc = desc_of(step.case, &settings);
        let name = spoil(rng, &mut desc, &mut settings);
        desc.settings = &raw const settings;
        plan_refused(device, &desc, want, name).map_err(|e| format!("{class}: {e}"))?;
    }
    for (class, answers) in HANDLES {
        answers(device, step, rng).map_err(|e| format!("{class}: {e}"))?;
    }
    still_good(step, good, "plans and handles")?;
    for (class, tried) in CONTENTS {
        tried(step, rng, good).map_err(|e| format!("{class}: {e}"))?;
    }
    still_good(step, good, "contents")
}

/// A small step whose every tensor has something to spoil.
fn step_of(rng: &mut Rng) -> Case {
    let selectors = [
        Selector::Dense,
        Selector::SampledExact,
        Selector::FlashPrefill,
        Selector::XAttention,
        Selector::Streaming,
    ];
    let settings = scenes::settings(rng.pick(&selectors), rng.pick(&[16, 32, 64]));
    let mut shape = cases::shape_for(rng, &settings);
    while shape.num_q_heads < 2 {
        shape = cases::shape_for(rng, &settings);
    }
    let lens: Vec<Lens> = (0..rng.within(2, 4))
        .map(|_| (rng.within(2, 30), rng.below(200)))
        .map(|(q, past)| Lens { q, kv: q + past })
        .collect();
    Case { splits: 1, ..Case::with(rng, shape, settings, &lens) }
}

fn still_good(step: &Step, good: &[Vec<u8>; 2], after: &str) -> Done {
    let again = results(step, status::COMPACTATTN_OK, &|_, _| {})?;
    if again == *good { Ok(()) } else { Err(format!("after bad {after} a good call has other bits")) }
}

/// The message contract: names the argument, at most 300 bytes of ASCII, no address.
fn names(name: &str) -> Done {
    let text = last_error();
    let clean = text.is_ascii() && text.len() <= 300 && !text.contains("0x");
    if text.contains(name) && clean {
        Ok(())
    } else {
        Err(format!("{text:?} does not name {name}, or names too much"))
    }
}

/// By `plan_create`, which writes no handle, and by `supports` alike.
fn plan_refused(device: &Device, desc: &compactattn_plan_desc, want: status, name: &str) -> Done {
    let untouched = std::ptr::without_provenance_mut(0x5a5a);
    let mut plan = untouched;
    // SAFETY: `desc` and its settings are live.
    let got = unsafe { compactattn_plan_create(device.context, desc, &raw mut plan) };
    if got != want || plan != untouched {
        return Err(format!("{got:?}, not {want:?} ({})", last_error()));
    }
    names(name)?;
    // SAFETY: as above; NULL is a reason that nobody wants.
    let answer = unsafe { compactattn_supports(device.context, desc, std::ptr::null_mut(), 0) };
    if answer == want { Ok(()) } else { Err(format!("supports says {answer:?}")) }
}

type Handle = fn(&Device, &Step, &mut Rng) -> Done;

const HANDLES: [(u8, Handle); 4] = [
    (1, |_, _, _| {
        asked(std::ptr::null(), status::COMPACTATTN_E_NULL)?;
        match compactattn_plan_destroy(std::ptr::null_mut()) {
            status::COMPACTATTN_OK => Ok(()),
            other => Err(format!("destroying NULL: {other:?}")),
        }
    }),
    (5, |device, step, _| {
        let dead = super::abi::Plan::new(device, step.case, &Given::Nothing).map_err(|_| "no second plan")?;
        let handle = dead.handle;
        drop(dead);
        asked(handle, status::COMPACTATTN_E_HANDLE)?;
        // Class 6.
        match compactattn_plan_destroy(handle) {
            status::COMPACTATTN_E_HANDLE => Ok(()),
            other => Err(format!("destroyed twice: {other:?}")),
        }
    }),
    (7, |device, step, rng| {
        let address = (rng.next() >> rng.below(60)).max(1) as usize;
        asked(std::ptr::without_provenance(address), status::COMPACTATTN_E_HANDLE)?;
        asked(step.workspace.cast(), status::COMPACTATTN_E_HANDLE)?;
        asked(device.context.cast_const().cast(), status::COMPACTATTN_E_HANDLE)
    }),
    (10, |_, _, rng| {
        let desc = compactattn_context_desc {
            struct_size: struct_size::<compactattn_context_desc>(),
            abi_version: rng.next() as u32 | 1 << 20,
            device_kind: compactattn_device_kind::COMPACTATTN_DEVICE_CPU as i32,
            device_ordinal: 0,
            num_threads: 1,
            reserved: 0,
        };
        let mut context = std::ptr::null_mut();
        // SAFETY: both point to locals.
        let got = unsafe { compactattn_context_create(&raw const desc, &raw mut context) };
        if got == status::COMPACTATTN_E_ABI { names("abi_version") } else { Err(format!("{got:?}")) }
    }),
];

/// A question about a plan that is none.
fn asked(plan: *const compactattn_plan, want: status) -> Done {
    let mut bytes = 0;
    // SAFETY: `bytes` is a local; the handle may be anything.
    let got = unsafe { compactattn_summary_bytes(plan, 0, 1, &raw mut bytes) };
    if got == want { names("plan") } else { Err(format!("{got:?}, not {want:?}")) }
}

type Content = fn(&mut Step, &mut Rng, &[Vec<u8>; 2]) -> Done;

const CONTENTS: [(u8, Content); 13] = [
    (47, |step, rng, good| {
        let bad = rng.pick(&[1, -1, i32::MAX, i32::MIN]);
        offsets(step, (0, bad), good)
    }),
    (48, |step, rng, good| {
        let at = rng.within(1, step.case.seq_lens.len());
        let bad = step.case.cu_seqlens_q[at - 1] - 1 - rng.below(100) as i32;
        offsets(step, (at, bad), good)
    }),
    (49, |step, rng, good| {
        let last = step.case.seq_lens.len();
        let bad = step.case.cu_seqlens_q[last] + rng.pick(&[1, 1000, 1 << 30]);
        offsets(step, (last, bad), good)
    }),
    (53, |step, rng, good| {
        let bad = rng.pick(&[-1, -1000, i32::MIN]);
        length(step, rng, bad, good)
    }),
    (54, |step, rng, good| {
        let most = (step.case.table_width * step.case.shape.page_size) as i32;
        let bad = rng.pick(&[most + 1, i32::MAX]);
        length(step, rng, bad, good)
    }),
    (55, |step, rng, good| {
        let bad = (step.case.pools.num_pages + rng.below(1000)) as i32;
        entry(step, rng, bad, good)
    }),
    (56, |step, rng, good| entry(step, rng, -1, good)),
    (58, |step, rng, good| {
        let bad = rng.pick(&[i32::MAX, i32::MIN, 1 << 30, 1 << 28]);
        entry(step, rng, bad, good)
    }),
    (50, |step, rng, good| {
        let req = rng.below(step.case.seq_lens.len());
        let q_len = step.case.batch().q_len(req);
        let kv = rng.below(q_len) as i32;
        let got =
            spoiled(step, step.parts.lens, &step.case.seq_lens.clone(), (req, kv), status::COMPACTATTN_OK)?;
        others(step.case, &[req], good, &got)
    }),
    (51, |step, rng, good| {
        let req = rng.below(step.case.seq_lens.len());
        let got =
            spoiled(step, step.parts.lens, &step.case.seq_lens.clone(), (req, 0), status::COMPACTATTN_OK)?;
        super::bad_input::blind(step, req, &got)?;
        others(step.case, &[req], good, &got)
    }),
    (57, |step, rng, good| {
        let mut table = step.case.table.clone();
        for req in 0..step.case.seq_lens.len() {
            let used =
                step.case.seq_lens[req].unsigned_abs().div_ceil(step.case.shape.page_size as u32) as usize;
            for i in used..step.case.table_stride {
                let other = rng.below(step.case.pools.num_pages) as i32;
                table[req * step.case.table_stride + i] = rng.pick(&[-1, i32::MIN, i32::MAX, other]);
            }
        }
        let got = with_table(step, &table)?;
        if got == *good { Ok(()) } else { Err("the tail of a row was read".into()) }
    }),
    (59, |step, rng, _| {
        let mut table = step.case.table.clone();
        let first = table[0];
        for req in 0..step.case.seq_lens.len() {
            let used =
                step.case.seq_lens[req].unsigned_abs().div_ceil(step.case.shape.page_size as u32) as usize;
            for i in (0..used).filter(|_| rng.once_in(2)) {
                table[req * step.case.table_stride + i] = first;
            }
        }
        with_table(step, &table).map(|_| ())
    }),
    (18, |step, _, _| {
        let cu = vec![0_i32; step.case.cu_seqlens_q.len()];
        step.memory.set(step.parts.cu, bytemuck::cast_slice(&cu));
        let poison = step.parts.whole.map(|part| vec![super::memory::POISON; part.len]);
        let got = results(step, status::COMPACTATTN_OK, &|batch, args| {
            (batch.q.shape[0], args.out.shape[0], args.lse.shape[1]) = (0, 0, 0);
        });
        step.memory.set(step.parts.cu, bytemuck::cast_slice(&step.case.cu_seqlens_q));
        if got? == poison { Ok(()) } else { Err("a step without queries wrote something".into()) }
    }),
];

/// A broken entry of cu_seqlens_q: by status on the CPU; on a GPU requests on neither side of it are as they were.
fn offsets(step: &mut Step, (at, bad): (usize, i32), good: &[Vec<u8>; 2]) -> Done {
    let cu = step.case.cu_seqlens_q.clone();
    let want = by_status(step, status::COMPACTATTN_E_VALUE);
    let got = spoiled(step, step.parts.cu, &cu, (at, bad), want)?;
    if want != status::COMPACTATTN_OK {
        return names("cu_seqlens_q");
    }
    // A break says nothing of who is right: what follows an offset beyond q may be cut as well.
    let beside: Vec<usize> =
        (0..step.case.seq_lens.len()).filter(|&req| req + 1 >= at && req <= at).collect();
    others(step.case, &beside, good, &got)
}

/// A length out of range: by status on the CPU; on a GPU as if the request held nothing.
fn length(step: &mut Step, rng: &mut Rng, bad: i32, good: &[Vec<u8>; 2]) -> Done {
    let req = rng.below(step.case.seq_lens.len());
    let lens = step.case.seq_lens.clone();
    let want = by_status(step, status::COMPACTATTN_E_SEQLEN);
    let got = spoiled(step, step.parts.lens, &lens, (req, bad), want)?;
    left_out(step, req, (want, "seq_lens"), (good, &got))
}

/// A table entry out of range, likewise.
fn entry(step: &mut Step, rng: &mut Rng, bad: i32, good: &[Vec<u8>; 2]) -> Done {
    let req = rng.below(step.case.seq_lens.len());
    let used = step.case.seq_lens[req].unsigned_abs().div_ceil(step.case.shape.page_size as u32) as usize;
    let at = req * step.case.table_stride + rng.below(used);
    let table = step.case.table.clone();
    let want = by_status(step, status::COMPACTATTN_E_TABLE);
    let got = spoiled(step, step.parts.table, &table, (at, bad), want)?;
    left_out(step, req, (want, "block_table"), (good, &got))
}

fn left_out(
    step: &Step,
    req: usize,
    (want, name): (status, &str),
    (good, got): (&[Vec<u8>; 2], &[Vec<u8>; 2]),
) -> Done {
    if want != status::COMPACTATTN_OK {
        return names(name);
    }
    super::bad_input::blind(step, req, got)?;
    others(step.case, &[req], good, got)
}

/// What a CPU context finds before it starts, a GPU finds on the device.
fn by_status(step: &Step, on_cpu: status) -> status {
    if step.stream.is_null() { on_cpu } else { status::COMPACTATTN_OK }
}

fn with_table(step: &mut Step, table: &[i32]) -> Result<[Vec<u8>; 2], String> {
    step.memory.set(step.parts.table, bytemuck::cast_slice(table));
    let got = results(step, status::COMPACTATTN_OK, &|_, _| {});
    step.memory.set(step.parts.table, bytemuck::cast_slice(&step.case.table));
    got
}

/// Rows of all other requests are as they were.
fn others(case: &Case, except: &[usize], good: &[Vec<u8>; 2], got: &[Vec<u8>; 2]) -> Done {
    let of = |results: &[Vec<u8>; 2], token| tenants::row_bytes(case, results, lse_stride(case), token);
    for req in (0..case.seq_lens.len()).filter(|req| !except.contains(req)) {
        let mut tokens = case.cu_seqlens_q[req] as usize..case.cu_seqlens_q[req + 1] as usize;
        if let Some(token) = tokens.find(|&token| of(good, token) != of(got, token)) {
            return Err(format!("token {token} of request {req} changed"));
        }
    }
    Ok(())
}
