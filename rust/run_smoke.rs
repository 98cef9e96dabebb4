//! Random small steps through the whole forward pass: nothing panics, answers are finite, and the bits of a request
//! depend on itself alone: not on its neighbours (a NaN among their keys included), threads or pages.

use super::*;
use crate::fixture::{Paged, Rng, Store, over_e4m3, shape};
use crate::select::gate_weights::tests::{Form, gate};
use crate::settings::{DenseRules, FlashPrefill, Keep, KeepAt, Scope};
use crate::types::Dtype;

/// A step, and everything it is run with.
struct Case {
    paged: Paged,
    settings: Settings,
    splits: usize,
    gate: Option<Gate>,
    scores: Vec<f32>,
    masks: Vec<u32>,
}

/// What one forward wrote: `out [total_q, num_q_heads, head_dim]`, `lse [num_q_heads, total_q]`.
struct Written {
    out: Vec<f32>,
    lse: Vec<f32>,
}

#[test]
fn any_small_step_gives_finite_answers_that_depend_on_the_request_alone() {
    for seed in 0..CASES {
        let mut rng = Rng::new(seed);
        let case = Case::random(seed, &mut rng);
        let sick = case.paged.requests.iter().position(|r| !r.k.is_empty()).filter(|_| rng.below(3) == 0);
        let together = case.run(&poisoned(&case.paged, sick, &mut rng), 1 + rng.below(3));
        let what = || format!("seed {seed}: {:?} {:?}", case.paged.shape, case.settings);
        for req in (0..case.paged.requests.len()).filter(|&req| Some(req) != sick) {
            check_rows(&case.paged.batch(), req, &together, &what);
            if case.settings.selector != Selector::External {
                let alone = case.run(&case.paged.only(req, seed + 1), 1);
                check_alone(&case.paged.batch(), req, (&together, &alone), &what);
            }
        }
    }
}

/// Rows that see something are finite; the others are 0 and -inf.
fn check_rows(batch: &Batch, req: usize, written: &Written, what: &dyn Fn() -> String) {
    let (heads, head_dim) = (batch.shape().num_q_heads, batch.shape().head_dim);
    for (token, head) in (0..batch.q_len(req)).flat_map(|t| (0..heads).map(move |h| (t, h))) {
        let at = batch.q_start(req) + token;
        let out = &written.out[(at * heads + head) * head_dim..][..head_dim];
        let lse = written.lse[head * batch.total_q() + at];
        if batch.visible(req, token) == 0 {
            assert!(out.iter().all(|&x| x == 0.0) && lse == f32::NEG_INFINITY, "{}", what());
        } else {
            assert!(out.iter().all(|x| x.is_finite()) && lse.is_finite(), "request {req}: {}", what());
        }
    }
}

/// Bits of request `req` within its batch and by itself.
fn check_alone(
    batch: &Batch,
    req: usize,
    (together, alone): (&Written, &Written),
    what: &dyn Fn() -> String,
) {
    let (heads, head_dim) = (batch.shape().num_q_heads, batch.shape().head_dim);
    let (start, len) = (batch.q_start(req), batch.q_len(req));
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let out = &together.out[start * heads * head_dim..(start + len) * heads * head_dim];
    assert_eq!(bits(out), bits(&alone.out), "request {req}: {}", what());
    for head in 0..heads {
        let lse = &together.lse[head * batch.total_q() + start..][..len];
        assert_eq!(bits(lse), bits(&alone.lse[head * len..][..len]), "request {req}: {}", what());
    }
}

/// The same step with a NaN in one key of request `sick`.
fn poisoned(paged: &Paged, sick: Option<usize>, rng: &mut Rng) -> Paged {
    let mut requests = paged.requests.clone();
    if let Some(sick) = sick {
        let at = rng.below(requests[sick].k.len());
        requests[sick].k[at] = f32::NAN;
    }
    Paged::place(rng.next(), paged.shape, requests)
}

impl Case {
    fn random(seed: u64, rng: &mut Rng) -> Self {
        let dtype = pick(rng, &[Dtype::Bf16, Dtype::F16, Dtype::F32]);
        let (kv_heads, group) = (1 + rng.below(2), pick(rng, &[1, 1, 2, 3, 4, 7, 16]));
        let head_dim = pick(rng, &[64, 64, 64, 96, 128]);
        let shape = shape(kv_heads, group, head_dim, pick(rng, &Shape::PAGE_SIZES), dtype);
        let shape = if rng.below(4) == 0 { over_e4m3(shape) } else { shape };
        let paged = Paged::random(seed, shape, &lens(rng));
        let settings = settings(rng);
        let layout = paged.layout(settings);
        let rows = layout.select_spans(&paged.batch()).len() * shape.num_q_heads;
        let gated = settings.selector == Selector::AttnGate;
        let form = pick(rng, &[Form::KeysOnly, Form::Both, Form::ByGroup]);
        Self {
            splits: pick(rng, &[1, 1, 2, 3, 64]),
            gate: gated.then(|| gate("smoke", &shape, form, head_dim)),
            scores: (0..rows * layout.max_blocks()).map(|_| rng.normal()).collect(),
            masks: (0..rows * layout.mask_words()).map(|_| word(rng) & word(rng)).collect(),
            paged,
            settings,
        }
    }

