//! Bad input through the C ABI: structs and handles (classes 1-10 of the table of bad inputs), threads and forks.

#![expect(clippy::cast_sign_loss, reason = "small random numbers")]

mod capi_world;

use std::ffi::c_void;

use capi_world::memory::Rng;
use capi_world::*;
use compactattn::capi::{compactattn_status as status, *};

type Stage = fn(*const compactattn_plan, &World) -> compactattn_status;

/// Every function that takes a plan, called as well as it can be.
const STAGES: [(&str, Stage); 7] = [
    ("forward", |plan, w| {
        // SAFETY: locals, or the memory of a live world; a handle may be anything.
        unsafe { compactattn_forward(plan, &raw const w.args) }
    }),
    ("sizes", |plan, _| {
        let mut sizes = compactattn_sizes { struct_size: 104, ..zeroed() };
        // SAFETY: locals, or the memory of a live world; a handle may be anything.
        unsafe { compactattn_plan_sizes(plan, 0, std::ptr::null(), &raw mut sizes) }
    }),
    ("stats", |plan, _| {
        let mut stats = compactattn_stats { struct_size: 64, ..zeroed() };
        // SAFETY: locals, or the memory of a live world; a handle may be anything.
        unsafe { compactattn_plan_stats(plan, -1, &raw mut stats) }
    }),
    ("summary_bytes", |plan, _| {
        let mut bytes = 0;
        // SAFETY: locals, or the memory of a live world; a handle may be anything.
        unsafe { compactattn_summary_bytes(plan, 0, 1, &raw mut bytes) }
    }),
    ("select", |plan, w| {
        let out = compactattn_selection { struct_size: 200, ..zeroed() };
        // SAFETY: locals, or the memory of a live world; a handle may be anything.
        unsafe { compactattn_select(plan, 0, &raw const *w.batch, std::ptr::null(), &raw const out) }
    }),
    ("attend", |plan, _| {
        let args = compactattn_attend_args { struct_size: 256, ..zeroed() };
        // SAFETY: locals, or the memory of a live world; a handle may be anything.
        unsafe { compactattn_attend(plan, &raw const args) }
    }),
    ("combine", |plan, _| {
        let args = compactattn_combine_args { struct_size: 592, ..zeroed() };
        // SAFETY: locals, or the memory of a live world; a handle may be anything.
        unsafe { compactattn_combine(plan, &raw const args) }
    }),
];

/// Every function refuses `plan`.
fn refused_everywhere(world: &World, plan: *const compactattn_plan, status: compactattn_status) {
    for (name, stage) in STAGES {
        assert_eq!(stage(plan, world), status, "{name}: {}", last_error());
        check_text(status, "plan");
    }
}

#[test]
fn class_01_null_handles() {
    let world = World::random(0);
    refused_everywhere(&world, std::ptr::null(), status::COMPACTATTN_E_NULL);
    let mut plan = std::ptr::null_mut();
    // SAFETY: `desc` is live; NULL handles are what is tried.
    let made = unsafe { compactattn_plan_create(std::ptr::null(), &raw const world.desc, &raw mut plan) };
    assert_eq!(made, status::COMPACTATTN_E_NULL);
    check_text(made, "context");
    assert_eq!(compactattn_plan_destroy(std::ptr::null_mut()), status::COMPACTATTN_OK);
    assert_eq!(compactattn_context_destroy(std::ptr::null_mut()), status::COMPACTATTN_OK);
    world.close();
}

#[test]
fn class_05_06_destroyed_handles_stay_dead() {
    for seed in 0..VARIANTS {
        let world = World::random(seed);
        let dead = new_plan(world.context, &world.desc);
        assert_eq!(compactattn_plan_destroy(dead), status::COMPACTATTN_OK);
        // Whatever is made next must not come back to life under the old handle.
        let next = new_plan(world.context, &world.desc);
        refused_everywhere(&world, dead, status::COMPACTATTN_E_HANDLE);
        assert_eq!(compactattn_plan_destroy(dead), status::COMPACTATTN_E_HANDLE);
        assert_eq!(compactattn_plan_destroy(next), status::COMPACTATTN_OK);
        world.results();
        world.close();
    }
}

#[test]
fn class_07_pointers_that_are_no_handles() {
    let mut rng = Rng::new(7);
    let world = World::random(7);
    let mut foreign: Vec<*const c_void> = vec![
        (&raw const world).cast(),
        world.memory[Q].data().cast_const().cast(),
        world.context.cast_const().cast(),
        std::ptr::without_provenance(usize::MAX),
    ];
    for _ in 0..VARIANTS {
        let address = (u64::from(rng.next()) << 32 | u64::from(rng.next())) >> (rng.next() % 60);
        foreign.push(std::ptr::without_provenance(usize::try_from(address).unwrap().max(1)));
    }
    for pointer in foreign {
        refused_everywhere(&world, pointer.cast(), status::COMPACTATTN_E_HANDLE);
        assert_eq!(compactattn_plan_destroy(pointer.cast_mut().cast()), status::COMPACTATTN_E_HANDLE);
    }
    // The context outlived its use as a plan.
    world.results();
    world.close();
}

