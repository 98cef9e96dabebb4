//! Chunked prefill of one layer: KV written chunk by chunk, summaries with it, the last chunk's queries at the end.

use std::path::PathBuf;

use compactattn::batch::{Batch, BatchParts};
use compactattn::plan::{Layout, Limits};
use compactattn::select::{Gate, GateLayer, Pairing, Rope};
use compactattn::settings::{DenseRules, Selector, Settings};
use compactattn::summaries::{self, Summaries, SummariesMut, Which};
use compactattn::tensor::Tokens;
use compactattn::types::Shape;
use compactattn::{Error, Parallel, Result, Status};

use crate::pool::{KvLayout, PagedKv};
use crate::trace::{Data, Layer, Tensor, Trace};

/// How the engine of a run is set up.
#[derive(Clone, Debug)]
pub(crate) struct Engine {
    /// Tokens per page.
    pub(crate) page_size: usize,
    /// Order within a page.
    pub(crate) kv_layout: KvLayout,
    /// Tokens per prefill chunk.
    pub(crate) chunk: usize,
    /// Replaces the trace's own scale.
    pub(crate) sm_scale: Option<f32>,
    /// Threads of the CPU path.
    pub(crate) parallel: Parallel,
    /// Weights of selector `attn_gate`.
    pub(crate) gate: Option<GateFile>,
}

/// Where gates are, and how the model rotates.
#[derive(Clone, Debug)]
pub(crate) struct GateFile {
    /// Safetensors.
    pub(crate) path: PathBuf,
    /// Base of the inverse frequencies, `theta^(-2i / head_dim)`.
    pub(crate) theta: f32,
    /// Which elements turn together.
    pub(crate) pairing: Pairing,
}

impl GateFile {
    /// The gates of layers `0..=layer`.
    fn load(&self, shape: &Shape, layer: usize) -> Result<Gate> {
        let dim = shape.head_dim;
        let inv_freq = (0..dim / 2).map(|i| self.theta.powf(-2.0 * i as f32 / dim as f32)).collect();
        let rope = Rope { inv_freq, gate_inv_freq: None, pairing: self.pairing, scale: 1.0 };
        Gate::load(&self.path, shape, layer + 1, rope)
    }
}

/// One layer, ready for the forward pass of the last chunk.
#[derive(Debug)]
pub(crate) struct Prefill {
    /// Heads, page size, dtype.
    pub(crate) shape: Shape,
    /// The largest step: one chunk of one request.
    pub(crate) limits: Limits,
    /// Threads.
    pub(crate) parallel: Parallel,
    /// The layer's number, and gates up to it.
    pub(crate) gate: Option<(usize, Gate)>,
    kv: PagedKv,
    q: Tensor,
    cu_seqlens_q: [i32; 2],
    seq_lens: [i32; 1],
    means: Vec<Means>,
}

