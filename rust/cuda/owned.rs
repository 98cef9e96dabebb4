//! One call together with all memory it touches: a step from the host, run on the GPU and read back, without `unsafe`.
//!
//! For Rust programs whose tensors lie on the host, for tools and for checks. Who keeps the KV pool on the device
//! calls [`Plan`] with addresses.

use std::sync::Arc;

use bytemuck::{AnyBitPattern, NoUninit};

use super::attend::{DeviceOutput, Kernel};
use super::batch::{DeviceBatch, DevicePool, DeviceTokens};
use super::context::Context;
use super::memory::DeviceBuffer;
use super::plan::{Call, External, Plan};
use super::summaries::MeansAt;
use crate::batch::Batch;
use crate::error::{Error, Result, Status};
use crate::plan::Layout;
use crate::run;
use crate::select;
use crate::stats::Stats;
use crate::summaries::{self, Which};
use crate::tensor::{Elements, ElementsMut, Pool};
use crate::workspace::Sizes;

/// A step in GPU memory, its results beside it; everything is freed with this.
///
/// Runs on the legacy stream, in equal shares for all processors (`num_splits` 0), and waits before it returns.
#[derive(Debug)]
pub struct OwnedCall {
    plan: Plan,
    layer: usize,
    layout: Layout,
    sizes: Sizes,
    batch: DeviceBatch,
    external: Option<External>,
    /// What `batch` and `external` point into.
    inputs: Vec<DeviceBuffer>,
    k_mean: DeviceBuffer,
    /// Empty without mean correction.
    v_mean: DeviceBuffer,
    workspace: DeviceBuffer,
    out: DeviceBuffer,
    lse: DeviceBuffer,
}

impl OwnedCall {
    /// Copies the batch as it lies, strides and all, and `step.external`; makes the summaries that the selector reads
    /// from the pool, on the device (`step.summaries` are not read).
    ///
    /// # Errors
    /// Those of [`run::Plan::forward`] about batch and step; [`Status::Align`] for strides that are no multiple of 16
    /// bytes; [`Status::Unsupported`] naming what CUDA does not offer; [`Status::OutOfMemory`] and others of the driver.
    pub fn new(context: &Arc<Context>, plan: &run::Plan, batch: &Batch, step: &run::Step) -> Result<Self> {
        let layout = plan.check_step(batch, step)?;
        check_strides(batch)?;
        let plan = Plan::new(Arc::clone(context), plan, 0)?;
        let sizes = Sizes::of(&layout, 1)?;
        let mut inputs = Vec::new();
        let device_batch = upload_batch(context, batch, &mut inputs)?;
        let external = upload_external(context, &layout, step, &mut inputs)?;
        let rows = batch.total_q() * layout.shape.num_q_heads;
        let corrects = layout.settings.mean_correction;
        let means = corrects || select::needs_summaries(layout.settings.selector);
        let len = |wanted: bool| if wanted { summaries::len(&layout, batch.k().num_pages) } else { 0 };
        let this = Self {
            workspace: context.alloc(plan.workspace_bytes(step.layer, &layout)?)?,
            k_mean: context.alloc(len(means) * size_of::<f32>())?,
            v_mean: context.alloc(len(corrects) * size_of::<f32>())?,
            out: context.alloc(rows * layout.shape.head_dim * layout.shape.dtype.size_bytes())?,
            lse: context.alloc(rows * size_of::<f32>())?,
            plan,
            layer: step.layer,
            layout,
            sizes,
            batch: device_batch,
            external,
            inputs,
        };
        if means && rows > 0 {
            let call = this.call();
            let means_at = MeansAt { k: call.k_mean, v: call.v_mean, seals: 0 };
            // SAFETY: `call` names this object's buffers, which outlive the wait below; means hold a pool's elements.
            unsafe { this.plan.update_summaries(&call, Which::All, means_at) }?;
            context.synchronize()?;
        }
        Ok(this)
    }

