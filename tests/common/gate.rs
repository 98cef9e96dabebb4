//! Weights of selector `attn_gate` in each published form, steps to try them on, and how far a score may be off.

use std::path::Path;

use compactattn::plan::Layout;
use compactattn::reference::gate::{Gate, Row, Weights};
use compactattn::settings::{DenseRules, Selector};
use compactattn::types::{Dtype, Shape};
use half::bf16;
use safetensors::tensor::{Dtype as FileDtype, TensorView};

use super::case::{Case, Lens, settings};
use super::rng::Rng;

/// Unit roundoff of f32.
const U: f64 = 1.0 / (1 << 24) as f64;

/// The three published forms of the weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Form {
    KeysOnly,
    Both,
    ByGroup,
}

/// One tensor of the file: its part of the key, `[heads, inputs, gate_dim]`, elements that are exact in bf16.
pub(crate) struct Tensor {
    part: &'static str,
    extents: [usize; 3],
    pub(crate) values: Vec<f32>,
}

/// Up to three sparse requests, their pasts on and beside the edges of blocks, the last spans ragged.
pub(crate) fn case(rng: &mut Rng) -> Case {
    let (group, num_kv_heads) = (rng.pick(&[1, 2, 3, 4]), rng.within(1, 2));
    let head_dim = rng.pick(&[64, 64, 96]);
    let dtype = rng.pick(&[Dtype::Bf16, Dtype::F16, Dtype::F32]);
    let shape = Shape {
        num_q_heads: group * num_kv_heads,
        num_kv_heads,
        head_dim,
        page_size: rng.pick(&[16, 32, 64]),
        dtype,
        kv_dtype: if rng.once_in(4) { Dtype::E4m3 } else { dtype },
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

pub(crate) fn tensors(rng: &mut Rng, shape: &Shape, form: Form, gate_dim: usize) -> Vec<Tensor> {
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

/// Writes layer 0's tensors to a safetensors file.
pub(crate) fn write(path: &Path, dtype: FileDtype, tensors: &[Tensor]) {
    let encode = |&x: &f32| match dtype {
        FileDtype::BF16 => bf16::from_f32(x).to_le_bytes().to_vec(),
        _ => x.to_le_bytes().to_vec(),
    };
    let data: Vec<Vec<u8>> = tensors.iter().map(|t| t.values.iter().flat_map(encode).collect()).collect();
    let views = tensors.iter().zip(&data).map(|(tensor, data)| {
        let name = format!("model.layers.0.self_attn.attn_gate.{}.weight", tensor.part);
        (name, TensorView::new(dtype, tensor.extents.to_vec(), data).expect("as long as its extents say"))
    });
    let file = safetensors::serialize(views, None).expect("names differ");
    std::fs::write(path, file).expect("a folder that can be written to");
}

/// The tensor's elements as the oracle takes them.
pub(crate) fn widened(tensor: &Tensor) -> Weights {
    let [_, inputs, gate_dim] = tensor.extents;
    let row = |row: &[f32]| row.iter().map(|&x| f64::from(x)).collect();
    let matrix = |matrix: &[f32]| matrix.chunks_exact(gate_dim).map(row).collect();
    tensor.values.chunks_exact(inputs * gate_dim).map(matrix).collect()
}

/// How far a score may be off, relatively.
///
/// A sum of `n` terms errs by at most `n * U` of the sum of their magnitudes, in any order; what a term went through
/// before counts as further terms. Of a logit: a key and a query are each turned twice (cosine and sine within an ulp,
/// their scale, product, sum: 6 U) and averaged over at most a block (a division more); both are projected; the
/// products are summed and scaled (4 U: product, `log2 e`, root, scale), and the most is taken off (U of two logits).
/// A logit off by `d` moves its weight and their sum by `e^d` each. The rest: exp2 (4e-7, twice), the sum over blocks,
/// the division.
pub(crate) fn margin(layout: &Layout, gate: &Gate, row: &Row) -> f64 {
    let gate_dim = gate.k[0][0].len();
    let inputs = gate.k[0].len() + gate.q.as_ref().map_or(0, |q| q[0].len());
    let terms = 2 * (2 * 6 + layout.settings.block_size + 1) + inputs + gate_dim + 4 + 2;
    let logit = terms as f64 * U * row.magnitude;
    (2.0 * logit).exp_m1() + 2.0 * 4e-7 + (row.blocks + 2) as f64 * U
}
