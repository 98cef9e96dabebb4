//! Traces: Q, K and V of some layers in one safetensors file.
//!
//! A layer is three tensors `[tokens, heads, head_dim]`, post-RoPE: `layerN.q`, `layerN.k`, `layerN.v` (or plain `q`,
//! `k`, `v` for a file of one layer). `q` holds the last rows of the sequence, `k` and `v` all of them.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use compactattn::tensor::{Elements, ElementsMut};
use compactattn::types::{Dtype, Shape};
use compactattn::{Error, Result, Status};
use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use crate::output::write_tensors;

/// Elements of one tensor, owned, in the file's own type.
#[derive(Clone, Debug)]
pub(crate) enum Data {
    /// bfloat16.
    Bf16(Vec<bf16>),
    /// IEEE half.
    F16(Vec<f16>),
    /// IEEE single.
    F32(Vec<f32>),
}

/// One tensor of a layer: `[tokens, heads, head_dim]`, row-major.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    /// `[tokens, heads, head_dim]`.
    pub(crate) dims: [usize; 3],
    /// The elements.
    pub(crate) data: Data,
}

/// One layer's tensors.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    /// The layer's number in its model; `None` for plain `q`, `k`, `v`.
    pub(crate) number: Option<usize>,
    /// The last query rows.
    pub(crate) q: Tensor,
    /// All keys.
    pub(crate) k: Tensor,
    /// All values.
    pub(crate) v: Tensor,
}

/// A checked file: at least one layer, all layers of the same extents and type.
#[derive(Clone, Debug)]
pub(crate) struct Trace {
    /// By number.
    pub(crate) layers: Vec<Layer>,
    /// The file's own metadata.
    pub(crate) metadata: HashMap<String, String>,
}

impl Trace {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`Status::Io`] for an unreadable file; [`Status::Shape`] or [`Status::Dtype`] naming the tensor.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path)
            .map_err(|e| Error::plain(Status::Io, format!("cannot read {}: {e}", path.display())))?;
        Self::of_bytes(&bytes, &path.display().to_string())
    }

    /// [`Trace::read`] of a file's contents; `name` is for messages.
    ///
    /// # Errors
    /// As [`Trace::read`].
    pub(crate) fn of_bytes(bytes: &[u8], name: &str) -> Result<Self> {
        let broken = |e| Error::plain(Status::Io, format!("{name} is not a safetensors file: {e}"));
        let tensors = SafeTensors::deserialize(bytes).map_err(broken)?;
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(broken)?;
        let layers = find_layers(&tensors, name)?;
        let layers = layers.into_iter().map(|(number, prefix)| Layer::read(&tensors, number, &prefix));
        let trace = Self {
            layers: layers.collect::<Result<_>>()?,
            metadata: header.metadata().clone().unwrap_or_default(),
        };
        trace.check_equal()?;
        Ok(trace)
    }

    /// Writes the layers, `metadata` and all, as a file that [`Trace::read`] reads.
    ///
    /// # Errors
    /// [`Status::Io`].
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let named = self.layers.iter().flat_map(|layer| {
            layer.tensors().map(|(part, tensor)| (format!("{}{part}", layer.prefix()), tensor))
        });
        let named = named.map(|(name, tensor)| (name, tensor.dims.to_vec(), &tensor.data));
        write_tensors(path, named, self.metadata.clone())
    }

    /// Heads, dtype and scale for pages of `page_size` tokens; `sm_scale` where the file says none.
    ///
    /// # Errors
    /// Those of [`Shape::check`].
    pub(crate) fn shape(&self, page_size: usize, sm_scale: Option<f32>) -> Result<Shape> {
        let layer = &self.layers[0];
        let head_dim = layer.q.dims[2];
        let stored = self.metadata.get("sm_scale").and_then(|text| text.parse().ok());
        let shape = Shape {
            num_q_heads: layer.q.dims[1],
            num_kv_heads: layer.k.dims[1],
            head_dim,
            page_size,
            dtype: layer.q.data.dtype(),
            kv_dtype: layer.q.data.dtype(),
            sm_scale: sm_scale.or(stored).unwrap_or(1.0 / (head_dim as f32).sqrt()),
        };
        shape.check()?;
        Ok(shape)
    }

    /// KV tokens of every layer.
    pub(crate) fn kv_len(&self) -> usize {
        self.layers[0].k.dims[0]
    }

    /// Query tokens of every layer: the last of the sequence.
    pub(crate) fn q_len(&self) -> usize {
        self.layers[0].q.dims[0]
    }

    fn check_equal(&self) -> Result<()> {
        let first = &self.layers[0];
        for layer in &self.layers[1..] {
            for ((part, a), (_, b)) in layer.tensors().into_iter().zip(first.tensors()) {
                let name = format!("{}{part}", layer.prefix());
                if a.dims != b.dims {
                    let wanted = format!("{:?}, as in {}{part}", b.dims, first.prefix());
                    return Err(Error::new(Status::Shape, name, wanted, format!("{:?}", a.dims)));
                }
                check_dtype(&name, b.data.dtype(), a)?;
            }
        }
        Ok(())
    }
}

