//! Tests of whole calls on the fake driver: what reaches it, and what is refused before it.

use std::ffi::CStr;

use super::*;
use crate::cuda::batch::{DevicePool, DeviceTokens};
use crate::cuda::export::{DeviceCsr, DevicePadded};
use crate::cuda::fake::{Fake, context};
use crate::cuda::merge::DeviceSide;
use crate::cuda::nvtx::tests::ranges_of;
use crate::error::Status;
use crate::fixture;
use crate::parallel::Parallel;
use crate::plan::Limits;
use crate::run::PlanDesc;
use crate::select::gate_weights::tests::{Form, gate};
use crate::settings::{KeepAt, Scope, Selector, Settings};
use crate::types::Dtype;

#[path = "plan_kernels_tests.rs"]
mod kernels;

const HEAD_DIMS: [usize; 4] = [64, 96, 128, 256];
const KV_HEADS: usize = 2;
const GROUP: usize = 4;
const LIMITS: Limits = Limits { max_num_reqs: 4, max_total_q: 600, max_kv_len: 16_384 };

/// Every function of the driver that a call may use: nothing that waits, allocates, frees, copies or loads.
const ALLOWED: [&CStr; 7] = [
    c"cuCtxPushCurrent_v2",
    c"cuCtxPopCurrent_v2",
    c"cuStreamGetCtx",
    c"cuStreamIsCapturing",
    c"cuTensorMapEncodeTiled",
    c"cuLaunchKernelEx",
    c"cuGetErrorName",
];

#[test]
fn every_selector_launches_its_kernels_in_order_and_nothing_else() {
    for (selector, _) in Selector::ALL.into_iter().filter(|(selector, _)| *selector != Selector::Quoka) {
        for (dtype, head_dim) in HEAD_DIMS.iter().flat_map(|&dim| [(Dtype::Bf16, dim), (Dtype::F16, dim)]) {
            assert_launches(selector, dtype, head_dim);
        }
    }
}

fn assert_launches(selector: Selector, dtype: Dtype, head_dim: usize) {
    let world = World::new("", desc(Settings::of(selector), dtype, head_dim)).unwrap();
    let launches = world.run(world.stream()).unwrap();
    let words: Vec<Vec<_>> = launches.iter().map(|line| line.split(' ').collect()).collect();
    let names: Vec<_> = words.iter().map(|words| words[0]).collect();
    assert_eq!(names, expected(&world.plan_of_host, dtype), "{selector:?} {dtype:?} {head_dim}");
    let is_empty = |grid: &str| grid.split('x').any(|extent| extent == "0");
    assert!(!words.iter().any(|words| is_empty(words[1])), "{launches:?}");
    let overlaps = |words: &&Vec<&str>| words.last() == Some(&"overlaps");
    assert!(words[1..].iter().all(|words| overlaps(&words)), "{launches:?}");
    assert!(!overlaps(&&words[0]), "{launches:?}");
}

#[test]
fn a_profiler_sees_each_stage_of_a_call_around_its_launches() {
    let settings = Settings { keep_at: KeepAt::Row, ..Settings::of(Selector::PooledMass) };
    let world = World::new("", desc(settings, Dtype::Bf16, 128)).unwrap();
    let stages =
        |words: &[&str]| words.iter().map(|word| format!("(compactattn {word})")).collect::<String>();
    let forward = ranges_of(|| drop(world.run(world.stream()).unwrap()));
    assert_eq!(forward, stages(&["plan", "select", "union", "union", "attend"]));
    let means = MeansAt { k: SOMEWHERE, v: 0, seals: 0 };
    // SAFETY: the fake driver follows no address.
    let update = |call: &Call| unsafe { world.plan.update_summaries(call, Which::Completed, means) };
    assert_eq!(ranges_of(|| drop(world.launches_of(world.stream(), update))), stages(&["summaries"]));
    // A stage that fails is closed like any other.
    world.fake.set_mode("lost");
    assert_eq!(ranges_of(|| assert!(world.run(world.stream()).is_err())), stages(&["plan"]));
}

