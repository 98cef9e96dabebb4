//! What reads bytes that others wrote: configuration, environment, weights, the ABI's structs. Each target takes any
//! bytes and panics only where the library is at fault. tests/fuzz.rs and fuzz/ drive them.
#![allow(dead_code, unreachable_pub, reason = "each driver uses its part")]
#![allow(clippy::unwrap_used, clippy::wildcard_imports, reason = "tests of everything the header declares")]
#![allow(clippy::cast_possible_truncation, reason = "sizes of structs")]

use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::PathBuf;

use compactattn::capi::{compactattn_status as status, *};
use compactattn::config::{self, Mode};
use compactattn::config_file;
use compactattn::select::{Gate, Pairing, Rope};
use compactattn::types::{Dtype, Shape};

pub type Target = fn(&[u8]);

/// By the names their corpora and fuzz/fuzz_targets have.
pub const TARGETS: [(&str, Target); 4] =
    [("config", config), ("environment", environment), ("safetensors", safetensors), ("structs", structs)];

/// One target by its name.
pub fn run(name: &str, bytes: &[u8]) {
    let (_, target) = TARGETS.into_iter().find(|(known, _)| *known == name).unwrap();
    target(bytes);
}

/// Inputs that get far into each target, for mutations to start from.
pub fn seeds(target: &str) -> Vec<Vec<u8>> {
    let text = |texts: &[&str]| texts.iter().map(|text| text.as_bytes().to_vec()).collect();
    match target {
        "config" => text(&[
            r#"{"keep_density": 0.2, "layers": {"3": {"selector": "dense"}, "17": {"block_size": 64}}}"#,
            r#"{"selector": "flashprefill", "keep_threshold": 0.02, "keep_at": "row", "mean_correction": true}"#,
            r#"{"selector": "two_level", "two_level_factor": 2.5, "min_density": 0.1, "max_density": 0.4}"#,
            r#"{"query_span": 128, "heads_per_list": 1, "dense_below_kv_len": 1024, "xattention_stride": 8}"#,
        ]),
        "environment" => text(&[
            "COMPACTATTN_MODE=compactattn\nCOMPACTATTN_CONFIG=c.json",
            "COMPACTATTN_MODE= Block_Sparse \nCOMPACTATTN_PORT_80_TCP=x\nCOMPACTATTN_MOOD=1",
        ]),
        "safetensors" => vec![weights(64, 4), weights(64, 2), weights(16, 1)],
        _ => vec![of_struct(&plan_desc()), of_struct(&context_desc()), vec![0; 512], vec![0xFF; 512]],
    }
}

/// A configuration file: refused by name, or settings that are valid, and the same when written and read again.
fn config(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes).into_owned();
    let vars = [("COMPACTATTN_MODE", "compactattn"), ("COMPACTATTN_CONFIG", "c.json")];
    let read = |text: String| {
        let vars = vars.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        config::resolve(vars, move |_| Ok(text.clone()))
    };
    let Ok(config) = read(text) else { return };
    for settings in config.layers.values().chain([&config.settings]) {
        settings.check().unwrap();
    }
    let written = config_file::of(&config.settings, &config.layers).to_string();
    let mut again = read(written.clone()).unwrap_or_else(|e| panic!("{e}: {written}"));
    // Dense rules are the mode's, and are not written.
    again.settings.dense = config.settings.dense;
    for (layer, settings) in &mut again.layers {
        settings.dense = config.layers.get(layer).unwrap().dense;
    }
    assert_eq!((again.settings, again.layers), (config.settings, config.layers), "{written}");
}

/// Lines NAME=VALUE: an error, or a mode that exists.
fn environment(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes).into_owned();
    let vars = text.lines().filter_map(|line| line.split_once('='));
    let vars = vars.map(|(name, value)| (name.to_owned(), value.to_owned()));
    match config::resolve(vars, |_| Ok(r#"{"keep_density": 0.5}"#.to_owned())) {
        Ok(config) => assert!(Mode::ALL.iter().any(|(mode, _)| *mode == config.mode)),
        Err(error) => assert!(error.to_string().len() < 2000),
    }
}

/// A file of gate weights.
fn safetensors(bytes: &[u8]) {
    let (file, path) = in_memory(bytes);
    let rope = Rope { inv_freq: vec![1.0; 32], gate_inv_freq: None, pairing: Pairing::HalfSplit, scale: 1.0 };
    let shape = Shape {
        num_q_heads: 4,
        num_kv_heads: 2,
        head_dim: 64,
        page_size: 16,
        dtype: Dtype::Bf16,
        kv_dtype: Dtype::Bf16,
        sm_scale: 0.125,
    };
    if let Ok(gate) = Gate::load(&path, &shape, 2, rope) {
        assert!(gate.num_layers() <= 2);
    }
    drop(file);
}