/// Block means for one block size.
#[derive(Debug)]
struct Means {
    layout: Layout,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Prefill {
    /// Writes the layer into a fresh pool, chunk by chunk, keeping means for each of `block_sizes`.
    ///
    /// The trace has queries for its last rows only, so the chunks before them write KV and summaries and attend to
    /// nothing; the chunk that holds those rows is theirs alone.
    ///
    /// # Errors
    /// [`Status::Value`] for a chunk of 0; those of [`Layout::new`] and [`Batch::new`].
    pub(crate) fn run(trace: &Trace, layer: &Layer, engine: &Engine, block_sizes: &[usize]) -> Result<Self> {
        if engine.chunk == 0 {
            return Err(Error::new(Status::Value, "chunk", "at least 1 token", 0));
        }
        let shape = trace.shape(engine.page_size, engine.sm_scale)?;
        let (kv_len, q_len) = (trace.kv_len(), trace.q_len());
        let limits = Limits { max_num_reqs: 1, max_total_q: engine.chunk.max(q_len), max_kv_len: kv_len };
        let kv = PagedKv::new(shape, engine.kv_layout, kv_len);
        let number = layer.number.unwrap_or(0);
        let gate = engine.gate.as_ref().map(|file| Ok((number, file.load(&shape, number)?)));
        let means = block_sizes.iter().map(|&size| Means::new(shape, limits, size, kv.k().num_pages));
        let mut prefill = Self {
            shape,
            limits,
            parallel: engine.parallel,
            gate: gate.transpose()?,
            means: means.collect::<Result<_>>()?,
            kv,
            // Nothing reads the queries of a chunk that only writes.
            q: Tensor {
                dims: [engine.chunk, shape.num_q_heads, shape.head_dim],
                data: Data::filled(shape.dtype, engine.chunk * shape.num_q_heads * shape.head_dim, 0.0),
            },
            cu_seqlens_q: [0; 2],
            seq_lens: [0],
        };
        let past = kv_len - q_len;
        for first in (0..past).step_by(engine.chunk) {
            prefill.write(layer, first..past.min(first + engine.chunk))?;
        }
        prefill.q = layer.q.clone();
        prefill.write(layer, past..kv_len)?;
        Ok(prefill)
    }

    /// The last chunk as the engine hands it over.
    ///
    /// # Errors
    /// Those of [`Batch::new`].
    pub(crate) fn batch(&self) -> Result<Batch<'_>> {
        let [_, heads, head_dim] = self.q.dims;
        let q = Tokens {
            elements: self.q.data.elements(0),
            stride_token: heads * head_dim,
            stride_head: head_dim,
        };
        let parts = BatchParts {
            q,
            k: self.kv.k(),
            v: self.kv.v(),
            cu_seqlens_q: &self.cu_seqlens_q,
            seq_lens: &self.seq_lens,
            block_table: self.kv.block_table(),
            total_q: usize::try_from(self.cu_seqlens_q[1]).unwrap_or(0),
        };
        Batch::new(self.shape, parts)
    }

    /// Query tokens of the last chunk.
    pub(crate) fn q_len(&self) -> usize {
        self.q.dims[0]
    }

    /// The means kept for blocks of `block_size`; `None` where none were asked for.
    pub(crate) fn summaries(&self, block_size: usize) -> Option<Summaries<'_>> {
        let means = self.means.iter().find(|means| means.layout.settings.block_size == block_size)?;
        Some(Summaries { k_mean: &means.k, v_mean: Some(&means.v) })
    }

    /// The layer's gate, where weights were named.
    pub(crate) fn gate(&self) -> Option<&GateLayer> {
        self.gate.as_ref().and_then(|(number, gate)| gate.layer(*number))
    }

    /// How settings cut the last chunk.
    ///
    /// # Errors
    /// Those of [`Layout::new`].
    pub(crate) fn layout(&self, settings: &Settings) -> Result<Layout> {
        Layout::new(self.shape, *settings, self.limits)
    }

    /// One chunk's KV write and the summaries of the blocks that it completes.
    fn write(&mut self, layer: &Layer, tokens: std::ops::Range<usize>) -> Result<()> {
        self.cu_seqlens_q = [0, to_i32(tokens.len())?];
        self.seq_lens = [to_i32(tokens.end)?];
        self.kv.write(layer, tokens);
        let mut means = std::mem::take(&mut self.means);
        let batch = self.batch()?;
        for Means { layout, k, v } in &mut means {
            let mut out = SummariesMut { k_mean: k, v_mean: Some(v), seals: None };
            summaries::update(layout, &batch, Which::Completed, &mut out, self.parallel);
        }
        self.means = means;
        Ok(())
    }
}

impl Means {
    fn new(shape: Shape, limits: Limits, block_size: usize, num_pages: usize) -> Result<Self> {
        let settings = Settings { block_size, ..sparse(Selector::SampledExact) };
        let layout = Layout::new(shape, settings, limits)?;
        let len = summaries::len(&layout, num_pages);
        Ok(Self { layout, k: vec![f32::NAN; len], v: vec![f32::NAN; len] })
    }
}

/// A selector's settings for a run whose sequence is meant to be sparse however short it is.
pub(crate) fn sparse(selector: Selector) -> Settings {
    let dense = DenseRules { below_kv_len: 0, max_q_len: 0, prefix_tokens: 0 };
    Settings { dense, ..Settings::of(selector) }
}

fn to_i32(tokens: usize) -> Result<i32> {
    i32::try_from(tokens).map_err(|_| Error::new(Status::Value, "tokens", "fewer than 2^31", tokens))
}