#[test]
fn over_e4m3_keys_and_values_are_read_by_kernels_of_its_own() {
    for (selector, dtype, head_dim) in
        [(Selector::SampledExact, Dtype::Bf16, 128), (Selector::TwoLevel, Dtype::F16, 64)]
    {
        let world = World::new("", over_e4m3(Settings::of(selector), dtype, head_dim)).unwrap();
        let launches = world.run(world.stream()).unwrap();
        let reads =
            |line: &&String| ["_cells_read", "_cells_pool", "_attend_"].iter().any(|x| line.contains(x));
        let reading: Vec<&String> = launches.iter().filter(reads).collect();
        let own = if dtype == Dtype::Bf16 { "_bf16_e4m3" } else { "_fp16_e4m3" };
        assert!(reading.len() >= 2 && reading.iter().all(|line| line.contains(own)), "{launches:?}");
    }
    let wide = over_e4m3(Settings::of(Selector::Dense), Dtype::Bf16, 96);
    assert_unsupported(World::new("", wide), &["kv_dtype on CUDA", "head_dim 64 or 128"]);
    for selector in [Selector::XAttention, Selector::AttnGate] {
        let desc = over_e4m3(Settings::of(selector), Dtype::Bf16, 128);
        assert_unsupported(World::new("", desc), &["selector", "for a cache of e4m3", selector.name()]);
    }
}

fn over_e4m3(settings: Settings, dtype: Dtype, head_dim: usize) -> PlanDesc {
    let desc = desc(settings, dtype, head_dim);
    PlanDesc { shape: fixture::over_e4m3(desc.shape), ..desc }
}

#[test]
fn checked_mode_looks_at_lists_right_before_work_is_planned_and_adds_nothing_else() {
    for selector in [Selector::Dense, Selector::SampledExact, Selector::FlashPrefill] {
        let mut world = World::new("", desc(Settings::of(selector), Dtype::Bf16, 128)).unwrap();
        let plain = world.run(world.stream()).unwrap();
        world.plan.checked = true;
        let mut checked = world.run(world.stream()).unwrap();
        let at = plain.iter().position(|line| line.starts_with("compactattn_plan_work ")).unwrap();
        assert!(checked.remove(at).starts_with("compactattn_check_lists "), "{selector:?}");
        assert_eq!(checked, plain, "{selector:?}");
    }
}

#[test]
fn where_every_request_is_dense_nothing_is_launched_for_scores() {
    for selector in [
        Selector::SampledExact,
        Selector::PooledMass,
        Selector::TwoLevel,
        Selector::FlashPrefill,
        Selector::XAttention,
        Selector::AttnGate,
    ] {
        let settings = Settings::of(selector);
        let launched = |max_kv_len| -> Vec<String> {
            let limits = Limits { max_kv_len, ..LIMITS };
            let world = World::new("", PlanDesc { limits, ..desc(settings, Dtype::Bf16, 128) }).unwrap();
            let launches = world.run(world.stream()).unwrap();
            launches.iter().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
        };
        let below = settings.dense.below_kv_len;
        let dense = ["plan_spans", "union_table", "plan_work", "attend_sm90_bf16_d128"];
        assert_eq!(launched(below - 1), dense.map(|name| format!("compactattn_{name}")), "{selector:?}");
        let plan = run::Plan::new(&desc(settings, Dtype::Bf16, 128), Parallel::new(1)).unwrap();
        assert_eq!(launched(below), expected(&plan, Dtype::Bf16), "{selector:?}");
    }
}

#[test]
fn a_call_runs_on_the_legacy_stream_and_on_one_that_is_captured() {
    for selector in [Selector::Dense, Selector::TwoLevel, Selector::AttnGate] {
        let world = World::new("", desc(Settings::of(selector), Dtype::Bf16, 128)).unwrap();
        let launches = world.run(std::ptr::null_mut()).unwrap();
        world.fake.set_mode("capture");
        assert_eq!(world.run(world.stream()).unwrap(), launches, "{selector:?}");
        // Work there would break the capture of the other stream.
        let refused = world.run(std::ptr::null_mut()).unwrap_err();
        assert_eq!(refused.status(), Status::Capture, "{refused}");
        world.fake.set_mode("");
    }
}

