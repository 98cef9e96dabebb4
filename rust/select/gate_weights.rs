//! Weights of the `attn_gate` selector, as SeerAttention publishes them.
//!
//! The released `attn_gate_weights.pth` is a pickled state dict; saved as safetensors under the same keys it loads
//! here. Keys end in `layers.{i}.self_attn.attn_gate.mask_linear_{k,q}.weight`. Every tensor holds all heads of the
//! model: `[heads, inputs, gate_dim]`, applied as `x [inputs] . W[head]`. Three published forms are told apart by
//! their shapes:
//!
//! | form | `mask_linear_k` | `mask_linear_q` | scores |
//! |---|---|---|---|
//! | key projection only | `[num_q_heads, 3 * head_dim, head_dim]` | absent | one a query head |
//! | both projections | `[num_kv_heads, 3 * head_dim, gate_dim]` | `[num_q_heads, head_dim, gate_dim]` | one a query head |
//! | group-aware | `[num_kv_heads, 3 * head_dim, gate_dim]` | `[num_kv_heads, group * head_dim, gate_dim]` | one a KV head |

use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};
use safetensors::tensor::{Dtype as FileDtype, SafeTensors};

use super::rope::Rope;
use crate::error::{Error, Result, Status};
use crate::types::Shape;

/// The gates of all layers, widened to f32: `num_layers * heads * inputs * gate_dim * 4` bytes.
#[derive(Clone, Debug)]
pub struct Gate {
    layers: Vec<GateLayer>,
}

/// The gate of one layer.
#[derive(Clone, Debug)]
pub struct GateLayer {
    /// From max, min and mean of a block's keys.
    pub(super) k: Projection,
    /// From the mean of a block's queries; `None` takes the mean as it is.
    pub(super) q: Option<Projection>,
    /// Whether `q` reads the means of the whole group and gives one vector a KV head.
    pub(super) by_group: bool,
    /// `[num_q_heads, num_kv_heads, head_dim]` of the model.
    made_for: [usize; 3],
    /// How q and k were rotated, and how the gate's vectors are.
    pub(super) rope: Arc<Rope>,
}

/// `[heads, inputs, gate_dim]`, row-major.
#[derive(Clone, Debug)]
pub(super) struct Projection {
    pub(super) heads: usize,
    pub(super) inputs: usize,
    pub(super) gate_dim: usize,
    data: Vec<f32>,
}

impl Gate {
    /// Reads the gates of layers `0..num_layers` from a safetensors file.
    ///
    /// # Errors
    /// [`Status::Io`] if the file cannot be read or is no safetensors file; [`Status::Config`] if a layer's key is
    /// missing or `rope.gate_inv_freq` is; [`Status::Shape`] for a tensor or frequencies that do not fit `shape`;
    /// [`Status::Dtype`] for a tensor that is not bf16, f16 or f32; [`Status::Value`] for a bad `rope.scale`;
    /// [`Status::Unsupported`] for a decode gate (SeerAttention-R).
    pub fn load(path: &Path, shape: &Shape, num_layers: usize, rope: Rope) -> Result<Self> {
        shape.check()?;
        rope.check(shape)?;
        let name = path.display();
        let bytes = std::fs::read(path)
            .map_err(|e| Error::new(Status::Io, format!("gate file {name}"), "a readable file", e))?;
        let file = SafeTensors::deserialize(&bytes)
            .map_err(|e| Error::new(Status::Io, format!("gate file {name}"), "a safetensors file", e))?;
        let rope = Arc::new(rope);
        let layers = (0..num_layers).map(|i| GateLayer::read(&file, shape, i, &rope));
        Ok(Self { layers: layers.collect::<Result<_>>()? })
    }

    /// The gate of layer `layer`, counted from 0.
    #[must_use]
    pub fn layer(&self, layer: usize) -> Option<&GateLayer> {
        self.layers.get(layer)
    }

    /// Layers with a gate.
    #[must_use]
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }
}

