//! `compactattn_batch` to views, and, once all views are known to be apart, to slices.

use std::ffi::c_void;

use super::check::check;
use super::objects::PlanObject;
use super::read::input;
use super::structs::compactattn_tensor;
use super::structs_step::compactattn_batch;
use super::tensor::{Device, Dim, View, Wanted, is_none};
use super::views::q_like;
use crate::batch::{Batch, BatchParts, BlockTable};
use crate::error::{Error, Result, Status};
use crate::plan::Layout;
use crate::tensor::{Pool, Tokens};
use crate::types::{Dtype, Shape};

/// A batch whose tensors fit the plan, not yet read.
#[derive(Clone, Copy, Debug)]
pub(super) struct BatchViews {
    /// q, k, v, cu_seqlens_q, seq_lens, block_table: what outputs must stay apart from.
    pub(super) views: [View; 6],
    /// Scales of k and of v.
    pub(super) scales: [Option<View>; 2],
    /// Query tokens.
    pub(super) total_q: usize,
    /// Pages of the pool.
    pub(super) num_pages: usize,
    /// For stages called by themselves on a GPU: stream, workspace and its bytes.
    pub(super) place: (*mut c_void, *mut c_void, i64),
}

impl BatchViews {
    /// Checks every tensor of the batch.
    ///
    /// # Safety
    /// `from`: NULL, or readable for its `struct_size` bytes.
    pub(super) unsafe fn read(
        plan: &PlanObject,
        layout: &Layout,
        from: *const compactattn_batch,
    ) -> Result<Self> {
        // SAFETY: this function's contract.
        let c = unsafe { input("batch", from) }?;
        let device = plan.context.device;
        let ints = |name, dims| Wanted::rows(name, Dtype::I32, dims, device);
        let q = check(&c.q, &q_like("batch.q", &layout.shape, Dim::Any, device))?;
        let k = check(&c.k, &pool("batch.k", &layout.shape, Dim::Any, device))?;
        let pages = Dim::Is(k.shape[0], "num_pages of batch.k");
        let v = check(&c.v, &pool("batch.v", &layout.shape, pages, device))?;
        let seq_lens = check(&c.seq_lens, &ints("batch.seq_lens", vec![Dim::Any]))?;
        let num_reqs = seq_lens.shape[0];
        let dims = vec![Dim::Is(num_reqs + 1, "num_reqs + 1")];
        let cu_seqlens_q = check(&c.cu_seqlens_q, &ints("batch.cu_seqlens_q", dims))?;
        let dims = vec![Dim::Is(num_reqs, "num_reqs"), Dim::Any];
        let block_table = check(&c.block_table, &ints("batch.block_table", dims))?;
        check_box_ids(layout, k.shape[0])?;
        let views = [q, k, v, cu_seqlens_q, seq_lens, block_table];
        let scales = [
            scale("batch.k_scale", &c.k_scale, &layout.shape, device)?,
            scale("batch.v_scale", &c.v_scale, &layout.shape, device)?,
        ];
        let place = (c.stream, c.workspace, c.workspace_bytes);
        Ok(Self { views, scales, total_q: q.shape[0], num_pages: k.shape[0], place })
    }

    /// Every tensor of the batch.
    pub(super) fn tensors(&self) -> Vec<View> {
        self.views.into_iter().chain(self.scales.into_iter().flatten()).collect()
    }

    /// Whether there is nothing to compute.
    pub(super) fn is_empty(&self) -> bool {
        self.total_q == 0
    }

    /// Reads and checks lengths and tables.
    ///
    /// # Safety
    /// The caller of the C function vouches for every tensor; nothing is written to them during `'a`.
    pub(super) unsafe fn open<'a>(&self, plan: &PlanObject, layer: i32) -> Result<Batch<'a>> {
        let [q, k, v, cu_seqlens_q, seq_lens, block_table] = &self.views;
        let stride_row = if block_table.shape[0] > 1 { block_table.stride[0] } else { block_table.shape[1] };
        let parts = BatchParts {
            q: Tokens {
                // SAFETY: this function's contract; the dtype is a floating-point one.
                elements: unsafe { q.elements() },
                stride_token: q.stride[0],
                stride_head: q.stride[1],
            },
            // SAFETY: this function's contract.
            k: unsafe { open_pool(k, self.scales[0]) },
            // SAFETY: this function's contract.
            v: unsafe { open_pool(v, self.scales[1]) },
            // SAFETY: this function's contract; the dtype is i32.
            cu_seqlens_q: unsafe { cu_seqlens_q.slice() },
            // SAFETY: as above.
            seq_lens: unsafe { seq_lens.slice() },
            block_table: BlockTable {
                // SAFETY: as above.
                entries: unsafe { block_table.slice() },
                stride_row,
                width: block_table.shape[1],
            },
            total_q: self.total_q,
        };
        let layer = plan.layer(layer)?;
        let batch = Batch::new(plan.plan.layout(layer)?.shape, parts)?;
        plan.plan.admit(layer, &batch)?;
        Ok(batch)
    }
}

/// A pool's slices.
///
/// # Safety
/// As [`BatchViews::open`].
unsafe fn open_pool<'a>(view: &View, scales: Option<View>) -> Pool<'a> {
    let [stride_page, stride_token, stride_head, _] = view.stride;
    // SAFETY: this function's contract; the dtype is a floating-point one.
    let elements = unsafe { view.elements() };
    // SAFETY: this function's contract; the dtype is f32.
    let scales = scales.map_or(&[][..], |scales| unsafe { scales.slice() });
    Pool { elements, num_pages: view.shape[0], stride_page, stride_token, stride_head, scales }
}

/// K or V.
fn pool(name: &'static str, shape: &Shape, pages: Dim, device: Device) -> Wanted {
    let dims = vec![
        pages,
        Dim::Is(shape.page_size, "page_size"),
        Dim::Is(shape.num_kv_heads, "num_kv_heads"),
        Dim::Is(shape.head_dim, "head_dim"),
    ];
    Wanted::vectors(name, shape.kv_dtype, dims, device)
}

/// One scale or one for each KV head, of e4m3 pools only.
fn scale(
    name: &'static str,
    from: &compactattn_tensor,
    shape: &Shape,
    device: Device,
) -> Result<Option<View>> {
    if is_none(from) {
        return Ok(None);
    }
    if shape.kv_dtype != Dtype::E4m3 {
        let wanted = format!("none, for a KV cache of {}", shape.kv_dtype.name());
        return Err(Error::new(Status::Dtype, name, wanted, "a tensor"));
    }
    let one = from.ndim == 1 && from.shape[0] == 1;
    let dim = if one { Dim::Any } else { Dim::Is(shape.num_kv_heads, "num_kv_heads; or 1") };
    check(from, &Wanted::dense(name, Dtype::F32, vec![dim], device)).map(Some)
}

/// Every box of the pool must have an int32 id.
fn check_box_ids(layout: &Layout, num_pages: usize) -> Result<()> {
    let per_page = layout.geometry.boxes_per_page();
    let most = (1 << 31) / per_page;
    if num_pages <= most {
        return Ok(());
    }
    let wanted = format!("at most {most} pages ({per_page} boxes each, int32 ids)");
    Err(Error::new(Status::Overflow, "batch.k.shape[0]", wanted, num_pages))
}