#[test]
fn a_stream_of_another_context_is_refused_before_anything_runs() {
    let world = World::new("", desc(Settings::paper(), Dtype::Bf16, 128)).unwrap();
    let foreign = std::ptr::without_provenance_mut(world.fake.number(c"fake_foreign_stream"));
    assert_eq!(world.run(foreign).unwrap_err().status(), Status::Stream);
    assert!(world.fake.launches().is_empty());
}

#[test]
fn what_the_gpu_does_not_offer_is_unsupported_by_name() {
    let usual = || desc(Settings::of(Selector::SampledExact), Dtype::Bf16, 128);
    let quoka = Settings { block_size: 16, ..Settings::of(Selector::Quoka) };
    let crowded = Limits { max_num_reqs: 1025, max_total_q: 2000, ..LIMITS };
    for (desc, named) in [
        (desc(quoka, Dtype::Bf16, 128), "quoka"),
        (desc(Settings::paper(), Dtype::F32, 128), "f32"),
        (PlanDesc { splits: 2, ..usual() }, "num_splits"),
        (PlanDesc { limits: crowded, ..usual() }, "max_num_reqs"),
    ] {
        assert_unsupported(World::new("", desc), &[named]);
    }
    let most = Limits { max_num_reqs: 1024, ..crowded };
    assert!(World::new("", PlanDesc { limits: most, ..usual() }).is_ok());
}

#[test]
fn a_selector_that_needs_more_shared_memory_than_the_gpu_has_is_refused() {
    // 9.0 has 227 KB a CTA, 8.0 163 KB, the rest of 8.x and 12.0 99 KB; kernels of the fake keep 1 KB of it.
    for (mode, selector, head_dim, wanted) in [
        ("cc86", Selector::FlashPrefill, 128, None),
        ("cc89", Selector::FlashPrefill, 256, Some("135168")),
        ("cc80", Selector::FlashPrefill, 256, None),
        ("cc86", Selector::XAttention, 64, Some("110592")),
        ("cc80", Selector::XAttention, 256, None),
        ("cc86", Selector::SampledExact, 256, None),
        ("cc89", Selector::TwoLevel, 256, None),
        ("cc89", Selector::Oracle, 256, None),
        ("cc86", Selector::PooledMass, 128, None),
        ("cc86", Selector::AttnGate, 256, None),
        ("cc86", Selector::Dense, 256, None),
    ] {
        let made = World::new(mode, desc(Settings::of(selector), Dtype::F16, head_dim));
        match wanted {
            None => drop(made.unwrap_or_else(|error| panic!("{mode} {selector:?} {head_dim}: {error}"))),
            Some(bytes) if mode == "cc80" => assert_unsupported(made, &[selector.name(), bytes, "165888"]),
            Some(bytes) => assert_unsupported(made, &[selector.name(), bytes, "100352"]),
        }
    }
    // Bits of a row of 2^20 blocks of one token: 131072 bytes.
    let limits = Limits { max_kv_len: 1 << 20, ..LIMITS };
    let tokens = Settings { block_size: 1, ..Settings::of(Selector::Dense) };
    let long = || PlanDesc { limits, ..desc(tokens, Dtype::Bf16, 128) };
    assert_unsupported(World::new("cc86", long()), &["max_kv_len", "131072"]);
    assert!(World::new("", long()).is_ok());
}

#[test]
fn keys_come_in_pieces_where_whole_ones_do_not_fit() {
    for (mode, in_pieces) in [("cc86", true), ("cc89", true), ("cc80", false)] {
        let world = World::new(mode, desc(Settings::of(Selector::TwoLevel), Dtype::F16, 256)).unwrap();
        let launches = world.run(world.stream()).unwrap();
        let cells = |line: &&String| line.contains("_cells_read") || line.contains("_cells_pool");
        let small = |line: &&String| line.contains("_small_fp16_d256 ");
        let found = launches.iter().filter(cells).filter(small).count();
        assert_eq!(found, if in_pieces { launches.iter().filter(cells).count() } else { 0 }, "{launches:?}");
        assert!(launches.iter().filter(cells).count() >= 2, "{launches:?}");
    }
}

