//! Two results over disjoint KV to the result over both, on the GPU.

use std::ffi::c_void;

use super::attend::DeviceOutput;
use super::batch::{DeviceTokens, int32, int64};
use super::kernels::{Arg, Grid};
use super::plan::Plan;
use crate::error::Result;
use crate::stage::Stage;
use crate::types::{Dtype, Shape};

/// One side in device memory: rows of `[total_q, num_q_heads, head_dim]` and `lse [num_q_heads, total_q]`.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSide {
    /// The rows.
    pub out: DeviceTokens,
    /// f32, natural logarithm.
    pub lse: u64,
    /// From a head of `lse` to the next; a token follows the one before.
    pub lse_stride_head: usize,
}

impl Plan {
    /// Writes the union of `a` and `b`, `total_q` tokens of the plan's `shape`, into `output`.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// Each address is memory of this GPU with the extent its field says, `output` apart from both sides; `stream` is
    /// one of this GPU's. All of it stays alive until the stream has passed the call.
    pub unsafe fn merge(
        &self,
        (shape, total_q): (&Shape, usize),
        (a, b): (&DeviceSide, &DeviceSide),
        output: &DeviceOutput,
        stream: *mut c_void,
    ) -> Result<()> {
        let params = MergeParams {
            a: side(a),
            b: side(b),
            out: output.out.address,
            lse: output.lse,
            out_token_stride: int64(output.out.stride_token),
            out_head_stride: int64(output.out.stride_head),
            lse_head_stride: int64(output.lse_stride_head),
            total_q: int32(total_q),
            num_q_heads: int32(shape.num_q_heads),
            head_dim: int32(shape.head_dim),
            reserved: 0,
        };
        let context = self.context();
        // SAFETY: this function's contract.
        let stream = unsafe { context.stream(stream) }?;
        let entered = context.enter()?;
        let name =
            if shape.dtype == Dtype::Bf16 { "compactattn_merge_bf16" } else { "compactattn_merge_fp16" };
        let vectors = total_q.saturating_mul(shape.num_q_heads * shape.head_dim / VECTOR);
        let blocks = [int32(vectors.div_ceil(THREADS)).cast_unsigned(), 1, 1];
        let grid = Grid { blocks, threads: 256, shared_bytes: 0 };
        Stage::Combine.run(|| context.kernels().launch(stream, name, grid, &[Arg::of(&params)]))?;
        drop(entered);
        Ok(())
    }
}

fn side(from: &DeviceSide) -> MergeSide {
    MergeSide {
        out: from.out.address,
        lse: from.lse,
        out_token_stride: int64(from.out.stride_token),
        out_head_stride: int64(from.out.stride_head),
        lse_head_stride: int64(from.lse_stride_head),
    }
}

/// As cuda/combine/merge.h.
#[derive(Clone, Copy)]
#[repr(C)]
struct MergeSide {
    out: u64,
    lse: u64,
    out_token_stride: i64,
    out_head_stride: i64,
    lse_head_stride: i64,
}

/// As cuda/combine/merge.h.
#[derive(Clone, Copy)]
#[repr(C)]
struct MergeParams {
    a: MergeSide,
    b: MergeSide,
    out: u64,
    lse: u64,
    out_token_stride: i64,
    out_head_stride: i64,
    lse_head_stride: i64,
    total_q: i32,
    num_q_heads: i32,
    head_dim: i32,
    reserved: i32,
}

const _: () = assert!(size_of::<MergeSide>() == 40 && size_of::<MergeParams>() == 136);

/// Elements that a thread takes at once.
const VECTOR: usize = 8;
const THREADS: usize = 256;
