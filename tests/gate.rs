//! Selector `attn_gate` against its f64 oracle: every published form of the weights, read from a file, on random steps.

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::unwrap_used,
    reason = "test sizes are small and not negative; a test stops at the first surprise"
)]

mod common;

use std::path::PathBuf;

use common::case::{Case, Lens, settings};
use common::rng::Rng;
use compactattn::Parallel;
use compactattn::plan::Layout;
use compactattn::reference::gate::{self as oracle, Row, Weights};
use compactattn::reference::{Request, chunks, select_step};
use compactattn::select::{self, Gate, Input, Pairing, Rope};
use compactattn::settings::{DenseRules, Selector};
use compactattn::types::{Dtype, Shape};
use half::bf16;
use safetensors::tensor::{Dtype as FileDtype, TensorView};

/// Unit roundoff of f32.
const U: f64 = 1.0 / (1 << 24) as f64;

/// The three published forms of the weights.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    KeysOnly,
    Both,
    ByGroup,
}

/// One tensor of the file: its part of the key, `[heads, inputs, gate_dim]`, elements that are exact in bf16.
struct Tensor {
    part: &'static str,
    extents: [usize; 3],
    values: Vec<f32>,
}

#[test]
fn every_score_is_the_oracles_in_every_form_and_pairing() {
    let mut unaligned = 0;
    for seed in 0..60 {
        let form = [Form::KeysOnly, Form::Both, Form::ByGroup][seed % 3];
        let pairing = [Pairing::HalfSplit, Pairing::Interleaved][seed / 3 % 2];
        let mut rng = Rng::new(seed as u64);
        let case = case(&mut rng);
        let gate_dim = if form == Form::KeysOnly { case.shape.head_dim } else { rng.pick(&[32, 64]) };
        let tensors = tensors(&mut rng, &case.shape, form, gate_dim);
        let rope = rope(&mut rng, case.shape.head_dim, gate_dim, pairing);
        let loaded = load(seed, &tensors, &case.shape, &rope);
        let mut weights = tensors.iter().map(widened);
        let k = weights.next().unwrap();
        let oracle = oracle::Gate { k, q: weights.next(), rope };
        unaligned += judge(seed, &case, &loaded, &oracle);
    }
    // About half of the requests of 60 cases start beside a block's edge, each with a row for every head.
    assert!(unaligned > 200, "only {unaligned} rows of unaligned chunks");
}

/// Compares every score of a case; how many rows were of chunks that start beside a block's edge.
fn judge(seed: usize, case: &Case, gate: &Gate, oracle: &oracle::Gate) -> usize {
    let (layout, batch) = (case.layout(), case.batch());
    layout.admit(&batch).unwrap();
    let mut scores = vec![f32::NAN; layout.score_len().unwrap()];
    let input = Input { layout: &layout, batch: &batch, summaries: None, gate: gate.layer(0) };
    select::score(&input, &mut scores, Parallel::new(1 + seed % 2));
    let requests = Request::gather_all(&batch);
    let mut unaligned = 0;
    let mut rows = scores.chunks(layout.max_blocks());
    for chunk in chunks(&layout, &requests, select_step(&layout)) {
        let rows = rows.by_ref().take(layout.shape.num_q_heads);
        for (head, found) in rows.enumerate().collect::<Vec<_>>() {
            if chunk.dense {
                continue;
            }
            let request = &requests[chunk.req];
            let row = oracle::scores(oracle, &layout, request, &chunk, head);
            let margin = margin(&layout, oracle, &row);
            for (block, (&found, want)) in found.iter().zip(&row.scores).enumerate() {
                let error = (f64::from(found) - want).abs();
                let at = format!("seed {seed} {chunk:?} head {head} block {block}");
                // 2^x is flushed to 0 below 2^-126.
                let allowed = margin * want + f64::from(f32::MIN_POSITIVE);
                assert!(error <= allowed, "{at}: {found}, not {want} +- {allowed}");
            }
            unaligned += usize::from(!request.past().is_multiple_of(layout.settings.block_size));
        }
    }
    unaligned
}

/// How far a score may be off, relatively.
///
/// A sum of `n` terms errs by at most `n * U` of the sum of their magnitudes, in any order; what a term went through
/// before counts as further terms. Of a logit: a key and a query are each turned twice (cosine and sine within an ulp,
/// their scale, product, sum: 6 U) and averaged over at most a block (a division more); both are projected; the
/// products are summed and scaled (4 U: product, `log2 e`, root, scale), and the most is taken off (U of two logits).
/// A logit off by `d` moves its weight and their sum by `e^d` each. The rest: exp2 (4e-7, twice), the sum over blocks,
/// the division.
fn margin(layout: &Layout, gate: &oracle::Gate, row: &Row) -> f64 {
    let gate_dim = gate.k[0][0].len();
    let inputs = gate.k[0].len() + gate.q.as_ref().map_or(0, |q| q[0].len());
    let terms = 2 * (2 * 6 + layout.settings.block_size + 1) + inputs + gate_dim + 4 + 2;
    let logit = terms as f64 * U * row.magnitude;
    (2.0 * logit).exp_m1() + 2.0 * 4e-7 + (row.blocks + 2) as f64 * U
}