#[test]
fn summaries_that_a_selector_needs_are_asked_for() {
    for selector in [Selector::FlashPrefill, Selector::PooledMass, Selector::TwoLevel] {
        let mut world = World::new("", desc(Settings::of(selector), Dtype::Bf16, 64)).unwrap();
        world.k_mean = 0;
        let error = world.run(world.stream()).unwrap_err();
        assert!(error.status() == Status::Null && error.to_string().contains("summaries"), "{error}");
        assert!(world.fake.launches().is_empty());
    }
}

#[test]
fn exports_and_merges_launch_their_kernels_and_nothing_else() {
    for (dtype, merge) in [(Dtype::Bf16, "compactattn_merge_bf16"), (Dtype::F16, "compactattn_merge_fp16")] {
        let world = World::new("", desc(Settings::of(Selector::SampledExact), dtype, 96)).unwrap();
        let csr = DeviceCsr { indptr: SOMEWHERE, indices: SOMEWHERE, last_page_len: SOMEWHERE };
        let padded = DevicePadded { counts: SOMEWHERE, seq_lens: SOMEWHERE, pages: SOMEWHERE, width: 1024 };
        let layout = &world.plan_of_host.layouts()[0];
        let (side, both) = (side(layout), output(layout));
        // Two requests, lists of a whole chunk: two spans; 600 tokens of 8 heads of 96 by 8 elements a thread.
        let rows = 2 * layout.lists_per_span();
        let launches = world
            .launches_of(world.stream(), |call| {
                // SAFETY: the fake driver follows no address but the workspace's, and its streams are known to it.
                unsafe { world.plan.export_padded(call, SOMEWHERE, &padded) }?;
                // SAFETY: as above.
                unsafe { world.plan.export_csr(call, SOMEWHERE, &csr) }?;
                // SAFETY: as above.
                unsafe { world.plan.merge((&layout.shape, 600), (&side, &side), &both, call.stream) }
            })
            .unwrap();
        let got: Vec<_> =
            launches.iter().map(|line| line.split(' ').take(2).collect::<Vec<_>>().join(" ")).collect();
        let plan = "compactattn_plan_spans 8x1x1".to_owned();
        let of = |name: &str| format!("compactattn_export_{name} {rows}x1x1");
        let starts = "compactattn_export_starts 1x1x1".to_owned();
        let merge = format!("{merge} {}x1x1", 600 * 8 * 96 / 8 / 256);
        assert_eq!(got, [plan.clone(), of("padded"), plan, of("counts"), starts, of("csr"), merge]);
    }
}

/// Planning writes the rows of means too, attend reads them; the workspace has room for two of every request, and for
/// what each list leaves out of them.
#[test]
fn mean_correction_has_kernels_and_room_of_its_own() {
    let corrected = Settings { mean_correction: true, ..Settings::of(Selector::SampledExact) };
    for (dtype, head_dim) in HEAD_DIMS.iter().flat_map(|&dim| [(Dtype::Bf16, dim), (Dtype::F16, dim)]) {
        let plain = World::new("", desc(Settings::of(Selector::SampledExact), dtype, head_dim)).unwrap();
        let world = World::new("", desc(corrected, dtype, head_dim)).unwrap();
        let names = |world: &World| -> Vec<String> {
            let launches = world.run(world.stream()).unwrap();
            launches.iter().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
        };
        let suffix = if dtype == Dtype::Bf16 { "_means_bf16" } else { "_means_fp16" };
        let expected = names(&plain).into_iter().map(|name| match &name {
            _ if name.ends_with("plan_work") => name + suffix,
            _ if name.contains("attend_sm") => name + "_means",
            _ => name,
        });
        assert_eq!(names(&world), expected.collect::<Vec<_>>());
        // A mean for each 512 of a row of 16384 tokens, up to a tile, of 2 bytes an element; a byte for each of each list.
        let rows = 2 * LIMITS.max_num_reqs * KV_HEADS * 128 * head_dim * 2;
        let counts = 128 * world.plan_of_host.layouts()[0].max_list_rows();
        assert_eq!(world.workspace.len_bytes(), plain.workspace.len_bytes() + rows + counts);
    }
}

