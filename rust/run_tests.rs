//! Laws of the forward pass.

use super::*;
use crate::fixture::{Paged, Store, shape};
use crate::settings::Keep;
use crate::types::Dtype;

/// What one forward wrote.
#[derive(Debug, PartialEq)]
struct Written {
    out: Vec<u32>,
    lse: Vec<u32>,
}

fn paged() -> Paged {
    Paged::random(11, shape(2, 3, 64, 16, Dtype::Bf16), &[(100, 777), (1, 90), (0, 5), (40, 600)])
}

fn settings(selector: Selector) -> Settings {
    let mut settings = Settings { block_size: 16, keep: Keep::Density(0.2), ..Settings::of(selector) };
    settings.dense.below_kv_len = 0;
    settings
}

fn plan(paged: &Paged, settings: Settings) -> Plan {
    let limits = paged.layout(settings).limits;
    let desc = PlanDesc { shape: paged.shape, limits, layers: vec![settings; 2], splits: 2, gate: None };
    Plan::new(&desc, Parallel::new(2)).unwrap()
}

fn run(plan: &Plan, paged: &Paged, step: &Step) -> Result<Written> {
    let batch = paged.batch();
    let (heads, head_dim) = (paged.shape.num_q_heads, paged.shape.head_dim);
    let mut store = Store::dirty(paged.shape.dtype, batch.total_q() * heads * head_dim);
    let mut lse = vec![f32::NAN; heads * batch.total_q()];
    let mut memory = vec![0xAB_u8; plan.workspace_bytes()? + Sizes::ALIGNMENT];
    let start = memory.as_ptr().align_offset(Sizes::ALIGNMENT);
    let out = TokensMut { elements: store.view_mut(), stride_token: heads * head_dim, stride_head: head_dim };
    let lse_mut = LseMut { elements: &mut lse, stride_head: batch.total_q() };
    plan.forward(&batch, step, &mut Output { out, lse: Some(lse_mut) }, &mut memory[start..])?;
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect();
    Ok(Written { out: bits(store.to_f32()), lse: bits(lse) })
}

#[test]
fn summaries_kept_by_the_caller_give_the_bits_of_recomputed_ones() {
    let paged = paged();
    let batch = paged.batch();
    for selector in [Selector::FlashPrefill, Selector::PooledMass, Selector::TwoLevel] {
        let plan = plan(&paged, Settings { mean_correction: true, ..settings(selector) });
        let len = summaries::len(plan.layout(0).unwrap(), batch.k().num_pages);
        // Slots that no block owns stay NaN: reading one would show.
        let (mut k_mean, mut v_mean) = (vec![f32::NAN; len], vec![f32::NAN; len]);
        let mut kept = SummariesMut { k_mean: &mut k_mean, v_mean: Some(&mut v_mean), seals: None };
        plan.update_summaries(1, &batch, Which::All, &mut kept).unwrap();
        let summaries = Some(Summaries { k_mean: &k_mean, v_mean: Some(&v_mean) });
        let given = run(&plan, &paged, &Step { layer: 1, summaries, ..Step::default() });
        assert!(given == run(&plan, &paged, &Step { layer: 1, ..Step::default() }), "{}", selector.name());
    }
}

#[test]
fn statistics_count_each_layers_own_calls() {
    let paged = paged();
    let plan = plan(&paged, settings(Selector::SampledExact));
    for _ in 0..3 {
        run(&plan, &paged, &Step { layer: 1, ..Step::default() }).unwrap();
    }
    let stats = plan.stats(1).unwrap();
    assert_eq!((plan.stats(0).unwrap().calls, stats.calls), (0, 3));
    // Two sparse requests of 42 and 35 past blocks, one list a query head; 20 % each, rounded up.
    assert_eq!(stats.counts.candidates, 3 * 6 * (42 + 35));
    assert_eq!(stats.counts.selected, 3 * 6 * (9 + 7));
    assert_eq!((stats.counts.lists, stats.counts.dense), (3 * 18, 3 * 6));
    assert!((stats.density().unwrap() - 16.0 / 77.0).abs() < 1e-12);
}

