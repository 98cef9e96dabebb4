//! Selector `attn_gate`: weights in every published form, from a file, judged by their own oracle.

use std::ffi::CString;

use compactattn::plan::Layout;
use compactattn::reference::gate as oracle;
use compactattn::reference::{Request, chunks, select_step};
use compactattn::select::{Pairing, Rope};
use compactattn::types::{Dtype, Shape};
use safetensors::tensor::Dtype as FileDtype;

use super::abi::Refusal;
use super::check::Worker;
use super::device::Device;
use super::memory::Packing;
use super::step::{Done, Given};
use crate::common::gate::{Form, case, margin, tensors, widened, write};
use crate::common::judge;
use crate::common::pipeline::Selected;
use crate::common::rng::Rng;

/// A file of weights, which goes with this; what a plan needs to read it, and the oracle of what it holds.
pub(crate) struct GateFile {
    pub(crate) path: CString,
    /// `[head_dim / 2]`.
    pub(crate) inv_freq: Vec<f32>,
    pub(crate) interleaved: bool,
    oracle: oracle::Gate,
}

/// Steps of every form and pairing; whether all were right.
pub(crate) fn run(device: &Device, count: usize, packing: Packing) -> bool {
    let mut worker = Worker::new(device, packing);
    let mut right = true;
    for i in 0..count {
        match judged(&mut worker, i) {
            Ok(()) => {}
            Err(Refusal::Unsupported(why)) => {
                println!("  not offered here: {why}");
                return true;
            }
            Err(Refusal::Fault(why)) => {
                println!("  case {i}: {why}");
                right = false;
            }
        }
    }
    right
}

fn judged(worker: &mut Worker, i: usize) -> Result<(), Refusal> {
    let mut rng = Rng::new(i as u64);
    // GPU contexts take 16-bit types only, this selector of the cache too.
    let case = loop {
        let case = case(&mut rng);
        if ![case.shape.dtype, case.shape.kv_dtype].iter().any(|x| [Dtype::F32, Dtype::E4m3].contains(x)) {
            break case;
        }
    };
    let file = GateFile::write(&mut rng, i, &case.shape).map_err(Refusal::Fault)?;
    worker.judged(&case, &Given::Gate(Box::new(file))).map(|_| ())
}

impl GateFile {
    fn write(rng: &mut Rng, i: usize, shape: &Shape) -> Result<Self, String> {
        let form = [Form::KeysOnly, Form::Both, Form::ByGroup][i % 3];
        let interleaved = i / 3 % 2 == 1;
        let tensors = tensors(rng, shape, form, shape.head_dim);
        let name = format!("compactattn-gpu-gate-{}-{i}", std::process::id());
        let path = std::env::temp_dir().join(name);
        write(&path, [FileDtype::BF16, FileDtype::F32][i % 2], &tensors);
        let dim = shape.head_dim;
        let inv_freq: Vec<f32> = (0..dim / 2).map(|i| 1e4_f32.powf(-2.0 * i as f32 / dim as f32)).collect();
        let pairing = if interleaved { Pairing::Interleaved } else { Pairing::HalfSplit };
        let rope = Rope { inv_freq: inv_freq.clone(), gate_inv_freq: None, pairing, scale: 1.0 };
        let mut weights = tensors.iter().map(widened);
        let k = weights.next().ok_or("no key weights")?;
        let oracle = oracle::Gate { k, q: weights.next(), rope };
        let path = CString::new(path.to_string_lossy().as_bytes()).map_err(|e| e.to_string())?;
        Ok(Self { path, inv_freq, interleaved, oracle })
    }

    /// Scores within error, and the union that follows from them.
    pub(crate) fn judge(&self, layout: &Layout, requests: &[Request], got: &Selected) -> Done {
        let mut rows = got.scores.chunks(layout.max_blocks());
        for chunk in chunks(layout, requests, select_step(layout)) {
            let rows: Vec<&[f32]> = rows.by_ref().take(layout.shape.num_q_heads).collect();
            for (head, found) in rows.iter().enumerate().filter(|_| !chunk.dense) {
                let row = oracle::scores(&self.oracle, layout, &requests[chunk.req], &chunk, head);
                let error = 2.0 * margin(layout, &self.oracle, &row);
                row_agrees(&row.scores, found, error)
                    .map_err(|e| format!("score of {chunk:?}, head {head}, {e}"))?;
            }
        }
        judge::union_of(layout, requests, &got.scores, (&got.lists, got.counts.selected))
    }
}

/// Twice the error of one rounding a step: a GPU's sines are off by two ulps, and its weights are rescaled.
fn row_agrees(want: &[f64], found: &[f32], error: f64) -> Done {
    for (block, (&want, &found)) in want.iter().zip(found).enumerate() {
        let off = (f64::from(found) - want).abs();
        // 2^x is flushed to 0 below 2^-126.
        let within = off <= error * want + f64::from(f32::MIN_POSITIVE);
        if !within {
            return Err(format!("block {block}: {found}, not {want} (+-{error:.1e} of it)"));
        }
    }
    Ok(())
}

impl Drop for GateFile {
    fn drop(&mut self) {
        // A file left behind in a temporary folder does no harm.
        let _ = std::fs::remove_file(self.path.to_string_lossy().as_ref());
    }
}