#[test]
fn mean_values_are_asked_for() {
    let corrected = Settings { mean_correction: true, ..Settings::of(Selector::FlashPrefill) };
    let mut world = World::new("", desc(corrected, Dtype::Bf16, 64)).unwrap();
    world.v_mean = 0;
    let error = world.run(world.stream()).unwrap_err();
    assert!(error.status() == Status::Null && error.to_string().contains("v_mean"), "{error}");
    assert!(world.fake.launches().is_empty());
}

struct World {
    fake: Fake,
    plan: Plan,
    plan_of_host: run::Plan,
    workspace: DeviceBuffer,
    k_mean: u64,
    v_mean: u64,
}

impl World {
    #[expect(clippy::needless_pass_by_value, reason = "each caller makes one for it")]
    fn new(mode: &str, desc: PlanDesc) -> Result<Self> {
        let fake = Fake::in_mode(mode);
        let context = context(&fake);
        let plan_of_host = run::Plan::new(&desc, Parallel::new(1)).unwrap();
        let plan = Plan::new(Arc::clone(&context), &plan_of_host, desc.splits)?;
        let bytes = plan.workspace_bytes(0, &plan_of_host.layouts()[0])?;
        let workspace = context.alloc(bytes)?;
        Ok(Self { fake, plan, plan_of_host, workspace, k_mean: SOMEWHERE, v_mean: SOMEWHERE })
    }

    fn stream(&self) -> *mut c_void {
        std::ptr::without_provenance_mut(self.fake.number(c"fake_stream"))
    }

    /// Launches of one forward.
    fn run(&self, stream: *mut c_void) -> Result<Vec<String>> {
        let output = output(&self.plan_of_host.layouts()[0]);
        // SAFETY: the fake driver follows no address but the workspace's, and its streams are known to it.
        self.launches_of(stream, |call| unsafe { self.plan.forward(call, &output) })
    }

    /// Launches of `body`, which may call nothing of the driver but [`ALLOWED`].
    fn launches_of(
        &self,
        stream: *mut c_void,
        body: impl FnOnce(&Call) -> Result<()>,
    ) -> Result<Vec<String>> {
        let layout = &self.plan_of_host.layouts()[0];
        let external = layout.settings.selector == Selector::External;
        let batch = batch(layout);
        let call = Call {
            layer: 0,
            layout,
            batch: &batch,
            k_mean: self.k_mean,
            v_mean: self.v_mean,
            external: external.then_some(External::Scores(SOMEWHERE)),
            workspace: self.workspace.address(),
            stream,
        };
        let allowed = || ALLOWED.map(|function| self.fake.calls(function)).iter().sum::<u64>();
        let before = (self.fake.all_calls(), allowed(), self.fake.launches().len());
        let result = body(&call);
        assert_eq!(self.fake.all_calls() - before.0, allowed() - before.1, "a call that is not allowed");
        assert_eq!(self.fake.number(c"fake_context_depth"), 0);
        result.map(|()| self.fake.launches().split_off(before.2))
    }
}