impl GateLayer {
    fn read(file: &SafeTensors, shape: &Shape, layer: usize, rope: &Arc<Rope>) -> Result<Self> {
        let Shape { num_q_heads, num_kv_heads, head_dim, .. } = *shape;
        let (k_key, k) =
            Projection::read(file, layer, "mask_linear_k")?.ok_or_else(|| missing(file, layer))?;
        let q = Projection::read(file, layer, "mask_linear_q")?;
        let wide = k.inputs == 3 * head_dim && k.gate_dim > 0 && k.gate_dim.is_multiple_of(2);
        let heads_fit = k.heads == num_q_heads || k.heads == num_kv_heads;
        if !wide || !heads_fit || (q.is_none() && k.gate_dim != head_dim) {
            let width = if q.is_none() { head_dim.to_string() } else { "an even gate_dim".to_owned() };
            let wanted = format!(
                "[{num_q_heads} or {num_kv_heads} heads, {} (max, min and mean), {width}]",
                3 * head_dim
            );
            return Err(Error::new(Status::Shape, k_key, wanted, k.shape()));
        }
        let mut by_group = false;
        if let Some((q_key, q)) = &q {
            let by_head = [q.heads, q.inputs] == [num_q_heads, head_dim];
            by_group = !by_head && [q.heads, q.inputs] == [num_kv_heads, shape.group_size() * head_dim];
            let keys_fit = !by_group || k.heads == num_kv_heads;
            if !(by_head || by_group) || !keys_fit || q.gate_dim != k.gate_dim {
                let grouped = shape.group_size() * head_dim;
                let wanted = format!(
                    "[{num_q_heads}, {head_dim}, {0}] or [{num_kv_heads}, {grouped}, {0}]",
                    k.gate_dim
                );
                return Err(Error::new(Status::Shape, q_key, wanted, q.shape()));
            }
        }
        rope.check_gate(head_dim, k.gate_dim)?;
        let made_for = [num_q_heads, num_kv_heads, head_dim];
        Ok(Self { k, q: q.map(|(_, q)| q), by_group, made_for, rope: Arc::clone(rope) })
    }

    /// Refuses heads other than those the gate was loaded for.
    ///
    /// # Errors
    /// [`Status::Shape`].
    pub fn check(&self, shape: &Shape) -> Result<()> {
        let got = [shape.num_q_heads, shape.num_kv_heads, shape.head_dim];
        if got == self.made_for {
            return Ok(());
        }
        let wanted = format!("a gate for q heads, KV heads, head_dim {got:?}");
        Err(Error::new(Status::Shape, "gate", wanted, format!("one for {:?}", self.made_for)))
    }

    /// `[k_heads, 3 * head_dim, gate_dim]`.
    pub(crate) fn k_weights(&self) -> &[f32] {
        &self.k.data
    }

    /// Heads of the key projection.
    pub(crate) fn k_heads(&self) -> usize {
        self.k.heads
    }

    /// The query projection, where there is one: `[heads, inputs, gate_dim]`.
    pub(crate) fn q_weights(&self) -> Option<&[f32]> {
        self.q.as_ref().map(|q| &q.data[..])
    }

    /// Whether that reads the means of a whole group.
    pub(crate) fn is_by_group(&self) -> bool {
        self.by_group
    }

    /// How vectors are rotated.
    pub(crate) fn rope(&self) -> &Rope {
        &self.rope
    }

    /// Length of the vectors whose product is a score.
    #[must_use]
    pub fn gate_dim(&self) -> usize {
        self.k.gate_dim
    }

    /// Scores a KV head gives: 1 if group-aware, else one a query head.
    #[must_use]
    pub fn is_group_aware(&self) -> bool {
        self.by_group
    }
}

/// Why a layer has no key projection.
fn missing(file: &SafeTensors, layer: usize) -> Error {
    let wanted = key(layer, "mask_linear_k");
    if file.names().iter().any(|name| name.contains("attngate_linear_k")) {
        let got = "attngate_linear_k: a decode gate of SeerAttention-R";
        return Error::new(Status::Unsupported, "gate file", format!("a prefill gate ({wanted})"), got);
    }
    Error::new(Status::Config, "gate file", format!("key {wanted}"), format!("{} other keys", file.len()))
}

/// What a key ends in.
fn key(layer: usize, part: &str) -> String {
    format!("layers.{layer}.self_attn.attn_gate.{part}.weight")
}

impl Projection {
    /// One tensor and its key; `None` if the file has none.
    fn read(file: &SafeTensors, layer: usize, part: &str) -> Result<Option<(String, Self)>> {
        let end = key(layer, part);
        let whole = |name: &str| name.strip_suffix(&end).is_some_and(|p| p.is_empty() || p.ends_with('.'));
        let Some((name, view)) = file.iter().find(|(name, _)| whole(name)) else { return Ok(None) };
        let &[heads, inputs, gate_dim] = view.shape() else {
            let got = format!("{:?}", view.shape());
            return Err(Error::new(Status::Shape, name, "[heads, inputs, gate_dim]", got));
        };
        let data = widen(view.dtype(), view.data()).ok_or_else(|| {
            Error::new(Status::Dtype, name, "BF16, F16 or F32", format!("{:?}", view.dtype()))
        })?;
        Ok(Some((name.to_owned(), Self { heads, inputs, gate_dim, data })))
    }