    /// The attend kernel that serves it.
    ///
    /// # Errors
    /// [`Status::Unsupported`].
    pub fn kernel(&self) -> Result<&'static str> {
        let corrects = self.layout.settings.mean_correction;
        let kernel = Kernel::choose(self.plan.context(), &self.layout)?;
        Ok(if corrects { kernel.corrected } else { kernel.name })
    }

    /// `times` forward passes, one after the other, and one wait at the end.
    ///
    /// # Errors
    /// The driver's.
    pub fn run(&mut self, times: usize) -> Result<()> {
        if self.batch.total_q == 0 {
            return Ok(());
        }
        let shape = &self.layout.shape;
        let output = DeviceOutput {
            out: DeviceTokens {
                address: self.out.address(),
                stride_token: shape.num_q_heads * shape.head_dim,
                stride_head: shape.head_dim,
            },
            lse: self.lse.address(),
            lse_stride_head: self.batch.total_q,
            lse_stride_token: 1,
        };
        for _ in 0..times {
            // SAFETY: `call` and `output` name this object's buffers, each an allocation of its own and as long as its
            // field says; they outlive the wait below, and freeing waits too. NULL is the legacy stream.
            unsafe { self.plan.forward(&self.call(), &output) }?;
        }
        self.plan.context().synchronize()
    }

    /// What the last [`OwnedCall::run`] left in `out`: `[total_q, num_q_heads, head_dim]`, row-major.
    ///
    /// # Errors
    /// [`Status::Dtype`] or [`Status::Shape`] for another type or length; those of the driver.
    pub fn out(&self, into: &mut ElementsMut) -> Result<()> {
        let dtype = self.layout.shape.dtype;
        if into.dtype() != dtype {
            return Err(Error::new(Status::Dtype, "out", dtype.name(), into.dtype().name()));
        }
        match into {
            ElementsMut::Bf16(x) => read(&self.out, "out", x),
            ElementsMut::F16(x) => read(&self.out, "out", x),
            ElementsMut::F32(x) => read(&self.out, "out", x),
        }
    }

    /// What the last [`OwnedCall::run`] left in `lse`: `[num_q_heads, total_q]`, natural log.
    ///
    /// # Errors
    /// [`Status::Shape`] for another length; those of the driver.
    pub fn lse(&self, into: &mut [f32]) -> Result<()> {
        read(&self.lse, "lse", into)
    }

    /// What every pass since [`OwnedCall::new`] selected, those of [`OwnedCall::lists`] among them.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.plan.stats(self.layer)
    }

    /// The lists that a pass attends to, `[list spans, lists per span, mask_words]` of the largest step, zeros after the
    /// step's own: select and union once more, into memory of their own.
    ///
    /// # Errors
    /// [`Status::OutOfMemory`] and others of the driver.
    pub fn lists(&mut self) -> Result<Vec<u32>> {
        let mut bits = vec![0_u32; self.sizes.lists];
        if self.batch.total_q == 0 {
            return Ok(bits);
        }
        let context = Arc::clone(self.plan.context());
        let mut lists = context.alloc(size_of_val(&bits[..]))?;
        lists.upload(0, &bits)?;
        let scores = context.alloc(self.sizes.scores * size_of::<f32>())?;
        let mut call = self.call();
        if call.external.is_none() {
            // SAFETY: as in `run`; `scores` holds those of the largest step.
            unsafe { self.plan.select(&call, scores.address(), 0) }?;
            call.external = Some(External::Scores(scores.address()));
        }
        // SAFETY: as in `run`; `lists` holds those of the largest step.
        unsafe { self.plan.unite(&call, lists.address()) }?;
        context.synchronize()?;
        lists.download(0, &mut bits)?;
        Ok(bits)
    }

    fn call(&self) -> Call<'_> {
        debug_assert!(!self.inputs.is_empty());
        Call {
            layer: self.layer,
            layout: &self.layout,
            batch: &self.batch,
            k_mean: self.k_mean.address(),
            v_mean: if self.layout.settings.mean_correction { self.v_mean.address() } else { 0 },
            external: self.external,
            workspace: self.workspace.address(),
            stream: std::ptr::null_mut(),
        }
    }
}

fn read<T: NoUninit + AnyBitPattern>(from: &DeviceBuffer, name: &str, into: &mut [T]) -> Result<()> {
    if size_of_val(into) != from.len_bytes() {
        let wanted = format!("{} elements", from.len_bytes() / size_of::<T>());
        return Err(Error::new(Status::Shape, name, wanted, into.len()));
    }
    from.download(0, into)
}

/// Queries, pools, lengths and block table; their memory is added to `inputs`.
fn upload_batch(context: &Context, batch: &Batch, inputs: &mut Vec<DeviceBuffer>) -> Result<DeviceBatch> {
    let (q, table) = (batch.q(), batch.block_table());
    let (k, v) = (bytes(&batch.k().elements), bytes(&batch.v().elements));
    let places = Places::of(k, v);
    let mut pools = context.alloc(places.len)?;
    pools.upload(places.k, k)?;
    pools.upload(places.v, v)?;
    let k_scale = keep_scales(context, batch.k(), inputs)?;
    let v_scale = keep_scales(context, batch.v(), inputs)?;
    let pool = |pool: &Pool, at: usize, scale: u64| DevicePool {
        scale,
        stride_scale: usize::from(pool.scales.len() > 1),
        address: pools.address() + at as u64,
        stride_page: pool.stride_page,
        stride_token: pool.stride_token,
        stride_head: pool.stride_head,
    };
    let made = DeviceBatch {
        q: DeviceTokens {
            address: keep(context, bytes(&q.elements), inputs)?,
            stride_token: q.stride_token,
            stride_head: q.stride_head,
        },
        k: pool(batch.k(), places.k, k_scale),
        v: pool(batch.v(), places.v, v_scale),
        cu_seqlens_q: keep(context, batch.cu_seqlens_q(), inputs)?,
        seq_lens: keep(context, batch.seq_lens(), inputs)?,
        block_table: keep(context, table.entries, inputs)?,
        table_stride: table.stride_row,
        table_width: table.width,
        num_reqs: batch.num_reqs(),
        total_q: batch.total_q(),
        num_pages: batch.k().num_pages,
    };
    inputs.push(pools);
    Ok(made)
}

