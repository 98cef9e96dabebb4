//! Ways to spoil a good call and a good plan, by their numbers in the table of bad inputs, and what they must end in.

use compactattn::capi::{compactattn_status as status, *};

use super::abi::NONE;
use super::step::Step;
use crate::common::rng::Rng;

/// Spoils a call; what the message must name.
pub(crate) type Call =
    fn(&mut Rng, &Step, &mut compactattn_batch, &mut compactattn_forward_args) -> &'static str;

pub(crate) const CALLS: [(u8, status, Call); 22] = [
    (2, status::COMPACTATTN_E_NULL, |rng, _, b, a| {
        one(rng, (b, a), ALL, |_, t| t.data = std::ptr::null_mut())
    }),
    (2, status::COMPACTATTN_E_NULL, |rng, _, b, a| one(rng, (b, a), 0..6, |_, t| *t = NONE)),
    (3, status::COMPACTATTN_E_STRUCT_SIZE, |rng, _, _, a| {
        a.struct_size = rng.pick(&[0, 1, 4, a.struct_size - 1, a.struct_size - 8, 1 << 20, u32::MAX]);
        "args.struct_size"
    }),
    (3, status::COMPACTATTN_E_STRUCT_SIZE, |rng, _, b, _| {
        b.struct_size = rng.pick(&[0, 1, 4, 583, 1 << 20, u32::MAX]);
        "batch.struct_size"
    }),
    (4, status::COMPACTATTN_E_STRUCT_SIZE, |rng, _, b, _| {
        b.reserved = rng.next() as u32 | 1;
        "batch.reserved"
    }),
    (20, status::COMPACTATTN_E_SHAPE, |rng, _, b, a| {
        one(rng, (b, a), ALL, |rng, t| {
            t.shape[rng.below(t.ndim as usize)] = rng.pick(&[-1, -2, i64::from(i32::MIN), i64::MIN]);
        })
    }),
    (20, status::COMPACTATTN_E_SHAPE, |rng, _, b, a| {
        one(rng, (b, a), ALL, |rng, t| t.ndim = rng.pick(&[-1, 0, 5, 100, i32::MIN, i32::MAX]))
    }),
    (21, status::COMPACTATTN_E_SHAPE, |rng, _, b, a| {
        one(rng, (b, a), 0..3, |rng, t| {
            t.shape[rng.within(1, t.ndim as usize - 1)] += rng.pick(&[-1, 1, 7]);
        })
    }),
    (21, status::COMPACTATTN_E_SHAPE, |rng, _, _, a| {
        a.out.shape[rng.below(3)] += rng.pick(&[-1, 1, 100]);
        "args.out"
    }),
    (22, status::COMPACTATTN_E_SHAPE, |rng, _, _, a| {
        a.lse.shape[rng.below(2)] += rng.pick(&[-1, 1, 100]);
        "args.lse"
    }),
    (23, status::COMPACTATTN_E_OVERFLOW, |_, _, b, _| {
        (b.k.shape[0], b.k.storage_bytes) = (i64::MAX, 0);
        (b.v.shape[0], b.v.storage_bytes) = (i64::MAX, 0);
        "batch.k"
    }),
    (30, status::COMPACTATTN_E_DTYPE, |rng, _, b, a| {
        one(rng, (b, a), ALL, |rng, t| {
            let own = t.dtype;
            while t.dtype == own {
                t.dtype = rng.pick(&[0, 1, 2, 3, 4, 5, 6, 99, -1]);
            }
        })
    }),
    (34, status::COMPACTATTN_E_STRIDE, |rng, _, b, a| {
        one(rng, (b, a), 0..3, |rng, t| {
            t.stride[t.ndim as usize - 1] = rng.pick(&[2, 3, 64, i64::MAX]);
            t.storage_bytes = 0;
        })
    }),
    (35, status::COMPACTATTN_E_ALIGN, |rng, _, b, a| {
        one(rng, (b, a), 0..3, |rng, t| {
            let many = many(t);
            t.stride[rng.pick(&many[..many.len() - 1])] += rng.within(1, 3) as i64;
            t.storage_bytes = 0;
        })
    }),
    (36, status::COMPACTATTN_E_ALIGN, |rng, _, b, a| {
        one(rng, (b, a), 0..3, |rng, t| shift(t, rng.within(1, 15)))
    }),
    (36, status::COMPACTATTN_E_ALIGN, |rng, _, b, a| {
        one(rng, (b, a), 3..6, |rng, t| shift(t, rng.within(1, 3)))
    }),
    (37, status::COMPACTATTN_E_STRIDE, |rng, _, b, a| {
        one(rng, (b, a), 0..3, |rng, t| {
            let many = many(t);
            t.stride[rng.pick(&many)] = rng.pick(&[0, -1, -64, i64::MIN]);
        })
    }),
    (38, status::COMPACTATTN_E_STRIDE, |rng, _, b, a| {
        one(rng, (b, a), 1..3, |rng, t| {
            // Pages or tokens closer together than what they hold, still on the grid.
            t.stride[rng.below(2)] = 16;
            t.storage_bytes = 0;
        })
    }),
    (39, status::COMPACTATTN_E_ALIAS, |rng, _, b, a| {
        a.out.data = rng.pick(&[b.q.data, b.k.data, b.v.data]);
        a.out.storage_bytes = 0;
        "args.out"
    }),
    (44, status::COMPACTATTN_E_SHAPE, |rng, _, b, a| {
        one(rng, (b, a), 0..3, |rng, t| {
            let end: i64 = (0..t.ndim as usize).map(|i| (t.shape[i] - 1) * t.stride[i]).sum();
            let bytes = if t.dtype == compactattn_dtype::COMPACTATTN_DTYPE_E4M3 as i32 { 1 } else { 2 };
            t.storage_bytes = rng.pick(&[(end + 1) * bytes - 1, 1, -1, i64::MIN]);
        })
    }),
    (45, status::COMPACTATTN_E_WORKSPACE, |rng, step, _, a| {
        match rng.below(3) {
            0 => a.workspace = std::ptr::null_mut(),
            1 => {
                let least = step.plan.sizes.workspace_bytes;
                a.workspace_bytes = rng.pick(&[0, -1, i64::MIN, least - 1]);
            }
            _ => a.workspace = a.workspace.cast::<u8>().wrapping_add(64).cast(),
        }
        "args.workspace"
    }),
    (62, status::COMPACTATTN_E_STRIDE, |rng, step, b, _| {
        b.block_table.stride[0] = rng.below(step.case.table_width) as i64;
        "batch.block_table.stride"
    }),
];