/// Up to three sparse requests, their pasts on and beside the edges of blocks, the last spans ragged.
fn case(rng: &mut Rng) -> Case {
    let (group, num_kv_heads) = (rng.pick(&[1, 2, 3, 4]), rng.within(1, 2));
    let head_dim = rng.pick(&[64, 64, 96]);
    let shape = Shape {
        num_q_heads: group * num_kv_heads,
        num_kv_heads,
        head_dim,
        page_size: rng.pick(&[16, 32, 64]),
        dtype: rng.pick(&[Dtype::Bf16, Dtype::F16, Dtype::F32]),
        sm_scale: 1.0 / (head_dim as f32).sqrt(),
    };
    let mut settings = settings(rng);
    settings.selector = Selector::AttnGate;
    settings.block_size = rng.pick(&[16, 32, 64]);
    settings.dense = DenseRules { below_kv_len: 0, max_q_len: 0, prefix_tokens: 0 };
    let size = settings.block_size;
    let lens: Vec<Lens> = (0..rng.within(1, 3))
        .map(|_| {
            let past = size * rng.within(1, 300 / size) + rng.pick(&[0, 0, 1, size / 2 + 1, size - 1]);
            let q = rng.pick(&[1, 5, size, size + 1, 2 * size - 1]);
            Lens { q, kv: past + q }
        })
        .collect();
    Case::with(rng, shape, settings, &lens)
}

fn tensors(rng: &mut Rng, shape: &Shape, form: Form, gate_dim: usize) -> Vec<Tensor> {
    let Shape { num_q_heads, num_kv_heads, head_dim, .. } = *shape;
    let k_heads = if form == Form::KeysOnly { num_q_heads } else { num_kv_heads };
    let mut parts = vec![("mask_linear_k", [k_heads, 3 * head_dim, gate_dim])];
    match form {
        Form::KeysOnly => {}
        Form::Both => parts.push(("mask_linear_q", [num_q_heads, head_dim, gate_dim])),
        Form::ByGroup => {
            parts.push(("mask_linear_q", [num_kv_heads, shape.group_size() * head_dim, gate_dim]));
        }
    }
    let random = |(part, extents): (&'static str, [usize; 3])| {
        let scale = 1.0 / (extents[1] as f32).sqrt();
        let count = extents.iter().product();
        let values = (0..count).map(|_| bf16::from_f32(scale * rng.normal()).to_f32()).collect();
        Tensor { part, extents, values }
    };
    parts.into_iter().map(random).collect()
}

fn rope(rng: &mut Rng, head_dim: usize, gate_dim: usize, pairing: Pairing) -> Rope {
    let freq = |dim: usize| (0..dim / 2).map(|i| 1e4_f32.powf(-2.0 * i as f32 / dim as f32)).collect();
    let gate_inv_freq = (gate_dim != head_dim).then(|| freq(gate_dim));
    Rope { inv_freq: freq(head_dim), gate_inv_freq, pairing, scale: rng.pick(&[1.0, 1.25]) }
}

/// Writes the tensors to a file of this process, bf16 or f32 by turns, loads it, removes it.
fn load(seed: usize, tensors: &[Tensor], shape: &Shape, rope: &Rope) -> Gate {
    let dtype = [FileDtype::BF16, FileDtype::F32][seed % 2];
    let encode = |&x: &f32| match dtype {
        FileDtype::BF16 => bf16::from_f32(x).to_le_bytes().to_vec(),
        _ => x.to_le_bytes().to_vec(),
    };
    let data: Vec<Vec<u8>> = tensors.iter().map(|t| t.values.iter().flat_map(encode).collect()).collect();
    let views = tensors.iter().zip(&data).map(|(tensor, data)| {
        let name = format!("model.layers.0.self_attn.attn_gate.{}.weight", tensor.part);
        (name, TensorView::new(dtype, tensor.extents.to_vec(), data).unwrap())
    });
    let path: PathBuf = std::env::temp_dir().join(format!("compactattn-gate-{}-{seed}", std::process::id()));
    std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    let gate = Gate::load(&path, shape, 1, rope.clone());
    std::fs::remove_file(&path).unwrap();
    gate.unwrap()
}

/// The tensor's elements as the oracle takes them.
fn widened(tensor: &Tensor) -> Weights {
    let [_, inputs, gate_dim] = tensor.extents;
    let row = |row: &[f32]| row.iter().map(|&x| f64::from(x)).collect();
    let matrix = |matrix: &[f32]| matrix.chunks_exact(gate_dim).map(row).collect();
    tensor.values.chunks_exact(inputs * gate_dim).map(matrix).collect()
}