    fn run(&self, paged: &Paged, threads: usize) -> Written {
        let (shape, batch) = (paged.shape, paged.batch());
        let limits = paged.layout(self.settings).limits;
        let (layers, gate) = (vec![self.settings], self.gate.clone());
        let desc = PlanDesc { shape, limits, layers, splits: self.splits, gate };
        let plan = Plan::new(&desc, Parallel::new(threads)).unwrap();
        let (heads, head_dim) = (shape.num_q_heads, shape.head_dim);
        let mut store = Store::dirty(shape.dtype, batch.total_q() * heads * head_dim);
        let mut lse = vec![f32::NAN; heads * batch.total_q()];
        let mut memory = vec![0xFF_u8; plan.workspace_bytes().unwrap() + Sizes::ALIGNMENT];
        let start = memory.as_ptr().align_offset(Sizes::ALIGNMENT);
        let elements = store.view_mut();
        let out = TokensMut { elements, stride_token: heads * head_dim, stride_head: head_dim };
        let mut output =
            Output { out, lse: Some(LseMut { elements: &mut lse, stride_head: batch.total_q() }) };
        let by_mask = self.splits == 2;
        let external = if by_mask { External::Masks(&self.masks) } else { External::Scores(&self.scores) };
        let external = Some(external).filter(|_| self.settings.selector == Selector::External);
        let step = Step { external, ..Step::default() };
        plan.forward(&batch, &step, &mut output, &mut memory[start..]).unwrap();
        Written { out: store.to_f32(), lse }
    }
}

/// Requests that ask nothing, decode, have more queries than KV, start, or go on; now and then a long one.
fn lens(rng: &mut Rng) -> Vec<(usize, usize)> {
    let one = |rng: &mut Rng| match rng.below(7) {
        0 => (0, rng.below(100)),
        1 => (1, 1 + rng.below(150)),
        2 => (1 + rng.below(20), rng.below(20)),
        3 => {
            let n = 1 + rng.below(40);
            (n, n)
        }
        _ => {
            let q_len = 1 + rng.below(30);
            (q_len, q_len + rng.below(150))
        }
    };
    let mut lens: Vec<_> = (0..rng.below(4)).map(|_| one(rng)).collect();
    if rng.below(30) == 0 {
        lens.push((130 + rng.below(200), 400 + rng.below(200)));
    }
    lens
}

/// Valid settings of any selector, odd ones among them.
fn settings(rng: &mut Rng) -> Settings {
    let (selector, _) = pick(rng, &Selector::ALL);
    let by_token = matches!(selector, Selector::Quoka | Selector::Dense | Selector::External);
    let sizes: &[usize] = if by_token { &[1, 16, 32] } else { &[16, 16, 32, 64, 128, 256] };
    let block_size = pick(rng, sizes);
    let share = |rng: &mut Rng| pick(rng, &[1e-6, 0.1, 0.35, 0.9, 1.0]);
    let keep = match rng.below(3) {
        0 => Keep::Threshold(share(rng)),
        1 => Keep::Mass(share(rng)),
        _ => Keep::Density(share(rng)),
    };
    let count = |rng: &mut Rng| pick(rng, &[0, 0, 1, 2, 5, usize::MAX]);
    let max_density = share(rng);
    Settings {
        block_size,
        scope: Scope { query_span: pick(rng, &[0, 0, 128, 256, 512, 1024]), heads_per_list: rng.below(6) },
        keep,
        keep_at: pick(rng, &[KeepAt::Row, KeepAt::List]),
        min_density: pick(rng, &[0.0, max_density / 2.0, max_density]),
        max_density,
        sink_blocks: count(rng),
        local_blocks: count(rng),
        density_guard: share(rng),
        mean_correction: block_size > 1 && rng.below(3) == 0,
        dense: DenseRules {
            below_kv_len: rng.below(50),
            max_q_len: rng.below(3),
            prefix_tokens: rng.below(50),
        },
        sample_rows: count(rng),
        flashprefill: FlashPrefill {
            non_voting_spans: count(rng),
            min_budget: count(rng),
            relative_to_past: rng.below(2) == 0,
        },
        quoka_query_ratio: share(rng),
        xattention_stride: block_size.min(pick(rng, &[1, 4, 16, 256])),
        two_level_factor: pick(rng, &[1.0, 2.5, f32::MAX]),
        ..Settings::of(selector)
    }
}

fn word(rng: &mut Rng) -> u32 {
    u32::try_from(rng.next() >> 32).unwrap()
}

fn pick<T: Copy>(rng: &mut Rng, from: &[T]) -> T {
    from[rng.below(from.len())]
}

/// Steps tried.
const CASES: u64 = 2000;