#[test]
fn keep_all_is_dense_to_the_bit_whatever_the_selector() {
    let paged = paged();
    let dense = run(&plan(&paged, settings(Selector::Dense)), &paged, &Step::default()).unwrap();
    for selector in [Selector::SampledExact, Selector::FlashPrefill, Selector::XAttention, Selector::Oracle] {
        let all = Settings { keep: Keep::Density(1.0), max_density: 1.0, ..settings(selector) };
        assert_eq!(run(&plan(&paged, all), &paged, &Step::default()).unwrap(), dense, "{}", selector.name());
    }
}

#[test]
fn a_call_may_bring_its_own_settings() {
    let paged = paged();
    let sparse = plan(&paged, settings(Selector::SampledExact));
    let own = Some(settings(Selector::Dense));
    let dense = run(&plan(&paged, settings(Selector::Dense)), &paged, &Step::default());
    assert!(run(&sparse, &paged, &Step { settings: own, ..Step::default() }) == dense);
    assert!(run(&sparse, &paged, &Step::default()) != dense);
}

#[test]
fn what_a_selector_lacks_is_refused_by_name() {
    let paged = paged();
    let external = plan(&paged, settings(Selector::External));
    let scores = [0.5; 3];
    for (step, status, name) in [
        (Step::default(), Status::Null, "external"),
        (
            Step { external: Some(External::Scores(&scores)), ..Step::default() },
            Status::Shape,
            "external.scores",
        ),
        (Step { layer: 2, ..Step::default() }, Status::Value, "layer"),
        (
            Step { summaries: Some(Summaries { k_mean: &scores, v_mean: None }), ..Step::default() },
            Status::Null,
            "external",
        ),
    ] {
        let error = run(&external, &paged, &step).unwrap_err();
        assert!(error.status() == status && error.to_string().contains(name), "{error}");
    }
    let gated = PlanDesc {
        shape: paged.shape,
        limits: paged.layout(settings(Selector::Dense)).limits,
        layers: vec![Settings::of(Selector::AttnGate)],
        splits: 1,
        gate: None,
    };
    assert_eq!(Plan::new(&gated, Parallel::new(1)).unwrap_err().status(), Status::Null);
}

#[test]
fn a_pool_with_more_boxes_than_a_table_entry_can_name_is_refused() {
    let paged = paged();
    let plan = plan(&paged, settings(Selector::Dense));
    let shape = Shape { page_size: 256, ..paged.shape };
    let admitted = |num_pages: usize, block_size: usize| {
        // Pages that all lie in one place: a pool of any size in little memory.
        let mut parts = paged.parts();
        for pool in [&mut parts.k, &mut parts.v] {
            (pool.num_pages, pool.stride_page, pool.stride_token) = (num_pages, 0, 0);
        }
        let batch = Batch::new(shape, parts).unwrap();
        let settings = Settings { block_size, ..settings(Selector::Dense) };
        let limits = plan.layout(0).unwrap().limits;
        let desc = PlanDesc { shape, limits, layers: vec![settings], splits: 1, gate: None };
        Plan::new(&desc, Parallel::new(1)).unwrap().admit(0, &batch).map(drop)
    };
    // Boxes 0..2^31: 2^27 pages of 16, 2^23 of 256.
    assert_eq!(admitted(1 << 27, 16), Ok(()));
    assert_eq!(admitted(1 << 31, 256), Ok(()));
    for (num_pages, block_size) in [((1 << 27) + 1, 16), ((1 << 23) + 1, 1), (usize::MAX, 256)] {
        let error = admitted(num_pages, block_size).unwrap_err();
        assert_eq!(error.status(), Status::Overflow);
        assert!(error.to_string().contains("num_pages"), "{error}");
    }
}