#[test]
fn class_08_threads_share_a_plan_and_agree() {
    let world = World::random(3);
    let wanted = world.results();
    let plan = world.plan.addr();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut own = World::random(3);
                let own_plan = std::mem::replace(&mut own.plan, std::ptr::without_provenance_mut(plan));
                for _ in 0..VARIANTS / 4 {
                    assert!(own.results() == wanted);
                }
                own.plan = own_plan;
                own.close();
            });
        }
    });
    world.close();
}

#[test]
fn class_08_destroying_a_plan_in_use_ends_in_ok_or_handle() {
    for seed in 0..VARIANTS {
        let world = World::random(seed);
        let plan = world.plan.addr();
        std::thread::scope(|scope| {
            scope.spawn(move || compactattn_plan_destroy(std::ptr::without_provenance_mut(plan)));
            for _ in 0..10 {
                let status = world.forward();
                assert!(
                    matches!(status, status::COMPACTATTN_OK | status::COMPACTATTN_E_HANDLE),
                    "{status:?}"
                );
            }
        });
        assert!(world.canaries_hold());
        assert_eq!(compactattn_context_destroy(world.context), status::COMPACTATTN_OK);
    }
}

#[test]
fn class_09_a_forked_child_is_refused_and_can_start_afresh() {
    let world = World::random(9);
    // SAFETY: the child calls this library and `_exit` only; its locks and this test's memory were idle at the fork
    // or, for the allocator, are reset by the C library.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let refused = world.forward() == status::COMPACTATTN_E_WRONG_PROCESS
            && compactattn_plan_destroy(world.plan) == status::COMPACTATTN_E_WRONG_PROCESS
            && last_error().starts_with("E_WRONG_PROCESS: plan");
        let fresh = compactattn_context_destroy(new_context()) == status::COMPACTATTN_OK;
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(i32::from(!(refused && fresh))) };
    }
    let mut code = -1;
    // SAFETY: `code` is a local.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut code, 0) }, child);
    assert_eq!(code, 0, "the child saw something else");
    world.results();
    world.close();
}

#[test]
fn class_10_a_caller_built_for_another_abi() {
    for seed in 0..VARIANTS {
        let mut desc: compactattn_context_desc = zeroed();
        desc.struct_size = 24;
        desc.device_kind = 1;
        desc.abi_version = Rng::new(seed).next() | 1 << 20;
        let mut context = std::ptr::null_mut();
        // SAFETY: both point to locals.
        let made = unsafe { compactattn_context_create(&raw const desc, &raw mut context) };
        assert_eq!(made, status::COMPACTATTN_E_ABI);
        check_text(made, "abi_version");
        assert!(context.is_null());
    }
}

#[test]
fn class_03_sizes_that_are_too_small_or_absurd() {
    refused(|w| {
        let own = w.args.struct_size;
        w.args.struct_size = *w.rng.pick(&[0, 1, 4, own - 1, own - 8, 1 << 20, u32::MAX]);
        Fault(status::COMPACTATTN_E_STRUCT_SIZE, "args.struct_size")
    });
    refused(|w| {
        // As first published; it has grown since.
        let first = 584;
        w.batch.struct_size = *w.rng.pick(&[0, 1, 4, first - 1, first - 96, 1 << 20, u32::MAX]);
        Fault(status::COMPACTATTN_E_STRUCT_SIZE, "batch.struct_size")
    });
}

/// A struct with room for fields that this library does not know.
#[repr(C)]
struct Newer<T> {
    known: T,
    tail: [u8; 64],
}

#[test]
fn class_04_newer_structs_are_served_only_while_their_new_fields_are_zero() {
    for seed in 0..VARIANTS {
        let world = World::random(seed);
        let mut rng = Rng::new(seed);
        let more = 8 * (1 + rng.next() % 8);
        let mut newer = Newer { known: world.args, tail: [0; 64] };
        newer.known.struct_size += more;
        // SAFETY: `newer` is as long as its struct_size.
        let forward = |newer: &Newer<compactattn_forward_args>| unsafe {
            compactattn_forward(world.plan, &raw const newer.known)
        };
        assert_eq!(forward(&newer), status::COMPACTATTN_OK, "{}", last_error());
        newer.tail[(rng.next() % more) as usize] = 1 << (rng.next() % 8);
        assert_eq!(forward(&newer), status::COMPACTATTN_E_STRUCT_SIZE);
        check_text(status::COMPACTATTN_E_STRUCT_SIZE, "args");
        world.close();
    }
    refused(|w| {
        w.batch.reserved = w.rng.next() | 1;
        Fault(status::COMPACTATTN_E_STRUCT_SIZE, "batch.reserved")
    });
}

#[test]
fn class_03_misaligned_structs() {
    refused(|w| {
        w.args.batch = w.args.batch.cast::<u8>().wrapping_add(w.rng.range(1, 8) as usize).cast();
        Fault(status::COMPACTATTN_E_ALIGN, "batch")
    });
}
