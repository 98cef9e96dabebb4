//! A step's tensors on the device: addresses, extents and strides, checked by the border. What they hold is checked
//! on the device, by the first stage.

use super::params;

/// `[tokens, heads, head_dim]`, the last dimension contiguous.
#[derive(Clone, Copy, Debug)]
pub struct DeviceTokens {
    /// Of the first element; 16-byte aligned.
    pub address: u64,
    /// Elements; a multiple of 8.
    pub stride_token: usize,
    /// Elements; a multiple of 8.
    pub stride_head: usize,
}

/// `[num_pages, page_size, num_kv_heads, head_dim]`, the last dimension contiguous.
#[derive(Clone, Copy, Debug)]
pub struct DevicePool {
    /// Of the first element; 16-byte aligned.
    pub address: u64,
    /// Elements; a multiple of 8, as all strides here.
    pub stride_page: usize,
    /// Elements.
    pub stride_token: usize,
    /// Elements.
    pub stride_head: usize,
    /// Of an e4m3 pool: what stored values are multiplied by, f32; 0 = nothing.
    pub scale: u64,
    /// From a KV head's scale to the next, 0 or 1: one for all, or one for each.
    pub stride_scale: usize,
}

/// One step's requests, in device memory.
#[derive(Clone, Copy, Debug)]
pub struct DeviceBatch {
    /// `[total_q, num_q_heads, head_dim]`.
    pub q: DeviceTokens,
    /// Keys.
    pub k: DevicePool,
    /// Values.
    pub v: DevicePool,
    /// `[num_reqs + 1]` int32.
    pub cu_seqlens_q: u64,
    /// `[num_reqs]` int32.
    pub seq_lens: u64,
    /// `[num_reqs, table_width]` int32.
    pub block_table: u64,
    /// From a row of the block table to the next, in entries.
    pub table_stride: usize,
    /// Entries of a row.
    pub table_width: usize,
    /// Requests, those without queries among them.
    pub num_reqs: usize,
    /// Query tokens of `q`.
    pub total_q: usize,
    /// Pages of the pools.
    pub num_pages: usize,
}

impl DeviceBatch {
    /// As kernels take it.
    pub(crate) fn params(&self) -> params::Batch {
        params::Batch {
            q: self.q.address,
            k: self.k.address,
            v: self.v.address,
            cu_seqlens_q: self.cu_seqlens_q,
            seq_lens: self.seq_lens,
            block_table: self.block_table,
            q_token_stride: int64(self.q.stride_token),
            q_head_stride: int64(self.q.stride_head),
            k_page_stride: int64(self.k.stride_page),
            k_token_stride: int64(self.k.stride_token),
            k_head_stride: int64(self.k.stride_head),
            v_page_stride: int64(self.v.stride_page),
            v_token_stride: int64(self.v.stride_token),
            v_head_stride: int64(self.v.stride_head),
            table_stride: int64(self.table_stride),
            table_width: int32(self.table_width),
            num_reqs: int32(self.num_reqs),
            total_q: int32(self.total_q),
            num_pages: int32(self.num_pages),
            k_scale: self.k.scale,
            v_scale: self.v.scale,
            k_scale_stride: int32(self.k.stride_scale),
            v_scale_stride: int32(self.v.stride_scale),
        }
    }
}

/// A count that the plan's limits or the border keep below 2^31; more saturates.
pub(crate) fn int32(x: usize) -> i32 {
    i32::try_from(x).unwrap_or(i32::MAX)
}

/// A stride that the border keeps below 2^63.
pub(super) fn int64(x: usize) -> i64 {
    i64::try_from(x).unwrap_or(i64::MAX)
}
