//! Bad input through the C ABI: plans, settings and the environment (classes 11-17, 25-31, 68 of the table of bad
//! inputs). An e4m3 cache without scales (31) is no fault: they count as 1.

#![expect(clippy::unwrap_used, reason = "tests")]

mod capi_world;

use std::process::Command;

use capi_world::memory::Rng;
use capi_world::*;
use compactattn::capi::{compactattn_status as status, *};

/// For 100 worlds: the spoiled description is refused, by `plan_create` and by `supports` alike, and no handle is
/// written; the good one then still makes a plan.
fn refused_plan(spoil: impl Fn(&mut compactattn_plan_desc, &mut compactattn_settings, &mut Rng) -> Fault) {
    for seed in 0..VARIANTS {
        let world = World::random(seed);
        let mut rng = Rng::new(seed);
        let (mut desc, mut settings) = (world.desc, *world.settings);
        let Fault(wanted, name) = spoil(&mut desc, &mut settings, &mut rng);
        desc.settings = &raw const settings;
        let untouched = std::ptr::without_provenance_mut(0x5a5a);
        let mut plan = untouched;
        // SAFETY: `desc` and `settings` are live locals.
        let made = unsafe { compactattn_plan_create(world.context, &raw const desc, &raw mut plan) };
        assert_eq!(made, wanted, "variant {seed}: {}", last_error());
        check_text(wanted, name);
        assert_eq!(plan, untouched);
        let mut reason = [0_u8; 320];
        // SAFETY: as above; `reason` is a local.
        let answer = unsafe {
            compactattn_supports(world.context, &raw const desc, reason.as_mut_ptr().cast(), reason.len())
        };
        assert_eq!(answer, wanted);
        let reason: Vec<u8> = reason.into_iter().take_while(|&byte| byte != 0).collect();
        assert_eq!(String::from_utf8(reason).unwrap(), last_error());
        world.results();
        world.close();
    }
}

#[test]
fn class_11_12_13_heads_that_do_not_group() {
    refused_plan(|d, _, rng| {
        (d.num_kv_heads, d.num_q_heads) = *rng.pick(&[(2, 3), (3, 7), (8, 4), (5, 64)]);
        Fault(status::COMPACTATTN_E_SHAPE, "num_q_heads")
    });
    refused_plan(|d, _, rng| {
        let bad = *rng.pick(&[0, -1, i32::MIN]);
        if rng.range(0, 2) == 0 {
            d.num_q_heads = bad
        } else {
            d.num_kv_heads = bad
        }
        Fault(status::COMPACTATTN_E_SHAPE, "heads")
    });
    refused_plan(|d, _, rng| {
        d.num_kv_heads = rng.range(1, 4);
        d.num_q_heads = d.num_kv_heads * rng.range(65, 200);
        Fault(status::COMPACTATTN_E_UNSUPPORTED, "num_q_heads")
    });
}

#[test]
fn class_14_15_16_head_dims_and_page_sizes_without_a_kernel() {
    refused_plan(|d, _, rng| {
        d.head_dim = *rng.pick(&[0, 1, 63, 80, 65, 192, 512, -64, i32::MAX]);
        Fault(status::COMPACTATTN_E_UNSUPPORTED, "head_dim")
    });
    refused_plan(|d, _, rng| {
        d.page_size = *rng.pick(&[0, -1, -16, i32::MIN]);
        Fault(status::COMPACTATTN_E_VALUE, "page_size")
    });
    refused_plan(|d, _, rng| {
        d.page_size = *rng.pick(&[1, 8, 24, 48, 512, i32::MAX]);
        Fault(status::COMPACTATTN_E_UNSUPPORTED, "page_size")
    });
}

#[test]
fn class_17_blocks_that_are_no_multiple_of_a_page_or_its_part() {
    refused_plan(|_, s, rng| {
        s.block_size = *rng.pick(&[0, -16, 8, 24, 48, 100, 512]);
        Fault(status::COMPACTATTN_E_VALUE, "block_size")
    });
}

#[test]
fn class_25_scales_that_are_no_scale() {
    refused_plan(|d, _, rng| {
        d.sm_scale = *rng.pick(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.125, -1e-30]);
        Fault(status::COMPACTATTN_E_VALUE, "sm_scale")
    });
}