    /// The matrix of one head: `[inputs, gate_dim]`.
    pub(super) fn head(&self, head: usize) -> &[f32] {
        let size = self.inputs * self.gate_dim;
        &self.data[head * size..(head + 1) * size]
    }

    fn shape(&self) -> String {
        format!("{:?}", [self.heads, self.inputs, self.gate_dim])
    }
}

/// Little-endian elements as f32; `None` for other types.
fn widen(dtype: FileDtype, bytes: &[u8]) -> Option<Vec<f32>> {
    let halves = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    match dtype {
        FileDtype::BF16 => Some(halves().map(|b| bf16::from_le_bytes(b).to_f32()).collect()),
        FileDtype::F16 => Some(halves().map(|b| f16::from_le_bytes(b).to_f32()).collect()),
        FileDtype::F32 => {
            Some(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        }
        _ => None,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::fixture::{self, Rng};
    use crate::select::Pairing;
    use crate::types::Dtype;
    use safetensors::tensor::TensorView;

    /// A tensor to write: key, extents, values.
    type Tensor = (String, Vec<usize>, Vec<f32>);

    /// The three published forms.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) enum Form {
        KeysOnly,
        Both,
        ByGroup,
    }

    fn tensors(seed: u64, shape: &Shape, form: Form, gate_dim: usize, layer: usize) -> Vec<Tensor> {
        let Shape { num_q_heads, num_kv_heads, head_dim, .. } = *shape;
        let k_heads = if form == Form::KeysOnly { num_q_heads } else { num_kv_heads };
        let mut parts = vec![("mask_linear_k", vec![k_heads, 3 * head_dim, gate_dim])];
        match form {
            Form::KeysOnly => {}
            Form::Both => parts.push(("mask_linear_q", vec![num_q_heads, head_dim, gate_dim])),
            Form::ByGroup => {
                parts.push(("mask_linear_q", vec![num_kv_heads, shape.group_size() * head_dim, gate_dim]));
            }
        }
        let mut rng = Rng::new(seed + layer as u64);
        let random = |(part, extents): (&str, Vec<usize>)| {
            let scale = 4.0 / (extents[1] as f32).sqrt();
            let n = extents.iter().product();
            let values =
                (0..n).map(|_| fixture::round(Dtype::Bf16, rng.normal()) * scale.log2().round().exp2());
            (format!("model.{}", key(layer, part)), extents, values.collect())
        };
        parts.into_iter().map(random).collect()
    }

    fn bytes(tensors: &[Tensor], dtype: FileDtype) -> Vec<u8> {
        let encode = |x: &f32| match dtype {
            FileDtype::BF16 => bf16::from_f32(*x).to_le_bytes().to_vec(),
            FileDtype::F16 => f16::from_f32(*x).to_le_bytes().to_vec(),
            _ => x.to_le_bytes().to_vec(),
        };
        let data: Vec<Vec<u8>> = tensors.iter().map(|t| t.2.iter().flat_map(encode).collect()).collect();
        let views = tensors.iter().zip(&data).map(|((name, extents, _), data)| {
            (name.clone(), TensorView::new(dtype, extents.clone(), data).unwrap())
        });
        safetensors::serialize(views, None).unwrap()
    }

    fn as_stored(dtype: FileDtype, values: &[f32]) -> Vec<f32> {
        let as_f16 = |&x: &f32| fixture::round(Dtype::F16, x);
        // All values are exact in bf16; the smallest are not in f16.
        if dtype == FileDtype::F16 { values.iter().map(as_f16).collect() } else { values.to_vec() }
    }

    /// Writes `bytes` to a file of this process, loads it, removes it.
    fn load(name: &str, bytes: &[u8], shape: &Shape, num_layers: usize, rope: Rope) -> Result<Gate> {
        let path = std::env::temp_dir().join(format!("compactattn-{}-{name}", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        let gate = Gate::load(&path, shape, num_layers, rope);
        std::fs::remove_file(&path).unwrap();
        gate
    }

    pub(in crate::select) fn rope(head_dim: usize, gate_dim: usize, pairing: Pairing) -> Rope {
        let freq = |dim: usize| (0..dim / 2).map(|i| 1e4_f32.powf(-2.0 * i as f32 / dim as f32)).collect();
        let gate_inv_freq = (gate_dim != head_dim).then(|| freq(gate_dim));
        Rope { inv_freq: freq(head_dim), gate_inv_freq, pairing, scale: 1.25 }
    }

    /// One layer of random weights, through a file.
    pub(crate) fn gate(name: &str, shape: &Shape, form: Form, gate_dim: usize) -> Gate {
        let file = bytes(&tensors(11, shape, form, gate_dim, 0), FileDtype::F32);
        load(name, &file, shape, 1, rope(shape.head_dim, gate_dim, Pairing::HalfSplit)).unwrap()
    }

    fn shape() -> Shape {
        fixture::shape(2, 3, 64, 16, Dtype::Bf16)
    }

    fn half_split() -> Rope {
        rope(64, 64, Pairing::HalfSplit)
    }

    #[test]
    fn weights_of_every_dtype_layer_and_form_come_back() {
        for dtype in [FileDtype::BF16, FileDtype::F16, FileDtype::F32] {
            for form in [Form::KeysOnly, Form::Both, Form::ByGroup] {
                // Layers 1 and 11 share the end of their names.
                let layers = (0..12).map(|i| tensors(3, &shape(), form, 64, i));
                let all: Vec<Tensor> = layers.rev().flatten().collect();
                let gate = load("trip", &bytes(&all, dtype), &shape(), 12, half_split()).unwrap();
                assert_eq!(gate.num_layers(), 12);
                for i in 0..12 {
                    let (layer, want) = (gate.layer(i).unwrap(), tensors(3, &shape(), form, 64, i));
                    let stored: Vec<Vec<f32>> = want.iter().map(|t| as_stored(dtype, &t.2)).collect();
                    assert!(layer.k.data == stored[0], "{dtype:?} {form:?} layer {i}");
                    assert!(
                        layer.q.as_ref().map(|q| &q.data) == stored.get(1),
                        "{dtype:?} {form:?} layer {i}"
                    );
                    assert_eq!(layer.is_group_aware(), form == Form::ByGroup);
                    assert!(layer.k.head(1) == &stored[0][192 * 64..2 * 192 * 64]);
                }
            }
        }
    }

    #[test]
    fn a_bad_file_is_refused_by_the_name_of_what_is_wrong() {
        let good = || tensors(3, &shape(), Form::Both, 64, 0);
        let renamed = |name: &str| {
            let mut all = good();
            all[0].0 = name.to_owned();
            all
        };
        let mut other_heads = good();
        other_heads[1].1 = vec![3, 128, 64];
        let mut flat = good();
        flat[0].1 = vec![2 * 192, 64];
        let k_key = "layers.0.self_attn.attn_gate.mask_linear_k.weight";
        let q_key = "layers.0.self_attn.attn_gate.mask_linear_q.weight";
        let decode = "model.layers.0.self_attn.attn_gate.attngate_linear_k.weight";
        for (tensors, status, named) in [
            (renamed("model.layers.1.self_attn.attn_gate.mask_linear_k.weight"), Status::Config, k_key),
            (renamed(decode), Status::Unsupported, "decode"),
            (other_heads, Status::Shape, q_key),
            (flat, Status::Shape, k_key),
        ] {
            let error = load("bad", &bytes(&tensors, FileDtype::F32), &shape(), 1, half_split()).unwrap_err();
            assert_eq!(error.status(), status, "{error}");
            assert!(error.to_string().contains(named), "{error}");
        }
        let ints = load("ints", &bytes(&good(), FileDtype::I32), &shape(), 1, half_split()).unwrap_err();
        assert_eq!(ints.status(), Status::Dtype);
        assert!(ints.to_string().contains(k_key), "{ints}");
        let torn = load("torn", &bytes(&good(), FileDtype::F32)[..900], &shape(), 1, half_split());
        assert_eq!(torn.unwrap_err().status(), Status::Io);
        let absent = Gate::load(Path::new("/no/such/file"), &shape(), 1, half_split());
        assert_eq!(absent.unwrap_err().status(), Status::Io);
    }

    #[test]
    fn frequencies_must_cover_the_head_and_a_gate_of_another_width() {
        let file = bytes(&tensors(3, &shape(), Form::Both, 32, 0), FileDtype::F32);
        let narrow = |rope| load("narrow", &file, &shape(), 1, rope).map(|_| ()).map_err(|e| e.status());
        assert_eq!(narrow(rope(64, 32, Pairing::HalfSplit)), Ok(()));
        assert_eq!(narrow(half_split()), Err(Status::Config));
        assert_eq!(narrow(rope(32, 32, Pairing::HalfSplit)), Err(Status::Shape));
        assert_eq!(narrow(Rope { scale: 0.0, ..rope(64, 32, Pairing::HalfSplit) }), Err(Status::Value));
    }

    #[test]
    fn a_gate_fits_only_the_heads_it_was_loaded_for() {
        let gate = gate("fits", &shape(), Form::Both, 64);
        assert_eq!(gate.layer(0).unwrap().check(&shape()), Ok(()));
        let other = fixture::shape(3, 2, 64, 16, Dtype::Bf16);
        assert_eq!(gate.layer(0).unwrap().check(&other).unwrap_err().status(), Status::Shape);
    }
}
