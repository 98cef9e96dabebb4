//! What handles stand for, and how a panic inside one closes it.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::structs::compactattn_device_kind;
use super::tensor::Device;
use crate::config;
use crate::cuda;
use crate::error::{Error, Result, Status};
use crate::parallel::Parallel;
use crate::plan::Layout;
use crate::run::{Plan, PlanDesc};
use crate::stats::Stats;
use crate::workspace::Sizes;

/// One device.
#[derive(Debug)]
pub(super) struct Context {
    /// Where its tensors lie.
    pub(super) device: Device,
    /// Threads of a call.
    pub(super) parallel: Parallel,
    /// The GPU, where it is one.
    pub(super) cuda: Option<Arc<cuda::Context>>,
}

impl Context {
    /// The CPU with that many threads; 0 = all cores.
    pub(super) fn cpu(threads: usize) -> Self {
        let device = Device { kind: compactattn_device_kind::COMPACTATTN_DEVICE_CPU as i32, ordinal: 0 };
        Self { device, parallel: Parallel::new(threads), cuda: None }
    }

    /// A GPU with all its kernels loaded.
    pub(super) fn cuda(ordinal: usize) -> Result<Self> {
        let cuda = Arc::new(cuda::Context::open(ordinal)?);
        let kind = compactattn_device_kind::COMPACTATTN_DEVICE_CUDA as i32;
        let device = Device { kind, ordinal: i32::try_from(ordinal).unwrap_or(i32::MAX) };
        Ok(Self { device, parallel: Parallel::new(1), cuda: Some(cuda) })
    }
}

/// A plan and the context it lives on.
#[derive(Debug)]
pub(super) struct PlanObject {
    /// Kept alive by its plans.
    pub(super) context: Arc<Context>,
    /// The plan.
    pub(super) plan: Plan,
    /// Its device side on a GPU.
    pub(super) cuda: Option<cuda::Plan>,
    poisoned: AtomicBool,
}

impl PlanObject {
    /// What `desc` asks for, on `context`.
    pub(super) fn new(context: Arc<Context>, desc: &PlanDesc) -> Result<Self> {
        let plan = Plan::new(desc, context.parallel)?.checked(config::check()?);
        let on_gpu = |gpu: &Arc<cuda::Context>| cuda::Plan::new(gpu.clone(), &plan, desc.splits);
        let cuda = context.cuda.as_ref().map(on_gpu).transpose()?;
        Ok(Self { context, plan, cuda, poisoned: AtomicBool::new(false) })
    }

    /// Bytes of workspace that a call of layer `layer` under `layout` needs.
    pub(super) fn workspace_bytes(&self, layer: usize, layout: &Layout) -> Result<usize> {
        match &self.cuda {
            Some(cuda) => cuda.workspace_bytes(layer, layout),
            None => Sizes::of(layout, self.plan.splits()).map(|sizes| sizes.workspace_bytes),
        }
    }

    /// Bytes of workspace that a call under any of the plan's own settings needs.
    pub(super) fn most_workspace_bytes(&self) -> Result<usize> {
        let layers =
            (0..self.plan.num_layers()).map(|layer| self.workspace_bytes(layer, self.plan.layout(layer)?));
        layers.collect::<Result<Vec<_>>>().map(|bytes| bytes.into_iter().max().unwrap_or(0))
    }

    /// What a layer has selected so far.
    pub(super) fn stats(&self, layer: usize) -> Result<Stats> {
        let on_cpu = self.plan.stats(layer)?;
        Ok(self.cuda.as_ref().map_or(on_cpu, |cuda| cuda.stats(layer)))
    }

    /// Runs `body`, unless an earlier one panicked: what it left in the caller's memory is unknown.
    pub(super) fn run(&self, body: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        if self.poisoned.load(Ordering::Acquire) {
            let text = "plan: an earlier call on it panicked; destroy it";
            return Err(Error::plain(Status::Panic, text));
        }
        catch_unwind(AssertUnwindSafe(|| body(self))).unwrap_or_else(|payload| {
            self.poisoned.store(true, Ordering::Release);
            resume_unwind(payload)
        })
    }

    /// The layer's layout.
    pub(super) fn layout(&self, layer: i32) -> Result<&Layout> {
        self.plan.layout(self.layer(layer)?)
    }

    /// The layer as an index the plan has.
    pub(super) fn layer(&self, layer: i32) -> Result<usize> {
        let found = usize::try_from(layer).ok().filter(|&x| x < self.plan.num_layers());
        let wanted = || format!("0..{}, the plan's layers", self.plan.num_layers());
        found.ok_or_else(|| Error::new(Status::Value, "layer", wanted(), layer))
    }

    /// Refuses a stream where there can be none; a GPU's plan checks its streams itself.
    pub(super) fn check_stream(&self, stream: *mut std::ffi::c_void) -> Result<()> {
        if stream.is_null() || self.cuda.is_some() {
            return Ok(());
        }
        Err(Error::new(Status::Stream, "args.stream", "NULL on a CPU context", "a stream"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capi::guard::guard;
    use crate::capi::status::compactattn_status;
    use crate::plan::Limits;
    use crate::settings::{Selector, Settings};
    use crate::types::{Dtype, Shape};

    #[test]
    fn a_plan_that_panicked_refuses_to_work_on() {
        let shape = Shape {
            num_q_heads: 1,
            num_kv_heads: 1,
            head_dim: 64,
            page_size: 16,
            dtype: Dtype::F32,
            kv_dtype: Dtype::F32,
            sm_scale: 0.125,
        };
        let limits = Limits { max_num_reqs: 1, max_total_q: 1, max_kv_len: 1 };
        let desc =
            PlanDesc { shape, limits, layers: vec![Settings::of(Selector::Dense)], splits: 1, gate: None };
        let context = Arc::new(Context::cpu(1));
        let plan = PlanObject::new(context, &desc).unwrap();
        assert_eq!(guard(|| plan.run(|_| Ok(()))), compactattn_status::COMPACTATTN_OK);
        assert_eq!(guard(|| plan.run(|_| panic!("on purpose"))), compactattn_status::COMPACTATTN_E_PANIC);
        assert_eq!(guard(|| plan.run(|_| Ok(()))), compactattn_status::COMPACTATTN_E_PANIC);
    }
}
