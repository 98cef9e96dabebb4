//! Contents for which attention is exact, so that outputs are compared bit by bit.
//!
//! Keys and queries are one-hot and large: a key in a query's direction has so much more weight than any other that the
//! others' weights are 0 in f32, and all that share the largest logit have the weight 1. A row is then the plain mean of
//! their values, small powers of two of which three in four are 0: the sum is exact in every type, in any order.

use compactattn::reference::{Request, attend};
use compactattn::settings::Settings;
use compactattn::types::Dtype;
use half::{bf16, f16};

use super::abi::Refusal;
use super::cases;
use super::check::{Ran, Worker, given};
use super::device::Device;
use super::rounds::Rounds;
use super::step::Done;
use crate::common::case::Case;
use crate::common::judge;
use crate::common::rng::Rng;
use crate::common::tenants;

/// Of a key's element, and of a query's. With scales of 1/32 (half of that of head_dim 256) to 1/8, logits are 0 or at
/// least 128, and `exp(-128)` is below the least f32.
const LARGE: f32 = 64.0;

pub(crate) fn run(device: &Device, rounds: &Rounds) -> bool {
    rounds.run(device, |worker, rng, _| one(worker, rng))
}

fn one(worker: &mut Worker, rng: &mut Rng) -> Result<(), Refusal> {
    let mut case = cases::several(rng);
    // A mean that stands for a block is rounded, and so is what it weighs.
    case.settings = Settings { mean_correction: false, ..case.settings };
    // One scale would do as well, but only a power of two keeps the arithmetic exact.
    for scales in &mut case.pools.scales {
        scales.iter_mut().for_each(|scale| *scale = 1.0);
    }
    fill(&mut case, rng);
    let given = given(&case, rng);
    let ran = worker.run(&case, &given)?;
    same_bits(&case, &ran).map_err(|why| Refusal::Fault(format!("{}: {why}", cases::describe(&case))))
}

fn fill(case: &mut Case, rng: &mut Rng) {
    let (shape, directions) = (case.shape, rng.pick(&[1, 2, 3, 5, 16]));
    let axis = |rng: &mut Rng, size: f32| {
        let mut x = vec![0.0; shape.head_dim];
        x[rng.below(directions) * (shape.head_dim / 16)] = size;
        x
    };
    let owned = tenants::owned_pages(case);
    for page in (0..case.pools.num_pages).filter(|&page| owned[page] > 0) {
        for (row, head) in (0..shape.page_size).flat_map(|row| (0..shape.num_kv_heads).map(move |h| (row, h)))
        {
            let value = sparse(rng, shape.head_dim);
            let key = axis(rng, LARGE);
            case.pools.write(false, (page, row), head, &key);
            case.pools.write(true, (page, row), head, &value);
        }
    }
    for (token, head) in (0..case.batch().total_q()).flat_map(|t| (0..shape.num_q_heads).map(move |h| (t, h)))
    {
        let query = axis(rng, LARGE);
        case.q.write(token, head, &query);
    }
}

/// Small powers of two and their negatives, three in four of them 0.
fn sparse(rng: &mut Rng, len: usize) -> Vec<f32> {
    const STEPS: [f32; 8] = [0.5, 1.0, 2.0, 1.0, -0.5, -1.0, -2.0, -1.0];
    let (mut x, mut bits) = (vec![0.0; len], 0);
    for (i, x) in x.iter_mut().enumerate() {
        bits = if i % 12 == 0 { rng.next() } else { bits >> 5 };
        if bits & 3 == 0 {
            *x = STEPS[(bits >> 2) as usize % 8];
        }
    }
    x
}

fn same_bits(case: &Case, ran: &Ran) -> Done {
    let layout = case.layout();
    let requests = Request::gather_all(&case.batch());
    let bits = judge::list_bits(&layout, &requests, &ran.selected.lists);
    for (head, rows) in attend::attend(&layout, &requests, &bits).iter().enumerate() {
        for (token, row) in rows.iter().enumerate() {
            let got = ran.attended.out.read(token, head, case.shape.head_dim);
            let agrees = |x: &usize| is_rounded(case.shape.dtype, row.out[*x], got[*x]);
            if let Some(x) = (0..got.len()).find(|x| !agrees(x)) {
                return Err(format!("token {token}, head {head}: out[{x}] {}, not {}", got[x], row.out[x]));
            }
        }
    }
    Ok(())
}

/// Whether `got` has the bits of `want` in that type.
fn is_rounded(dtype: Dtype, want: f64, got: f32) -> bool {
    // What the reference, whose weights are shares of 1, leaves of a sum that is 0.
    let want = if want.abs() < 1e-9 { 0.0 } else { want };
    [-1.0, 1.0].map(|sign| rounded(dtype, want * (1.0 + sign * COUNT))).contains(&got)
}

/// Relative error of the sum of weights that a mean is divided by: a largest logit of 512, in units of ln 2, is rounded
/// once before it is subtracted from itself, so that a weight is not quite 1; quotient and product round once each. It
/// shows only beside a tie between two results.
const COUNT: f64 = (512.0 * std::f64::consts::LOG2_E + 4.0) / (1 << 24) as f64;

fn rounded(dtype: Dtype, x: f64) -> f32 {
    match dtype {
        Dtype::Bf16 => bf16::from_f64(x).to_f32(),
        Dtype::F16 => f16::from_f64(x).to_f32(),
        _ => x as f32,
    }
}
