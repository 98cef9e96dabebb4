//! Bad input through the C ABI: tensors, memory and limits (classes 18-24, 29-46 of the table of bad inputs).
//!
//! Every class is tried with 100 random worlds: the status, a text that names the argument, not one byte changed in
//! any buffer or its canaries, and the next good call equal bit for bit to one on a fresh handle.
//!
//! Not here, as they need a GPU: 40 and 43 (host or freed pointers where device memory
//! is wanted), 46 (a workspace on another device), 64 and 66 (capture), 67 (architecture). 65 stands in for streams:
//! a CPU context takes none.
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small random numbers")]
#![expect(clippy::unwrap_used, reason = "tests")]

mod capi_world;

use capi_world::memory::Rng;
use capi_world::*;
use compactattn::capi::{compactattn_plan_destroy, compactattn_status as status, compactattn_tensor};

/// A tensor of the batch or of the results, by its name in messages.
fn tensors(world: &mut World) -> [(&'static str, &mut compactattn_tensor); 8] {
    let batch = &mut *world.batch;
    [
        ("batch.q", &mut batch.q),
        ("batch.k", &mut batch.k),
        ("batch.v", &mut batch.v),
        ("batch.cu_seqlens_q", &mut batch.cu_seqlens_q),
        ("batch.seq_lens", &mut batch.seq_lens),
        ("batch.block_table", &mut batch.block_table),
        ("args.out", &mut world.args.out),
        ("args.lse", &mut world.args.lse),
    ]
}

/// Spoils one of the named tensors, picked at random.
fn spoil_one(
    world: &mut World,
    among: std::ops::Range<usize>,
    spoil: impl Fn(&mut compactattn_tensor, &mut Rng),
) -> &'static str {
    let mut rng = Rng::new(world.rng.next().into());
    let i = rng.range(among.start as i32, among.end as i32) as usize;
    let (name, tensor) = tensors(world).into_iter().nth(i).unwrap();
    spoil(tensor, &mut rng);
    name
}

const ALL: std::ops::Range<usize> = 0..8;
const INPUTS: std::ops::Range<usize> = 0..6;
/// q, k, v: what has heads and vectors.
const VECTORS: std::ops::Range<usize> = 0..3;

#[test]
fn class_02_a_null_tensor_is_named() {
    refused(|w| Fault(status::COMPACTATTN_E_NULL, spoil_one(w, ALL, |t, _| t.data = std::ptr::null_mut())));
    refused(|w| Fault(status::COMPACTATTN_E_NULL, spoil_one(w, INPUTS, |t, _| *t = zeroed())));
    refused(|w| {
        w.args.out = zeroed();
        Fault(status::COMPACTATTN_E_NULL, "args.out")
    });
    refused(|w| {
        w.args.batch = std::ptr::null();
        Fault(status::COMPACTATTN_E_NULL, "batch")
    });
}

#[test]
fn class_20_negative_extents() {
    refused(|w| {
        let name = spoil_one(w, ALL, |t, rng| {
            let i = rng.range(0, t.ndim) as usize;
            t.shape[i] = *rng.pick(&[-1, -2, i64::from(i32::MIN), i64::MIN]);
        });
        Fault(status::COMPACTATTN_E_SHAPE, name)
    });
    refused(|w| {
        let name = spoil_one(w, ALL, |t, rng| t.ndim = *rng.pick(&[-1, 0, 5, 100, i32::MIN, i32::MAX]));
        Fault(status::COMPACTATTN_E_SHAPE, name)
    });
}

#[test]
fn class_21_extents_that_are_not_the_plans_or_qs() {
    refused(|w| {
        // The number of pages (k) and of queries (q) is the caller's; every other extent of these is fixed.
        let name = spoil_one(w, VECTORS, |t, rng| {
            let i = rng.range(1, t.ndim) as usize;
            t.shape[i] += *rng.pick(&[-1, 1, 7]);
        });
        Fault(status::COMPACTATTN_E_SHAPE, name)
    });
    refused(|w| {
        let i = w.rng.range(0, 3) as usize;
        w.args.out.shape[i] += *w.rng.pick(&[-1, 1, 100]);
        Fault(status::COMPACTATTN_E_SHAPE, "args.out")
    });
    refused(|w| {
        w.batch.v.shape[0] -= i64::from(w.rng.range(1, 3));
        Fault(status::COMPACTATTN_E_SHAPE, "batch.v.shape[0]")
    });
}