#[test]
fn class_26_shares_outside_0_to_1() {
    refused_plan(|_, s, rng| {
        let bad = *rng.pick(&[f32::NAN, 0.0, -0.1, 1.01, f32::INFINITY, f32::NEG_INFINITY]);
        let fields = [&mut s.keep_value, &mut s.max_density, &mut s.density_guard, &mut s.quoka_query_ratio];
        let names = ["keep", "max_density", "density_guard", "quoka_query_ratio"];
        let i = rng.range(0, 4).unsigned_abs() as usize;
        *fields.into_iter().nth(i).unwrap() = bad;
        Fault(status::COMPACTATTN_E_VALUE, names[i])
    });
}

#[test]
fn class_27_inverted_budgets_and_counts_below_zero() {
    refused_plan(|_, s, rng| {
        s.max_density = 0.1 + 0.8 * rng.unit().abs();
        s.min_density = s.max_density + 0.05;
        Fault(status::COMPACTATTN_E_VALUE, "min_density")
    });
    refused_plan(|_, s, rng| {
        let bad = *rng.pick(&[-1, -100, i32::MIN]);
        let fields = [
            ("sink_blocks", &mut s.sink_blocks),
            ("local_blocks", &mut s.local_blocks),
            ("heads_per_list", &mut s.heads_per_list),
            ("query_span", &mut s.query_span),
            ("dense_below_kv_len", &mut s.dense_below_kv_len),
            ("sample_rows", &mut s.sample_rows),
        ];
        let i = rng.range(0, 6).unsigned_abs() as usize;
        let (name, field) = fields.into_iter().nth(i).unwrap();
        *field = bad;
        Fault(status::COMPACTATTN_E_VALUE, name)
    });
    refused_plan(|_, s, rng| {
        let bad = *rng.pick(&[-1, 11, 100, i32::MAX]);
        let fields = [
            ("settings.selector", &mut s.selector),
            ("settings.keep", &mut s.keep),
            ("settings.keep_at", &mut s.keep_at),
            ("settings.mean_correction", &mut s.mean_correction),
        ];
        let i = rng.range(0, 4).unsigned_abs() as usize;
        let (name, field) = fields.into_iter().nth(i).unwrap();
        *field = bad;
        Fault(status::COMPACTATTN_E_VALUE, name)
    });
}

#[test]
fn the_layer_whose_settings_are_bad_is_named() {
    let world = World::random(0);
    let bad = compactattn_settings { max_density: 3.0, ..*world.settings };
    let layers: [*const compactattn_settings; 3] =
        [std::ptr::null(), &raw const *world.settings, &raw const bad];
    let desc = compactattn_plan_desc { num_layers: 3, layer_settings: layers.as_ptr(), ..world.desc };
    let mut plan = std::ptr::null_mut();
    // SAFETY: `desc` and what it points to are live locals.
    let made = unsafe { compactattn_plan_create(world.context, &raw const desc, &raw mut plan) };
    assert_eq!(made, status::COMPACTATTN_E_VALUE);
    check_text(made, "desc.layer_settings[2]: max_density");
    world.close();
}

#[test]
fn class_28_attention_that_is_not_offered() {
    refused_plan(|d, _, rng| {
        let some = rng.range(1, 5000);
        let name = match rng.range(0, 4) {
            0 => {
                d.sliding_window = some;
                "sliding_window"
            }
            1 => {
                d.logits_soft_cap = *rng.pick(&[30.0, 50.0, f32::NAN]);
                "logits_soft_cap"
            }
            2 => {
                d.attention_sinks = some;
                "attention_sinks"
            }
            _ => {
                d.alibi = some;
                "alibi"
            }
        };
        Fault(status::COMPACTATTN_E_UNSUPPORTED, name)
    });
}

#[test]
fn class_29_dtypes_that_are_not_offered() {
    refused_plan(|d, _, rng| {
        d.dtype = *rng.pick(&[0, 4, 5, 6, -1, 100]);
        Fault(status::COMPACTATTN_E_DTYPE, "dtype")
    });
    refused_plan(|d, _, rng| {
        let others: Vec<i32> = [1, 2, 3, 4, 5, 7, 99, -1].into_iter().filter(|&x| x != d.dtype).collect();
        d.kv_dtype = *rng.pick(&others);
        Fault(status::COMPACTATTN_E_DTYPE, "kv_dtype")
    });
}