/// Kernels of one forward whose sampled rows fit one tile.
fn expected(plan: &run::Plan, dtype: Dtype) -> Vec<String> {
    let layout = &plan.layouts()[0];
    let (dtype, dim) = (if dtype == Dtype::Bf16 { "bf16" } else { "fp16" }, layout.shape.head_dim);
    let scoring: &[&str] = match layout.settings.selector {
        Selector::SampledExact => &["sample_rows_T", "cells_read_T", "mass_lists_short"],
        // 600 tokens of 4 heads, 128 rows a tile.
        Selector::Oracle => &["cells_read_T", "cells_mass"].repeat(19),
        Selector::PooledMass => &["sample_rows_T", "cells_pool_T", "mass_lists_short"],
        // Two tiles of 256 dims beside a slice of cells and what clusters exchange: more than a CTA has.
        Selector::TwoLevel if dim < 256 => {
            &["sample_rows_T", "pooled_lists_T", "cells_read_candidates_T", "mass_lists_short"]
        }
        Selector::TwoLevel => {
            let first = ["sample_rows_T", "cells_pool_T", "cells_mass", "two_level_candidates"];
            &[&first[..], &["cells_read_candidates_T", "mass_lists_short"]].concat()
        }
        Selector::FlashPrefill if dim == 64 => &["flashprefill_sm90_T_d64"],
        Selector::FlashPrefill if dim == 128 => &["flashprefill_sm90_T_d128"],
        Selector::FlashPrefill => &["flashprefill_T"],
        Selector::XAttention => &["xattention_T", "xattention_mass_T"],
        Selector::AttnGate => &["attn_gate_keys_T", "attn_gate_T"],
        Selector::Streaming => &["fill_scores"],
        _ => &[],
    };
    let keeping: &[&str] = if layout.settings.keep_at == KeepAt::Row { &["keep_rows"] } else { &[] };
    let attend = if dim == 128 { "attend_sm90_T_d128" } else { &format!("attend_sm80_T_d{dim}") };
    let makes_lists = scoring.last().is_some_and(|name| name.contains("_lists"));
    let uniting: &[&str] = if makes_lists { &[] } else { &["union_table"] };
    let last = ["plan_work", attend];
    let all = [&["plan_spans"], scoring, keeping, uniting, &last].concat();
    let has_neighbours = (1..600).contains(&layout.select_span());
    let full = |name: &&str| match *name {
        "sample_rows_T" if dim <= 128 => "sample_rows_held_T".to_owned(),
        "cells_read_T" if dim == 128 && has_neighbours => "cells_read_pairs_sm90_T_d128".to_owned(),
        "cells_read_T" | "cells_read_candidates_T" if dim == 128 => name.replace("_T", "_sm90_T_d128"),
        _ => (*name).to_owned(),
    };
    let typed = |name: String| format!("compactattn_{}", name.replace("_T", &format!("_{dtype}")));
    all.iter().map(full).map(typed).collect()
}

fn desc(settings: Settings, dtype: Dtype, head_dim: usize) -> PlanDesc {
    let shape = fixture::shape(KV_HEADS, GROUP, head_dim, 16, dtype);
    let name = format!("plan-{head_dim}-{dtype:?}-{:?}", std::thread::current().id());
    let gate = (settings.selector == Selector::AttnGate).then(|| gate(&name, &shape, Form::Both, 64));
    PlanDesc { shape, limits: LIMITS, layers: vec![settings], splits: 0, gate }
}

/// Two requests with 600 query tokens.
fn batch(layout: &Layout) -> DeviceBatch {
    let shape = &layout.shape;
    let token = shape.num_kv_heads * shape.head_dim;
    let pool = DevicePool {
        address: SOMEWHERE,
        stride_page: 16 * token,
        stride_token: token,
        stride_head: shape.head_dim,
        scale: 0,
        stride_scale: 0,
    };
    DeviceBatch {
        q: tokens(layout),
        k: pool,
        v: pool,
        cu_seqlens_q: SOMEWHERE,
        seq_lens: SOMEWHERE,
        block_table: SOMEWHERE,
        table_stride: 1024,
        table_width: 1024,
        num_reqs: 2,
        total_q: 600,
        num_pages: 2048,
    }
}

fn output(layout: &Layout) -> DeviceOutput {
    DeviceOutput { out: tokens(layout), lse: SOMEWHERE, lse_stride_head: 600, lse_stride_token: 1 }
}

fn side(layout: &Layout) -> DeviceSide {
    DeviceSide { out: tokens(layout), lse: SOMEWHERE, lse_stride_head: 600 }
}

fn tokens(layout: &Layout) -> DeviceTokens {
    let (heads, dim) = (layout.shape.num_q_heads, layout.shape.head_dim);
    DeviceTokens { address: SOMEWHERE, stride_token: heads * dim, stride_head: dim }
}

fn assert_unsupported(made: Result<World>, named: &[&str]) {
    let error = made.map(|_| "a plan").unwrap_err();
    assert_eq!(error.status(), Status::Unsupported, "{error}");
    let text = error.to_string();
    assert!(named.iter().all(|word| text.contains(word)), "{text}: {named:?}");
}

/// An aligned address that nothing follows.
const SOMEWHERE: u64 = 0x10_0000;
