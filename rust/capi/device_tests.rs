//! Tests of GPU calls through the C ABI on the fake driver.

#![expect(clippy::cast_possible_truncation, reason = "addresses of this process, sizes of structs")]

use std::sync::Arc;

use super::super::api_attend::compactattn_forward;
use super::super::api_plan::compactattn_plan_destroy;
use super::super::guard::last_error;
use super::super::handle::{self, Object};
use super::super::objects::{Context, PlanObject};
use super::super::structs::{
    compactattn_device_kind, compactattn_dtype, compactattn_plan, compactattn_tensor,
};
use super::super::structs_step::{compactattn_batch, compactattn_forward_args};
use super::super::tensor::Device;
use crate::capi::compactattn_status;
use crate::cuda::fake::{self, Fake};
use crate::fixture;
use crate::parallel::Parallel;
use crate::plan::Limits;
use crate::run::PlanDesc;
use crate::settings::{Selector, Settings};
use crate::types::Dtype;

const CUDA: i32 = compactattn_device_kind::COMPACTATTN_DEVICE_CUDA as i32;

#[test]
fn a_bad_workspace_is_refused_before_anything_runs_and_an_empty_pool_is_served() {
    let fake = Fake::in_mode("");
    let gpu = fake::context(&fake);
    let device = Device { kind: CUDA, ordinal: 0 };
    let context = Context { device, parallel: Parallel::new(1), cuda: Some(Arc::clone(&gpu)) };
    let plan = Arc::new(PlanObject::new(Arc::new(context), &desc()).unwrap());
    let needed = plan.most_workspace_bytes().unwrap();
    let handle = handle::insert(Object::Plan(plan)).unwrap().cast::<compactattn_plan>();
    let (memory, workspace) = (gpu.alloc(1 << 20).unwrap(), gpu.alloc(needed + 256).unwrap());
    let at = |offset: u64| std::ptr::without_provenance_mut((memory.address() + offset) as usize);
    let batch = batch(&at);
    let forward = |skip: u64, bytes: usize, batch: &compactattn_batch| {
        let args = compactattn_forward_args {
            struct_size: size_of::<compactattn_forward_args>() as u32,
            layer: 0,
            batch,
            summaries: std::ptr::null(),
            external: std::ptr::null(),
            settings: std::ptr::null(),
            out: tensor(at(1 << 19), compactattn_dtype::COMPACTATTN_DTYPE_BF16, &[16, 8, 128]),
            lse: NONE,
            workspace: std::ptr::without_provenance_mut((workspace.address() + skip) as usize),
            workspace_bytes: bytes as i64,
            stream: std::ptr::null_mut(),
        };
        // SAFETY: every pointer is a local's or memory of the fake driver.
        unsafe { compactattn_forward(handle, &raw const args) }
    };
    for (skip, bytes) in [(0, needed - 1), (0, 0), (8, needed)] {
        assert_eq!(
            forward(skip, bytes, &batch),
            compactattn_status::COMPACTATTN_E_WORKSPACE,
            "{skip} {bytes}"
        );
    }
    assert!(fake.launches().is_empty());
    assert_eq!(forward(0, needed, &batch), compactattn_status::COMPACTATTN_OK);
    assert!(!fake.launches().is_empty());
    // A pool of no pages, which the driver makes no map of: requests may be there before their KV.
    let [k, v] = [batch.k, batch.v].map(|pool| compactattn_tensor {
        shape: [0, 16, 2, 128],
        storage_bytes: 0,
        ..pool
    });
    let without_pages = compactattn_batch { k, v, ..batch };
    assert_eq!(forward(0, needed, &without_pages), compactattn_status::COMPACTATTN_OK, "{}", last_error());
    assert_eq!(compactattn_plan_destroy(handle), compactattn_status::COMPACTATTN_OK);
}

fn desc() -> PlanDesc {
    let limits = Limits { max_num_reqs: 1, max_total_q: 64, max_kv_len: 1024 };
    let shape = fixture::shape(2, 4, 128, 16, Dtype::Bf16);
    PlanDesc { shape, limits, layers: vec![Settings::of(Selector::SampledExact)], splits: 0, gate: None }
}

/// One request of 16 query tokens.
fn batch(at: &impl Fn(u64) -> *mut std::ffi::c_void) -> compactattn_batch {
    let (bf16, i32) = (compactattn_dtype::COMPACTATTN_DTYPE_BF16, compactattn_dtype::COMPACTATTN_DTYPE_I32);
    compactattn_batch {
        struct_size: size_of::<compactattn_batch>() as u32,
        reserved: 0,
        q: tensor(at(0), bf16, &[16, 8, 128]),
        k: tensor(at(1 << 16), bf16, &[4, 16, 2, 128]),
        v: tensor(at(1 << 17), bf16, &[4, 16, 2, 128]),
        cu_seqlens_q: tensor(at(1 << 18), i32, &[2]),
        seq_lens: tensor(at((1 << 18) + 256), i32, &[1]),
        block_table: tensor(at((1 << 18) + 512), i32, &[1, 4]),
        stream: std::ptr::null_mut(),
        workspace: std::ptr::null_mut(),
        workspace_bytes: 0,
        k_scale: NONE,
        v_scale: NONE,
    }
}

const NONE: compactattn_tensor = compactattn_tensor {
    data: std::ptr::null_mut(),
    shape: [0; 4],
    stride: [0; 4],
    storage_bytes: 0,
    dtype: 0,
    ndim: 0,
    device_kind: 0,
    device_ordinal: 0,
};

/// A contiguous one.
fn tensor(data: *mut std::ffi::c_void, dtype: compactattn_dtype, shape: &[i64]) -> compactattn_tensor {
    let bytes = if dtype == compactattn_dtype::COMPACTATTN_DTYPE_I32 { 4 } else { 2 };
    let mut tensor = compactattn_tensor {
        data,
        storage_bytes: bytes * shape.iter().product::<i64>(),
        dtype: dtype as i32,
        ndim: shape.len() as i32,
        device_kind: CUDA,
        ..NONE
    };
    for i in 0..shape.len() {
        tensor.shape[i] = shape[i];
        tensor.stride[i] = shape[i + 1..].iter().product();
    }
    tensor
}