#[test]
fn class_22_a_wrong_lse() {
    refused(|w| {
        let i = w.rng.range(0, 2) as usize;
        w.args.lse.shape[i] += *w.rng.pick(&[-1, 1, 100]);
        Fault(status::COMPACTATTN_E_SHAPE, "args.lse")
    });
}

#[test]
fn class_23_extents_that_leave_63_bits() {
    refused(|w| {
        // One page so far away that the pool ends beyond the address space.
        let pool = if w.rng.range(0, 2) == 0 { &mut w.batch.k } else { &mut w.batch.v };
        pool.stride[0] = i64::MAX / 16 * 16 - i64::from(w.rng.range(0, 100)) * 16;
        pool.storage_bytes = 0;
        Fault(status::COMPACTATTN_E_OVERFLOW, "batch.")
    });
    refused(|w| {
        (w.batch.k.shape[0], w.batch.k.storage_bytes) = (i64::MAX, 0);
        (w.batch.v.shape[0], w.batch.v.storage_bytes) = (i64::MAX, 0);
        Fault(status::COMPACTATTN_E_OVERFLOW, "batch.k")
    });
}

#[test]
fn class_24_a_batch_beyond_the_plans_limits() {
    for seed in 0..VARIANTS {
        let mut world = World::random(seed);
        let total_q: i64 = world.reqs.iter().map(|r| i64::from(r.0)).sum();
        let longest = world.reqs.iter().map(|r| i64::from(r.1)).max().unwrap();
        let num_reqs = world.reqs.len() as i32;
        for (limits, name) in [
            ((num_reqs - 1, total_q, longest), "num_reqs"),
            ((num_reqs, total_q - 1, longest), "total_q"),
            ((num_reqs, total_q, longest - 1), "seq_lens"),
        ] {
            let desc = &mut world.desc;
            (desc.max_num_reqs, desc.max_total_q, desc.max_kv_len) = limits;
            if limits.0 > 0 && limits.1 > 0 && limits.2 > 0 {
                let small = new_plan(world.context, &world.desc);
                let planned = std::mem::replace(&mut world.plan, small);
                world.check_refusal(seed, &Fault(status::COMPACTATTN_E_VALUE, name));
                assert_eq!(compactattn_plan_destroy(small), status::COMPACTATTN_OK);
                world.plan = planned;
                world.results();
            }
        }
        world.close();
    }
}

#[test]
fn class_29_30_33_dtypes_that_are_unknown_or_disagree() {
    refused(|w| {
        let name = spoil_one(w, ALL, |t, rng| {
            let own = t.dtype;
            let others: Vec<i32> =
                [0, 1, 2, 3, 4, 5, 6, 7, 99, -1].into_iter().filter(|&d| d != own).collect();
            t.dtype = *rng.pick(&others);
        });
        Fault(status::COMPACTATTN_E_DTYPE, name)
    });
}