impl Layer {
    fn read(tensors: &SafeTensors, number: Option<usize>, prefix: &str) -> Result<Self> {
        let part = |part: &str| Tensor::read(tensors, &format!("{prefix}{part}"));
        let layer = Self { number, q: part("q")?, k: part("k")?, v: part("v")? };
        layer.check(prefix)?;
        Ok(layer)
    }

    /// What precedes `q`, `k` and `v` in the file.
    pub(crate) fn prefix(&self) -> String {
        self.number.map_or(String::new(), |number| format!("layer{number}."))
    }

    /// The layer's name in tables.
    pub(crate) fn name(&self) -> String {
        self.number.map_or("0".to_owned(), |number| number.to_string())
    }

    fn tensors(&self) -> [(&'static str, &Tensor); 3] {
        [("k", &self.k), ("q", &self.q), ("v", &self.v)]
    }

    fn check(&self, prefix: &str) -> Result<()> {
        let ([q_len, q_heads, head_dim], [kv_len, kv_heads, _]) = (self.q.dims, self.k.dims);
        let shape = |part: &str, wanted: String, got: [usize; 3]| {
            Err(Error::new(Status::Shape, format!("{prefix}{part}"), wanted, format!("{got:?}")))
        };
        if self.v.dims != self.k.dims {
            return shape("v", format!("{:?}, as {prefix}k", self.k.dims), self.v.dims);
        }
        if self.k.dims[2] != head_dim {
            return shape("k", format!("head_dim {head_dim}, as {prefix}q"), self.k.dims);
        }
        if q_len == 0 || q_len > kv_len {
            return shape("q", format!("1..={kv_len} tokens, the last of {prefix}k"), self.q.dims);
        }
        if kv_heads == 0 || q_heads == 0 || !q_heads.is_multiple_of(kv_heads) {
            return shape("q", format!("a multiple of {kv_heads} heads, those of {prefix}k"), self.q.dims);
        }
        let dtype = self.q.data.dtype();
        check_dtype(&format!("{prefix}k"), dtype, &self.k)?;
        check_dtype(&format!("{prefix}v"), dtype, &self.v)
    }
}

impl Tensor {
    fn read(tensors: &SafeTensors, name: &str) -> Result<Self> {
        let missing = |_| Error::new(Status::Shape, name, "a tensor of that name", "none");
        let view = tensors.tensor(name).map_err(missing)?;
        let dims = view.shape().try_into().map_err(|_| {
            let got = format!("{:?}", view.shape());
            Error::new(Status::Shape, name, "[tokens, heads, head_dim]", got)
        })?;
        Ok(Self { dims, data: Data::of_view(name, &view)? })
    }
}

impl Tensor {
    /// The elements, widened.
    pub(crate) fn to_f32(&self) -> Vec<f32> {
        let mut wide = vec![0.0; self.dims.iter().product()];
        self.data.elements(0).load(0, &mut wide);
        wide
    }
}

impl Data {
    /// `len` elements of `value`.
    pub(crate) fn filled(dtype: Dtype, len: usize, value: f32) -> Self {
        match dtype {
            Dtype::Bf16 => Self::Bf16(vec![bf16::from_f32(value); len]),
            Dtype::F16 => Self::F16(vec![f16::from_f32(value); len]),
            _ => Self::F32(vec![value; len]),
        }
    }