/// Spoils a plan's description; what the message must name.
pub(crate) type Desc = fn(&mut Rng, &mut compactattn_plan_desc, &mut compactattn_settings) -> &'static str;

pub(crate) const DESCS: [(u8, status, Desc); 14] = [
    (11, status::COMPACTATTN_E_SHAPE, |rng, d, _| {
        (d.num_kv_heads, d.num_q_heads) = rng.pick(&[(2, 3), (3, 7), (8, 4), (5, 64)]);
        "num_q_heads"
    }),
    (12, status::COMPACTATTN_E_SHAPE, |rng, d, _| {
        let bad = rng.pick(&[0, -1, i32::MIN]);
        *(if rng.once_in(2) { &mut d.num_q_heads } else { &mut d.num_kv_heads }) = bad;
        "heads"
    }),
    (13, status::COMPACTATTN_E_UNSUPPORTED, |rng, d, _| {
        d.num_kv_heads = rng.within(1, 3) as i32;
        d.num_q_heads = d.num_kv_heads * rng.within(65, 200) as i32;
        "num_q_heads"
    }),
    (14, status::COMPACTATTN_E_UNSUPPORTED, |rng, d, _| {
        d.head_dim = rng.pick(&[0, 1, 63, 80, 65, 192, 512, -64, i32::MAX]);
        "head_dim"
    }),
    (15, status::COMPACTATTN_E_VALUE, |rng, d, _| {
        d.page_size = rng.pick(&[0, -1, -16, i32::MIN]);
        "page_size"
    }),
    (16, status::COMPACTATTN_E_UNSUPPORTED, |rng, d, _| {
        d.page_size = rng.pick(&[1, 8, 24, 48, 512, i32::MAX]);
        "page_size"
    }),
    (17, status::COMPACTATTN_E_VALUE, |rng, _, s| {
        s.block_size = rng.pick(&[0, -16, 8, 24, 48, 100, 512]);
        "block_size"
    }),
    (25, status::COMPACTATTN_E_VALUE, |rng, d, _| {
        d.sm_scale = rng.pick(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.125, -1e-30]);
        "sm_scale"
    }),
    (26, status::COMPACTATTN_E_VALUE, |rng, _, s| {
        let bad = rng.pick(&[f32::NAN, 0.0, -0.1, 1.01, f32::INFINITY, f32::NEG_INFINITY]);
        let fields = [&mut s.keep_value, &mut s.max_density, &mut s.density_guard];
        let i = rng.below(3);
        for (at, field) in fields.into_iter().enumerate() {
            *field = if at == i { bad } else { *field };
        }
        ["keep", "max_density", "density_guard"][i]
    }),
    (27, status::COMPACTATTN_E_VALUE, |rng, _, s| {
        s.max_density = 0.1 + 0.8 * rng.below(100) as f32 / 100.0;
        s.min_density = s.max_density + 0.05;
        "min_density"
    }),
    (28, status::COMPACTATTN_E_UNSUPPORTED, |rng, d, _| match rng.below(4) {
        0 => {
            d.sliding_window = rng.within(1, 5000) as i32;
            "sliding_window"
        }
        1 => {
            d.logits_soft_cap = rng.pick(&[30.0, 50.0, f32::NAN]);
            "logits_soft_cap"
        }
        2 => {
            d.attention_sinks = 1;
            "attention_sinks"
        }
        _ => {
            d.alibi = 1;
            "alibi"
        }
    }),
    (29, status::COMPACTATTN_E_DTYPE, |rng, d, _| {
        d.dtype = rng.pick(&[0, 4, 5, 99, -1, 100]);
        "dtype"
    }),
    (24, status::COMPACTATTN_E_VALUE, |rng, d, _| {
        let bad = rng.pick(&[0, -1, 1 << 31, i64::MAX, i64::MIN]);
        *(if rng.once_in(2) { &mut d.max_total_q } else { &mut d.max_kv_len }) = bad;
        "max_"
    }),
    (23, status::COMPACTATTN_E_OVERFLOW, |_, d, s| {
        (d.max_total_q, d.max_kv_len) = (i32::MAX.into(), i32::MAX.into());
        (d.num_kv_heads, d.num_q_heads) = (1 << 24, 1 << 30);
        s.query_span = 128;
        "limits"
    }),
];

const ALL: std::ops::Range<usize> = 0..8;

/// Spoils one of the call's tensors.
fn one(
    rng: &mut Rng,
    (batch, args): (&mut compactattn_batch, &mut compactattn_forward_args),
    among: std::ops::Range<usize>,
    spoil: impl Fn(&mut Rng, &mut compactattn_tensor),
) -> &'static str {
    let i = rng.within(among.start, among.end - 1);
    let (name, tensor) = &mut super::bad_input::tensors(batch, args)[i];
    spoil(rng, tensor);
    name
}

/// Dimensions of more than one entry, the last one always among them: strides of others are not looked at.
fn many(t: &compactattn_tensor) -> Vec<usize> {
    (0..t.ndim as usize).filter(|&i| t.shape[i] > 1).collect()
}

fn shift(t: &mut compactattn_tensor, bytes: usize) {
    t.data = t.data.cast::<u8>().wrapping_add(bytes).cast();
    t.storage_bytes = 0;
}