#[test]
fn class_32_scales_of_an_fp8_cache() {
    refused(|w| {
        let i = w.rng.range(0, 2) as usize;
        let heads = w.desc.num_kv_heads;
        let is_e4m3 = w.batch.k.dtype == 6;
        let given = w.tensor(SCALES[i], 3, &[heads.into()]);
        let (bad, status) = match w.rng.range(0, if is_e4m3 { 5 } else { 1 }) {
            // A cache of another type has none.
            0 if !is_e4m3 => (given, status::COMPACTATTN_E_DTYPE),
            0 => {
                w.memory[SCALES[i]].fill_bad_scale(&mut w.rng);
                (given, status::COMPACTATTN_E_VALUE)
            }
            1 => (
                compactattn_tensor { dtype: *w.rng.pick(&[0, 1, 2, 4, 6]), ..given },
                status::COMPACTATTN_E_DTYPE,
            ),
            2 => {
                let count = *w.rng.pick(&[0, -1, 7, i64::MAX]);
                (compactattn_tensor { shape: [count; 4], ..given }, status::COMPACTATTN_E_SHAPE)
            }
            3 => (compactattn_tensor { data: std::ptr::null_mut(), ..given }, status::COMPACTATTN_E_NULL),
            _ => (compactattn_tensor { device_kind: 2, ..given }, status::COMPACTATTN_E_DEVICE),
        };
        let (to, name) = [(&mut w.batch.k_scale, "k_scale"), (&mut w.batch.v_scale, "v_scale")]
            .into_iter()
            .nth(i)
            .unwrap();
        *to = bad;
        Fault(status, name)
    });
}

#[test]
fn class_34_a_last_stride_other_than_one() {
    refused(|w| {
        let name = spoil_one(w, VECTORS, |t, rng| {
            t.stride[t.ndim as usize - 1] = *rng.pick(&[2, 3, 64, i64::MAX]);
            t.storage_bytes = 0;
        });
        Fault(status::COMPACTATTN_E_STRIDE, name)
    });
}

#[test]
fn class_35_strides_off_the_16_byte_grid() {
    refused(|w| {
        let name = spoil_one(w, VECTORS, |t, rng| {
            // A stride is looked at only where there is more than one entry.
            let many: Vec<usize> = (0..t.ndim as usize - 1).filter(|&i| t.shape[i] > 1).collect();
            match many.is_empty() {
                true => t.data = t.data.cast::<u8>().wrapping_add(8).cast(),
                false => t.stride[*rng.pick(&many)] += i64::from(rng.range(1, 4)),
            }
            t.storage_bytes = 0;
        });
        Fault(status::COMPACTATTN_E_ALIGN, name)
    });
}

#[test]
fn class_36_misaligned_bases() {
    refused(|w| {
        let name = spoil_one(w, VECTORS, |t, rng| {
            t.data = t.data.cast::<u8>().wrapping_add(rng.range(1, 16) as usize).cast();
            t.storage_bytes = 0;
        });
        Fault(status::COMPACTATTN_E_ALIGN, name)
    });
    refused(|w| {
        let name = spoil_one(w, 3..6, |t, rng| {
            t.data = t.data.cast::<u8>().wrapping_add(rng.range(1, 4) as usize).cast();
            t.storage_bytes = 0;
        });
        Fault(status::COMPACTATTN_E_ALIGN, name)
    });
}

#[test]
fn class_37_strides_that_are_not_positive() {
    refused(|w| {
        let name = spoil_one(w, VECTORS, |t, rng| {
            let many: Vec<usize> = (0..t.ndim as usize).filter(|&i| t.shape[i] > 1).collect();
            t.stride[*rng.pick(&many)] = *rng.pick(&[0, -1, -64, i64::MIN]);
        });
        Fault(status::COMPACTATTN_E_STRIDE, name)
    });
}

#[test]
fn class_38_strides_that_make_elements_overlap() {
    refused(|w| {
        let name = spoil_one(w, 1..3, |t, rng| {
            // Pages or tokens closer together than what they hold, still on the grid.
            let i = rng.range(0, 2) as usize;
            t.stride[i] = 16;
        });
        Fault(status::COMPACTATTN_E_STRIDE, name)
    });
}