    fn of_view(name: &str, view: &TensorView) -> Result<Self> {
        let halves = || view.data().chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        let words = || view.data().chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        match view.dtype() {
            safetensors::Dtype::BF16 => Ok(Self::Bf16(halves().map(bf16::from_bits).collect())),
            safetensors::Dtype::F16 => Ok(Self::F16(halves().map(f16::from_bits).collect())),
            safetensors::Dtype::F32 => Ok(Self::F32(words().map(f32::from_bits).collect())),
            other => Err(Error::new(Status::Dtype, name, "BF16, F16 or F32", format!("{other:?}"))),
        }
    }

    /// Element type.
    pub(crate) fn dtype(&self) -> Dtype {
        self.elements(0).dtype()
    }

    /// All elements, to be written.
    pub(crate) fn elements_mut(&mut self) -> ElementsMut<'_> {
        match self {
            Self::Bf16(x) => ElementsMut::Bf16(x),
            Self::F16(x) => ElementsMut::F16(x),
            Self::F32(x) => ElementsMut::F32(x),
        }
    }

    /// The elements' bytes and their type's name in the file format.
    pub(crate) fn bytes(&self) -> (safetensors::Dtype, &[u8]) {
        match self {
            Self::Bf16(x) => (safetensors::Dtype::BF16, bytemuck::cast_slice(x)),
            Self::F16(x) => (safetensors::Dtype::F16, bytemuck::cast_slice(x)),
            Self::F32(x) => (safetensors::Dtype::F32, bytemuck::cast_slice(x)),
        }
    }

    /// All elements from `first` on, borrowed.
    pub(crate) fn elements(&self, first: usize) -> Elements<'_> {
        match self {
            Self::Bf16(x) => Elements::Bf16(&x[first..]),
            Self::F16(x) => Elements::F16(&x[first..]),
            Self::F32(x) => Elements::F32(&x[first..]),
        }
    }

    /// Copies `len` elements `from[at..]` to `self[to..]`, bit for bit; both are of one type, or nothing is copied.
    pub(crate) fn copy(&mut self, to: usize, from: &Self, at: usize, len: usize) {
        match (self, from) {
            (Self::Bf16(a), Self::Bf16(b)) => a[to..to + len].copy_from_slice(&b[at..at + len]),
            (Self::F16(a), Self::F16(b)) => a[to..to + len].copy_from_slice(&b[at..at + len]),
            (Self::F32(a), Self::F32(b)) => a[to..to + len].copy_from_slice(&b[at..at + len]),
            _ => debug_assert!(false, "a trace is of one dtype"),
        }
    }
}

/// Layers by number with the prefix of their tensors.
fn find_layers(tensors: &SafeTensors, name: &str) -> Result<BTreeMap<Option<usize>, String>> {
    let mut layers = BTreeMap::new();
    for tensor in tensors.names() {
        let Some((prefix, part)) = tensor.rsplit_once('.').or(Some(("", tensor))) else { continue };
        let number = prefix.strip_prefix("layer").and_then(|n| n.parse::<usize>().ok());
        if ["q", "k", "v"].contains(&part) && (prefix.is_empty() || number.is_some()) {
            let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}.") };
            layers.insert(number, prefix);
        }
    }
    if layers.is_empty() {
        return Err(Error::new(
            Status::Shape,
            name,
            "tensors layerN.q, layerN.k, layerN.v (or q, k, v)",
            "none",
        ));
    }
    Ok(layers)
}

fn check_dtype(name: &str, wanted: Dtype, tensor: &Tensor) -> Result<()> {
    let got = tensor.data.dtype();
    if got == wanted { Ok(()) } else { Err(Error::new(Status::Dtype, name, wanted.name(), got.name())) }
}