#[test]
fn limits_of_a_plan_have_limits() {
    refused_plan(|d, _, rng| {
        let name = match rng.range(0, 5) {
            0 => {
                d.max_num_reqs = *rng.pick(&[0, -1]);
                "max_num_reqs"
            }
            1 => {
                d.max_total_q = *rng.pick(&[0, -1, 1 << 31, i64::MAX, i64::MIN]);
                "max_total_q"
            }
            2 => {
                d.max_kv_len = *rng.pick(&[0, -1, 1 << 31, i64::MAX, i64::MIN]);
                "max_kv_len"
            }
            3 => {
                d.num_layers = *rng.pick(&[-1, 1 << 20, i32::MAX]);
                "num_layers"
            }
            _ => {
                d.num_splits = *rng.pick(&[-1, 65, i32::MAX]);
                "num_splits"
            }
        };
        Fault(status::COMPACTATTN_E_VALUE, name)
    });
}

#[test]
fn class_23_limits_whose_buffers_leave_63_bits() {
    refused_plan(|d, s, _| {
        (d.max_total_q, d.max_kv_len) = (i32::MAX.into(), i32::MAX.into());
        (d.num_kv_heads, d.num_q_heads, d.num_splits) = (1 << 24, 1 << 30, 64);
        s.query_span = 128;
        Fault(status::COMPACTATTN_E_OVERFLOW, "limits")
    });
}

#[test]
fn gates_that_are_missing_or_cannot_be_read() {
    refused_plan(|_, s, _| {
        *s = settings_of(compactattn_selector::COMPACTATTN_SELECTOR_ATTN_GATE);
        Fault(status::COMPACTATTN_E_NULL, "gate")
    });
    let inv_freq = [1.0_f32; 48];
    refused_plan(|d, _, _| {
        d.gate_weights_path = c"/nowhere/at/all.safetensors".as_ptr();
        (d.rope_inv_freq, d.rope_inv_freq_len) = (inv_freq.as_ptr(), d.head_dim / 2);
        Fault(status::COMPACTATTN_E_IO, "gate file")
    });
    refused_plan(|d, _, rng| {
        d.gate_weights_path = c"/nowhere/at/all.safetensors".as_ptr();
        (d.rope_inv_freq, d.rope_inv_freq_len) =
            (inv_freq.as_ptr(), *rng.pick(&[-1, 0, 1, 31, 128, i32::MAX]));
        Fault(status::COMPACTATTN_E_SHAPE, "rope_inv_freq_len")
    });
    refused_plan(|d, _, _| {
        d.gate_weights_path = c"\xff".as_ptr();
        Fault(status::COMPACTATTN_E_VALUE, "gate_weights_path")
    });
}

#[test]
fn class_68_no_gpu_can_be_asked_for_in_this_build() {
    let desc = compactattn_context_desc {
        struct_size: 24,
        abi_version: compactattn_abi_version(),
        device_kind: compactattn_device_kind::COMPACTATTN_DEVICE_CUDA as i32,
        ..zeroed()
    };
    let mut context = std::ptr::null_mut();
    // SAFETY: both point to locals.
    let made = unsafe { compactattn_context_create(&raw const desc, &raw mut context) };
    assert!(matches!(made, status::COMPACTATTN_E_NO_DRIVER | status::COMPACTATTN_E_NOT_BUILT), "{made:?}");
    check_text(made, "device_kind");
    assert!(context.is_null());
}

#[test]
fn class_68_an_environment_that_cannot_be_understood() {
    for (name, value, wanted) in [
        ("COMPACTATTN_MODE", "sparse", "E_CONFIG: COMPACTATTN_MODE"),
        ("COMPACTATTN_CONFIG", "/nowhere/at/all.json", "E_IO: COMPACTATTN_CONFIG"),
        ("COMPACTATTN_MODE", "block_sparse", "OK selector 2"),
    ] {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "settings_from_this_environment", "--ignored", "--nocapture"])
            .env(name, value)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stdout).into_owned();
        assert!(said.contains(wanted), "{name}={value}: {said}");
    }
}

#[test]
#[ignore = "runs in a child process, with an environment of its own"]
fn settings_from_this_environment() {
    let mut settings: compactattn_settings = zeroed();
    settings.struct_size = 96;
    // SAFETY: `settings` is as long as it says.
    let read = unsafe { compactattn_settings_from_env(-1, &raw mut settings) };
    match read {
        status::COMPACTATTN_OK => println!("OK selector {}", settings.selector),
        _ => println!("{}", last_error()),
    }
}