#[test]
fn class_39_outputs_that_overlap() {
    refused(|w| {
        let (name, from) = match w.rng.range(0, 4) {
            0 => ("args.out", w.batch.q.data),
            1 => ("args.out", w.batch.k.data),
            2 => ("args.out", w.batch.v.data),
            _ => ("args.workspace", w.args.workspace),
        };
        w.args.out.data = from;
        w.args.out.storage_bytes = 0;
        Fault(status::COMPACTATTN_E_ALIAS, name)
    });
    refused(|w| {
        w.args.lse.data = *w.rng.pick(&[w.batch.q.data, w.batch.seq_lens.data, w.args.out.data]);
        w.args.lse.storage_bytes = 0;
        Fault(status::COMPACTATTN_E_ALIAS, "args.lse")
    });
    refused(|w| {
        w.args.workspace = *w.rng.pick(&[w.batch.q.data, w.batch.k.data, w.args.out.data]);
        Fault(status::COMPACTATTN_E_ALIAS, "args.workspace")
    });
}

#[test]
fn class_41_42_tensors_of_another_device() {
    refused(|w| {
        let name = spoil_one(w, ALL, |t, rng| {
            (t.device_kind, t.device_ordinal) =
                *rng.pick(&[(2, 0), (2, 1), (1, 1), (1, -1), (3, 0), (-1, 0)]);
        });
        Fault(status::COMPACTATTN_E_DEVICE, name)
    });
}

#[test]
fn class_44_storage_shorter_than_the_strides_say() {
    refused(|w| {
        let name = spoil_one(w, VECTORS, |t, rng| {
            let end: i64 = (0..t.ndim as usize).map(|i| (t.shape[i] - 1) * t.stride[i]).sum();
            let size = [2, 2, 4, 4, 4, 1][t.dtype as usize - 1];
            t.storage_bytes = *rng.pick(&[(end + 1) * size - 1, 1, -1, i64::MIN]);
        });
        Fault(status::COMPACTATTN_E_SHAPE, name)
    });
}

#[test]
fn class_45_a_missing_short_or_misaligned_workspace() {
    refused(|w| {
        match w.rng.range(0, 3) {
            0 => w.args.workspace = std::ptr::null_mut(),
            1 => {
                let least = sizes(w.plan, 0).workspace_bytes;
                w.args.workspace_bytes = *w.rng.pick(&[0, -1, i64::MIN, least - 1]);
            }
            _ => w.args.workspace = w.args.workspace.cast::<u8>().wrapping_add(64).cast(),
        }
        let bytes = sizes(w.plan, 0).workspace_bytes;
        Fault(
            status::COMPACTATTN_E_WORKSPACE,
            Box::leak(format!("args.workspace: wanted {bytes} bytes").into()),
        )
    });
}

#[test]
fn class_65_a_stream_on_a_cpu_context() {
    refused(|w| {
        w.args.stream = std::ptr::without_provenance_mut(w.rng.range(1, 100) as usize);
        Fault(status::COMPACTATTN_E_STREAM, "args.stream")
    });
}

#[test]
fn a_layer_the_plan_does_not_have() {
    refused(|w| {
        w.args.layer = *w.rng.pick(&[-1, 3, i32::MAX, i32::MIN]);
        Fault(status::COMPACTATTN_E_VALUE, "layer")
    });
}

#[test]
fn class_18_19_nothing_to_do_is_ok_and_writes_nothing() {
    for seed in 0..VARIANTS {
        let mut world = World::random(seed);
        let reqs = if world.rng.range(0, 2) == 0 { 0 } else { world.reqs.len() };
        world.memory[CU].ints_mut().fill(0);
        world.batch.q.shape[0] = 0;
        world.args.out.shape[0] = 0;
        world.args.lse.shape[1] = 0;
        world.batch.cu_seqlens_q.shape[0] = reqs as i64 + 1;
        world.batch.seq_lens.shape[0] = reqs as i64;
        world.batch.block_table.shape[0] = reqs as i64;
        if world.rng.range(0, 2) == 0 {
            world.batch.q.data = std::ptr::null_mut();
            world.args.out.data = std::ptr::null_mut();
            world.args.workspace = std::ptr::null_mut();
        }
        let before = world.snapshot();
        assert_eq!(world.forward(), status::COMPACTATTN_OK, "variant {seed}: {}", last_error());
        assert!(world.snapshot() == before, "variant {seed}");
        world.close();
    }
}
