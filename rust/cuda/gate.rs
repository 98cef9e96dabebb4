//! The weights of selector `attn_gate` in device memory.

use super::batch::int32;
use super::context::Context;
use super::memory::DeviceBuffer;
use super::shared::GateShape;
use crate::error::Result;
use crate::select::{GateLayer, Pairing};

/// As cuda/select/gate.h; f32 device memory.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct GateParams {
    k: u64,
    q: u64,
    inv_freq: u64,
    gate_inv_freq: u64,
    rope_scale: f32,
    interleaved: i32,
    k_heads: i32,
    pub(crate) gate_dim: i32,
    pub(crate) by_group: i32,
    reserved: i32,
}

const _: () = assert!(size_of::<GateParams>() == 56);

/// One layer's gate, uploaded.
#[derive(Debug)]
pub(crate) struct DeviceGate {
    weights: DeviceBuffer,
    params: GateParams,
}

impl DeviceGate {
    /// Uploads a gate and waits.
    ///
    /// # Errors
    /// [`Status::OutOfMemory`](crate::Status::OutOfMemory) and others of the driver.
    pub(crate) fn new(context: &Context, gate: &GateLayer) -> Result<Self> {
        let (k, q, rope) = (gate.k_weights(), gate.q_weights(), gate.rope());
        let own = rope.gate_inv_freq.as_deref();
        let parts = [k, q.unwrap_or(&[]), &rope.inv_freq, own.unwrap_or(&[])];
        let mut weights = context.alloc(parts.iter().map(|part| size_of_val(*part)).sum())?;
        let mut at = 0;
        let mut addresses = [0_u64; 4];
        for (part, address) in parts.iter().zip(&mut addresses) {
            weights.upload(at, part)?;
            *address = weights.address() + at as u64;
            at += size_of_val(*part);
        }
        let params = GateParams {
            k: addresses[0],
            q: q.map_or(0, |_| addresses[1]),
            inv_freq: addresses[2],
            gate_inv_freq: own.map_or(addresses[2], |_| addresses[3]),
            rope_scale: rope.scale,
            interleaved: i32::from(rope.pairing == Pairing::Interleaved),
            k_heads: int32(gate.k_heads()),
            gate_dim: int32(gate.gate_dim()),
            by_group: i32::from(gate.is_by_group()),
            reserved: 0,
        };
        Ok(Self { weights, params })
    }

    /// Elements of the gate keys of one block.
    pub(crate) fn len(&self) -> usize {
        (self.params.k_heads * self.params.gate_dim).unsigned_abs() as usize
    }

    /// What of it decides how much shared memory scoring takes.
    pub(crate) fn shape(&self) -> GateShape {
        let gate_dim = self.params.gate_dim.unsigned_abs() as usize;
        GateShape { gate_dim, by_group: self.params.by_group == 1 }
    }

    /// As kernels take it; good while this lives.
    pub(crate) fn params(&self) -> GateParams {
        debug_assert_eq!(self.params.k, self.weights.address());
        self.params
    }
}
