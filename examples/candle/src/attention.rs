//! Two attentions over one contract: candle's own operations on a contiguous cache, and CompactAttention in place in a
//! paged cache, as a candle operation.

use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp3, DType, Device, Layout, Result, Shape, Tensor, bail};
use compactattn::Parallel;
use compactattn::batch::{Batch, BatchParts, BlockTable};
use compactattn::plan::Limits;
use compactattn::run::{Output, Plan, PlanDesc, Step};
use compactattn::settings::Settings;
use compactattn::stats::Stats;
use compactattn::tensor::{Elements, ElementsMut, Pool, Tokens, TokensMut};
use compactattn::types::{self, Dtype};
use compactattn::workspace::Workspace;

use crate::model::Config;

/// One request's attention: what a model calls once a layer, with tokens in order.
pub trait Attention {
    /// `q [tokens, num_q_heads, head_dim]`, `k`, `v [tokens, num_kv_heads, head_dim]` of a layer's next tokens, f32;
    /// out as `q`. Keeps `k` and `v` for the tokens to come.
    fn forward(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor>;
}

/// candle's matrix products and softmax, over all tokens so far.
pub struct Own {
    /// Of each layer, `[kv tokens, num_kv_heads, head_dim]`.
    cache: Vec<Option<(Tensor, Tensor)>>,
    group_size: usize,
    precision: DType,
}

impl Own {
    /// `precision`: of the attention alone; what it takes and gives is f32.
    pub fn new(config: &Config, precision: DType) -> Self {
        let group_size = config.num_q_heads / config.num_kv_heads;
        Self { cache: vec![None; config.num_layers], group_size, precision }
    }

    /// `[num_q_heads, kv tokens, head_dim]`: each KV head once for every query head of its group.
    fn by_head(&self, kv: &Tensor) -> Result<Tensor> {
        let (tokens, heads, dim) = kv.dims3()?;
        let each = kv.to_dtype(self.precision)?.transpose(0, 1)?.unsqueeze(1)?;
        each.expand((heads, self.group_size, tokens, dim))?.reshape((heads * self.group_size, tokens, dim))
    }
}

impl Attention for Own {
    fn forward(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (k, v) = match &self.cache[layer] {
            Some((past_k, past_v)) => (Tensor::cat(&[past_k, k], 0)?, Tensor::cat(&[past_v, v], 0)?),
            None => (k.clone(), v.clone()),
        };
        self.cache[layer] = Some((k.clone(), v.clone()));
        let (tokens, _, head_dim) = q.dims3()?;
        let query = q.to_dtype(self.precision)?.transpose(0, 1)?.contiguous()?;
        let scale = 1.0 / (head_dim as f64).sqrt();
        let scores = (query.matmul(&self.by_head(&k)?.transpose(1, 2)?.contiguous()?)? * scale)?;
        let scores = scores.broadcast_add(&causal_mask(tokens, k.dim(0)?, self.precision, q.device())?)?;
        let weights = candle_nn::ops::softmax_last_dim(&scores)?;
        weights.matmul(&self.by_head(&v)?)?.transpose(0, 1)?.to_dtype(DType::F32)?.contiguous()
    }
}

/// `[queries, keys]`: 0 where a query, the last of which is the last key's, may look, else -inf.
fn causal_mask(queries: usize, keys: usize, precision: DType, device: &Device) -> Result<Tensor> {
    let past = keys - queries;
    let mask: Vec<f32> = (0..queries)
        .flat_map(|q| (0..keys).map(move |k| if k <= past + q { 0.0 } else { f32::NEG_INFINITY }))
        .collect();
    Tensor::from_vec(mask, (queries, keys), device)?.to_dtype(precision)
}

/// CompactAttention over pages of its own.
pub struct Compact {
    plan: Arc<Plan>,
    /// Of each layer, `[num_pages, page_size, num_kv_heads, head_dim]`.
    pools: Vec<(Tensor, Tensor)>,
    /// Physical pages of the request, in logical order.
    pages: Arc<Vec<i32>>,
    /// Of each layer.
    kv_tokens: Vec<usize>,
    workspace: Arc<Mutex<Workspace>>,
}

const PAGE_SIZE: usize = 16;

impl Compact {
    /// For a request of at most `max_kv_len` tokens, `max_tokens` of them a call.
    pub fn new(config: &Config, settings: Settings, max_tokens: usize, max_kv_len: usize) -> Result<Self> {
        let shape = types::Shape {
            num_q_heads: config.num_q_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            page_size: PAGE_SIZE,
            dtype: Dtype::F32,
            kv_dtype: Dtype::F32,
            sm_scale: (config.head_dim as f32).sqrt().recip(),
        };
        let limits = Limits { max_num_reqs: 1, max_total_q: max_tokens, max_kv_len };
        let layers = vec![settings; config.num_layers];
        let desc = PlanDesc { shape, limits, layers, splits: 1, gate: None };
        let plan = Plan::new(&desc, Parallel::new(0)).map_err(candle_core::Error::wrap)?;
        let workspace = plan.workspace().map_err(candle_core::Error::wrap)?;
        let num_pages = max_kv_len.div_ceil(PAGE_SIZE);
        let pool = || {
            Tensor::zeros(
                (num_pages, PAGE_SIZE, config.num_kv_heads, config.head_dim),
                DType::F32,
                &Device::Cpu,
            )
        };
        let pools = (0..config.num_layers).map(|_| Ok((pool()?, pool()?))).collect::<Result<Vec<_>>>()?;
        // An engine hands out what is free; here, the last page first.
        let pages = (0..num_pages).rev().map(|page| page as i32).collect();
        let kv_tokens = vec![0; config.num_layers];
        Ok(Self {
            plan: plan.into(),
            pools,
            pages: Arc::new(pages),
            kv_tokens,
            workspace: Arc::new(Mutex::new(workspace)),
        })
    }