/// The caller's verdict, in memory for the largest step's.
fn upload_external(
    context: &Context,
    layout: &Layout,
    step: &run::Step,
    inputs: &mut Vec<DeviceBuffer>,
) -> Result<Option<External>> {
    let given = step.external.filter(|_| layout.settings.selector == crate::settings::Selector::External);
    let sizes = Sizes::of(layout, 1)?;
    Ok(match given {
        None => None,
        Some(run::External::Scores(x)) => {
            Some(External::Scores(keep_padded(context, x, sizes.scores, inputs)?))
        }
        Some(run::External::Masks(x)) => Some(External::Masks(keep_padded(context, x, sizes.masks, inputs)?)),
    })
}

/// Uploads `x`, whose buffer joins `inputs`; its address.
fn keep<T: NoUninit>(context: &Context, x: &[T], inputs: &mut Vec<DeviceBuffer>) -> Result<u64> {
    keep_padded(context, x, x.len(), inputs)
}

/// [`keep`] in a buffer of at least `len` elements.
fn keep_padded<T: NoUninit>(
    context: &Context,
    x: &[T],
    len: usize,
    inputs: &mut Vec<DeviceBuffer>,
) -> Result<u64> {
    let mut buffer = context.alloc(len.max(x.len()) * size_of::<T>())?;
    buffer.upload(0, x)?;
    let address = buffer.address();
    inputs.push(buffer);
    Ok(address)
}

/// Where K and V go in one buffer, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Places {
    k: usize,
    v: usize,
    len: usize,
}

impl Places {
    /// As they lie to one another where they interleave, so that shared bytes are there once; else one after the other.
    fn of(k: &[u8], v: &[u8]) -> Self {
        let (k_at, v_at) = (k.as_ptr().addr(), v.as_ptr().addr());
        let low = k_at.min(v_at);
        let places = Self { k: k_at - low, v: v_at - low, len: (k_at + k.len()).max(v_at + v.len()) - low };
        let apart = places.len > k.len() + v.len();
        if apart || !(places.k + places.v).is_multiple_of(VECTOR_BYTES) {
            let v_at = k.len().next_multiple_of(Sizes::ALIGNMENT);
            return Self { k: 0, v: v_at, len: v_at + v.len() };
        }
        places
    }
}

fn bytes<'a>(elements: &Elements<'a>) -> &'a [u8] {
    match elements {
        Elements::Bf16(x) => bytemuck::cast_slice(x),
        Elements::F16(x) => bytemuck::cast_slice(x),
        Elements::F32(x) => bytemuck::cast_slice(x),
        Elements::E4m3(x) => x,
    }
}

/// A pool's scales; 0 where it has none.
fn keep_scales(context: &Context, pool: &Pool, inputs: &mut Vec<DeviceBuffer>) -> Result<u64> {
    if pool.scales.is_empty() { Ok(0) } else { keep(context, pool.scales, inputs) }
}

/// Kernels move 16 bytes at a time.
fn check_strides(batch: &Batch) -> Result<()> {
    let (shape, q) = (batch.shape(), batch.q());
    let of = |name, pool: &Pool| {
        let bytes = |stride: usize| stride * shape.kv_dtype.size_bytes();
        [
            (name, pool.num_pages, bytes(pool.stride_page)),
            (name, shape.page_size, bytes(pool.stride_token)),
            (name, shape.num_kv_heads, bytes(pool.stride_head)),
        ]
    };
    let size = shape.dtype.size_bytes();
    let queries =
        [("q", batch.total_q(), q.stride_token * size), ("q", shape.num_q_heads, q.stride_head * size)];
    let all = queries.into_iter().chain(of("k", batch.k())).chain(of("v", batch.v()));
    let wrong =
        all.filter(|&(_, count, _)| count > 1).find(|(_, _, bytes)| !bytes.is_multiple_of(VECTOR_BYTES));
    wrong.map_or(Ok(()), |(name, _, bytes)| {
        let wanted = format!("strides of a multiple of {VECTOR_BYTES} bytes");
        Err(Error::new(Status::Align, name, wanted, format!("{bytes} bytes")))
    })
}

/// What kernels load at once.
const VECTOR_BYTES: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_pools_keep_their_places_and_others_follow_each_other() {
        let memory = [0_u8; 1024];
        // One page: K, then V; the extents of both run over all pages, so they overlap.
        assert_eq!(Places::of(&memory[..768], &memory[256..]), Places { k: 0, v: 256, len: 1024 });
        assert_eq!(Places::of(&memory[256..], &memory[..768]), Places { k: 256, v: 0, len: 1024 });
        assert_eq!(Places::of(&memory[..512], &memory[512..]), Places { k: 0, v: 512, len: 1024 });
        // Far apart, or not a whole number of vectors apart.
        assert_eq!(Places::of(&memory[..100], &memory[800..]), Places { k: 0, v: 256, len: 480 });
        assert_eq!(Places::of(&memory[..1016], &memory[8..]), Places { k: 0, v: 1024, len: 2040 });
    }
}