#[test]
fn an_output_whose_elements_overlap_is_refused() {
    let paged = paged();
    let batch = paged.batch();
    let plan = plan(&paged, settings(Selector::Dense));
    let mut memory = vec![0_u8; plan.workspace_bytes().unwrap() + Sizes::ALIGNMENT];
    let start = memory.as_ptr().align_offset(Sizes::ALIGNMENT);
    let mut forward = |stride_token: usize, stride_head: usize| {
        let mut store = Store::dirty(Dtype::Bf16, 200_000);
        let out = TokensMut { elements: store.view_mut(), stride_token, stride_head };
        plan.forward(&batch, &Step::default(), &mut Output { out, lse: None }, &mut memory[start..])
    };
    // 141 tokens of 6 heads of 64: token by token, head by head, and with gaps.
    for (stride_token, stride_head) in [(6 * 64, 64), (64, 141 * 64), (6 * 70, 70), (70, 141 * 70)] {
        assert_eq!(forward(stride_token, stride_head), Ok(()));
    }
    for (stride_token, stride_head) in
        [(0, 64), (6 * 64, 0), (6 * 64 - 1, 64), (64, 141 * 64 - 1), (63, 9024)]
    {
        let error = forward(stride_token, stride_head).unwrap_err();
        assert_eq!(error.status(), Status::Stride, "{error}");
    }
}

#[test]
fn summaries_of_another_block_size_are_refused() {
    let paged = paged();
    let plan = plan(&paged, settings(Selector::PooledMass));
    let len = summaries::len(plan.layout(0).unwrap(), paged.num_pages);
    let k_mean = vec![0.0; len];
    let summaries = Some(Summaries { k_mean: &k_mean, v_mean: None });
    // On pages of 16 both block sizes have one slot a page: the length does not tell them apart.
    let own = |selector| Some(Settings { block_size: 32, ..settings(selector) });
    let step = Step { summaries, settings: own(Selector::PooledMass), ..Step::default() };
    let error = run(&plan, &paged, &step).unwrap_err();
    assert!(error.status() == Status::Value && error.to_string().contains("block_size"), "{error}");
    assert!(run(&plan, &paged, &Step { summaries: None, ..step }).is_ok());
    assert!(run(&plan, &paged, &Step { settings: own(Selector::Oracle), ..step }).is_ok());
}

/// A pool whose tokens are all one lies in little memory; summaries of it do not.
#[test]
fn own_summaries_beyond_all_memory_are_refused_and_nothing_is_written() {
    let mut paged = Paged::random(12, shape(64, 1, 256, 16, Dtype::Bf16), &[(3, 40)]);
    // Slots of 64 heads of 256, four bytes each: all that 47 bits of address reach.
    paged.num_pages = 1 << 31;
    let mut parts = paged.parts();
    for pool in [&mut parts.k, &mut parts.v] {
        (pool.elements, pool.stride_page, pool.stride_token) = (paged.q.view(), 0, 0);
    }
    let batch = Batch::new(paged.shape, parts).unwrap();
    let limits = Limits { max_num_reqs: 1, max_total_q: 3, max_kv_len: 40 };
    for (selector, mean_correction, status) in [
        (Selector::PooledMass, false, Status::OutOfMemory),
        (Selector::SampledExact, true, Status::OutOfMemory),
        (Selector::SampledExact, false, Status::Ok),
    ] {
        let settings = Settings { mean_correction, ..settings(selector) };
        let desc = PlanDesc { shape: paged.shape, limits, layers: vec![settings], splits: 1, gate: None };
        let plan = Plan::new(&desc, Parallel::new(1)).unwrap();
        let mut store = Store::dirty(Dtype::Bf16, 3 * 64 * 256);
        let out = TokensMut { elements: store.view_mut(), stride_token: 64 * 256, stride_head: 256 };
        let mut memory = plan.workspace().unwrap();
        let said = plan.forward(&batch, &Step::default(), &mut Output { out, lse: None }, memory.bytes_mut());
        assert_eq!(said.err().map_or(Status::Ok, |error| error.status()), status, "{selector:?}");
        let refused = status != Status::Ok;
        assert_eq!(store.to_f32().iter().all(|x| x.is_nan()), refused, "{selector:?}");
        assert_eq!(plan.stats(0).unwrap().calls == 0, refused, "{selector:?}");
    }
}
