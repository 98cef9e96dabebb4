//! Small made-up traces: the self-test's input, and the unit tests'.

use std::collections::HashMap;

use compactattn::types::Dtype;
use half::bf16;

use crate::trace::{Data, Layer, Tensor, Trace};

/// `layers` layers of 4 query heads, 2 KV heads and 64 elements a head, bf16: waves of many lengths, so that every
/// block of keys differs and no score is extreme.
pub(crate) fn trace(layers: usize, kv_len: usize, q_len: usize) -> Trace {
    let layer = |number| Layer {
        number: Some(number),
        q: tensor([q_len, 4, 64], 0.37 + number as f32),
        k: tensor([kv_len, 2, 64], 0.61 + number as f32),
        v: tensor([kv_len, 2, 64], 0.83 + number as f32),
    };
    Trace { layers: (0..layers).map(layer).collect(), metadata: HashMap::new() }
}

fn tensor(dims: [usize; 3], phase: f32) -> Tensor {
    let [tokens, heads, head_dim] = dims;
    let mut data = Data::filled(Dtype::Bf16, tokens * heads * head_dim, 0.0);
    let Data::Bf16(values) = &mut data else { return Tensor { dims, data } };
    for (i, x) in values.iter_mut().enumerate() {
        let (row, element) = (i / head_dim, i % head_dim);
        let wave = (row as f32 * (0.05 + 0.013 * element as f32) + phase * (1.0 + element as f32)).sin();
        *x = bf16::from_f32(1.5 * wave);
    }
    Tensor { dims, data }
}