/// The ABI's structs as anybody may fill them; pointers in them are the target's own, as the header promises.
fn structs(bytes: &[u8]) {
    let context = context_of(bytes);
    let (desc, settings) = bytes.split_at(bytes.len().min(size_of::<compactattn_plan_desc>()));
    let mut spoiled = padded::<compactattn_plan_desc>(desc);
    let own = padded::<compactattn_settings>(settings);
    spoiled.known.settings =
        if bytes.len().is_multiple_of(2) { std::ptr::null() } else { &raw const own.known };
    spoiled.known.layer_settings = std::ptr::null();
    spoiled.known.gate_weights_path = std::ptr::null();
    spoiled.known.rope_inv_freq = std::ptr::null();
    let mut plan = std::ptr::null_mut();
    // SAFETY: both structs are readable for more bytes than any size the library accepts.
    let made = unsafe { compactattn_plan_create(context, &raw const spoiled.known, &raw mut plan) };
    sound(made);
    // SAFETY: as above.
    let answer = unsafe { compactattn_supports(context, &raw const spoiled.known, std::ptr::null_mut(), 0) };
    assert_eq!(answer, made, "supports and plan_create differ");
    if made == status::COMPACTATTN_OK {
        let mut sizes = padded::<compactattn_sizes>(&[]);
        sizes.known.struct_size = size_of::<compactattn_sizes>() as u32;
        // SAFETY: `sizes` is longer than it says.
        sound(unsafe { compactattn_plan_sizes(plan, 0, std::ptr::null(), &raw mut sizes.known) });
        // SAFETY: as above; `own` is longer than any size the library accepts.
        sound(unsafe { compactattn_plan_sizes(plan, 0, &raw const own.known, &raw mut sizes.known) });
        sound(compactattn_plan_destroy(plan));
    }
    let mut filled = padded::<compactattn_settings>(settings);
    // SAFETY: `filled` is longer than any size the library accepts.
    sound(unsafe {
        compactattn_settings_init(bytes.first().map_or(0, |&x| x.into()), &raw mut filled.known)
    });
    sound(compactattn_context_destroy(context));
}

/// A context of what the bytes say, if they say one; else one that is valid.
fn context_of(bytes: &[u8]) -> *mut compactattn_context {
    let mut desc = padded::<compactattn_context_desc>(bytes);
    // No driver is looked for here.
    if desc.known.device_kind == 2 {
        desc.known.device_kind = 1;
    }
    let mut context = std::ptr::null_mut();
    // SAFETY: `desc` is readable for more bytes than any size the library accepts.
    sound(unsafe { compactattn_context_create(&raw const desc.known, &raw mut context) });
    if context.is_null() {
        let desc = context_desc();
        // SAFETY: both point to locals.
        sound(unsafe { compactattn_context_create(&raw const desc, &raw mut context) });
    }
    assert!(!context.is_null());
    context
}

/// No status that says that the library is at fault.
pub fn sound(got: status) {
    let fault = matches!(got, status::COMPACTATTN_E_INTERNAL | status::COMPACTATTN_E_PANIC);
    assert!(!fault, "{got:?}");
}

/// A struct with bytes after it, for sizes that are too large.
#[repr(C, align(16))]
struct Padded<T> {
    known: T,
    /// As large as the library believes a struct may be.
    tail: [u8; 64 * 1024],
}

/// The bytes as the struct, zeros where they end.
fn padded<T>(bytes: &[u8]) -> Box<Padded<T>> {
    // SAFETY: the header's structs hold numbers and raw pointers only.
    let mut made: Box<Padded<T>> = Box::new(unsafe { std::mem::zeroed() });
    let len = bytes.len().min(size_of::<T>());
    // SAFETY: as many bytes as both have; any bits are such a struct, and its pointers are replaced before use.
    unsafe { (&raw mut made.known).cast::<u8>().copy_from_nonoverlapping(bytes.as_ptr(), len) };
    made
}

fn plan_desc() -> compactattn_plan_desc {
    let mut desc = padded::<compactattn_plan_desc>(&[]).known;
    desc.struct_size = size_of::<compactattn_plan_desc>() as u32;
    (desc.num_q_heads, desc.num_kv_heads, desc.head_dim, desc.page_size, desc.dtype) = (4, 2, 128, 16, 1);
    (desc.max_num_reqs, desc.max_total_q, desc.max_kv_len) = (2, 64, 512);
    desc
}

fn context_desc() -> compactattn_context_desc {
    let mut desc = padded::<compactattn_context_desc>(&[]).known;
    desc.struct_size = size_of::<compactattn_context_desc>() as u32;
    (desc.abi_version, desc.device_kind, desc.num_threads) = (compactattn_abi_version(), 1, 1);
    desc
}

fn of_struct<T>(of: &T) -> Vec<u8> {
    // SAFETY: the header's structs have no padding that is not written: they are zeroed first.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(of).cast::<u8>(), size_of::<T>()) }.to_vec()
}

/// A well-formed file: keys' maxima, minima and means, 64 wide, to `gate_dim` numbers for each head.
fn weights(gate_dim: usize, heads: usize) -> Vec<u8> {
    let name = "model.layers.0.self_attn.attn_gate.mask_linear_k.weight";
    let shape = [heads, 3 * 64, gate_dim];
    let bytes = shape.iter().product::<usize>() * 4;
    let header = format!(
        r#"{{"{name}":{{"dtype":"F32","shape":[{},{},{}],"data_offsets":[0,{bytes}]}}}}"#,
        shape[0], shape[1], shape[2]
    );
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; bytes]].concat()
}

/// A file that is nowhere but in memory; it goes with its handle.
fn in_memory(bytes: &[u8]) -> (std::fs::File, PathBuf) {
    // SAFETY: the name ends in NUL.
    let fd = unsafe { libc::memfd_create(c"fuzz".as_ptr(), 0) };
    assert!(fd >= 0);
    // SAFETY: just made, owned by nobody else.
    let mut file = unsafe { std::fs::File::from_raw_fd(fd) };
    file.write_all(bytes).unwrap();
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    (file, path)
}