    /// What a layer has selected so far.
    pub fn stats(&self, layer: usize) -> Result<Stats> {
        self.plan.stats(layer).map_err(candle_core::Error::wrap)
    }

    /// Writes new tokens to their pages, a run of one page at a time.
    fn write(&self, layer: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        let (first, tokens) = (self.kv_tokens[layer], k.dim(0)?);
        let mut done = 0;
        while done < tokens {
            let (logical, row) = ((first + done) / PAGE_SIZE, (first + done) % PAGE_SIZE);
            let run = (PAGE_SIZE - row).min(tokens - done);
            let page = self.pages[logical] as usize;
            for (pool, new) in [(&self.pools[layer].0, k), (&self.pools[layer].1, v)] {
                pool.flatten(0, 1)?.slice_set(
                    &new.narrow(0, done, run)?.contiguous()?,
                    0,
                    page * PAGE_SIZE + row,
                )?;
            }
            done += run;
        }
        Ok(())
    }
}

impl Attention for Compact {
    fn forward(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        self.write(layer, k, v)?;
        self.kv_tokens[layer] += k.dim(0)?;
        let op = PagedAttention {
            plan: self.plan.clone(),
            layer,
            pages: self.pages.clone(),
            kv_tokens: self.kv_tokens[layer],
            workspace: self.workspace.clone(),
        };
        let (k_pool, v_pool) = &self.pools[layer];
        q.apply_op3_no_bwd(k_pool, v_pool, &op)
    }
}

/// One layer of one step: `q [tokens, num_q_heads, head_dim]` over the pools of K and V; out as `q`.
struct PagedAttention {
    plan: Arc<Plan>,
    layer: usize,
    pages: Arc<Vec<i32>>,
    kv_tokens: usize,
    workspace: Arc<Mutex<Workspace>>,
}

impl CustomOp3 for PagedAttention {
    fn name(&self) -> &'static str {
        "compactattn"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (total_q, heads, head_dim) = q_layout.shape().dims3()?;
        let [stride_token, stride_head, 1] = *q_layout.stride() else { bail!("q: heads must be contiguous") };
        let (cu_seqlens_q, seq_lens) = ([0, total_q as i32], [self.kv_tokens as i32]);
        let parts = BatchParts {
            q: Tokens { elements: elements(q, q_layout)?, stride_token, stride_head },
            k: pool(k, k_layout)?,
            v: pool(v, v_layout)?,
            cu_seqlens_q: &cu_seqlens_q,
            seq_lens: &seq_lens,
            block_table: BlockTable {
                entries: &self.pages,
                stride_row: self.pages.len(),
                width: self.pages.len(),
            },
            total_q,
        };
        let shape = self.plan.layouts()[self.layer].shape;
        let batch = Batch::new(shape, parts).map_err(candle_core::Error::wrap)?;
        let mut out = vec![0.0; total_q * heads * head_dim];
        let elements = ElementsMut::F32(&mut out);
        let mut output = Output {
            out: TokensMut { elements, stride_token: heads * head_dim, stride_head: head_dim },
            lse: None,
        };
        let step = Step { layer: self.layer, ..Step::default() };
        let Ok(mut workspace) = self.workspace.lock() else {
            bail!("another thread panicked with the workspace")
        };
        self.plan
            .forward(&batch, &step, &mut output, workspace.bytes_mut())
            .map_err(candle_core::Error::wrap)?;
        Ok((CpuStorage::F32(out), q_layout.shape().clone()))
    }
}

/// From the layout's first element on.
fn elements<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<Elements<'a>> {
    Ok(Elements::F32(&storage.as_slice::<f32>()?[layout.start_offset()..]))
}

fn pool<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<Pool<'a>> {
    let [stride_page, stride_token, stride_head, 1] = *layout.stride() else {
        bail!("pool: heads must be contiguous")
    };
    Ok(Pool {
        elements: elements(storage, layout)?,
        num_pages: layout.dims()[0],
        stride_page,
        stride_token,
        stride_head,
        scales: &[],
    })
}
