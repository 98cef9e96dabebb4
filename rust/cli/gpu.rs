//! The GPU as far as a run uses it: whether there is one, why not, and one prepared layer's forward pass on it.

use std::sync::Arc;

use compactattn::cuda::{Context, OwnedCall};
use compactattn::run::{External, Plan, Step};
use compactattn::settings::Settings;
use compactattn::{Error, Result, Status};

use crate::forward::{self, Forward};
use crate::host;
use crate::prefill::Prefill;
use crate::stages::{Timed, timed};
use crate::trace::{Data, Tensor};

/// Where the caller wants the work done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Device {
    /// The GPU where there is one that serves the trace, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU, or an error that says why not.
    Cuda,
}

/// Which path runs.
#[derive(Clone, Debug)]
pub(crate) enum Path {
    /// The GPU's.
    Cuda(Gpu),
    /// The CPU's, and why.
    Cpu(String),
}

/// A GPU with the kernels of this build.
#[derive(Clone, Debug)]
pub(crate) struct Gpu {
    context: Arc<Context>,
    /// What attends a layer such as the one it was chosen for.
    kernel: &'static str,
}

/// A forward pass on the GPU.
#[derive(Debug)]
pub(crate) struct Ran {
    /// Results; statistics are of one pass.
    pub(crate) forward: Forward,
    /// The lists that it attended to: `[list spans, lists per span, mask_words]`.
    pub(crate) lists: Vec<u32>,
    /// Select to combine, mean of [`PASSES`] after one to warm up.
    pub(crate) ms: f64,
}

impl Path {
    /// The path of `prefill` under `settings`: a fallback to the CPU is never silent, [`Path::line`] has its reason.
    ///
    /// # Errors
    /// With [`Device::Cuda`] the reason why there is no GPU, or why it does not serve such a layer.
    pub(crate) fn choose(device: Device, prefill: &Prefill, settings: &Settings) -> Result<Self> {
        if device == Device::Cpu {
            return Ok(Self::Cpu("--device cpu".to_owned()));
        }
        let opened = Context::open(0).map(Arc::new);
        let (why, found) = match opened {
            Ok(context) => ("not on the GPU", Gpu::on(context).serve(prefill, settings)),
            Err(error) => ("no GPU", Err(error)),
        };
        match found {
            Ok(gpu) => Ok(Self::Cuda(gpu)),
            Err(error) if device == Device::Auto => Ok(Self::Cpu(format!("{why}: {error}"))),
            Err(error) => Err(error),
        }
    }

    /// One line: which path, on what, and why if it is the CPU.
    pub(crate) fn line(&self, prefill: &Prefill) -> String {
        match self {
            Self::Cuda(gpu) => format!("path: CUDA, {}, {}", describe(&gpu.context), gpu.kernel),
            Self::Cpu(reason) => format!("path: CPU, {} ({reason})", host::processors(prefill.parallel)),
        }
    }

    /// The GPU, if that is the path.
    pub(crate) fn gpu(&self) -> Option<&Gpu> {
        match self {
            Self::Cuda(gpu) => Some(gpu),
            Self::Cpu(_) => None,
        }
    }

    /// The library's own forward pass on this path.
    ///
    /// # Errors
    /// Those of [`forward::forward`] or [`Gpu::forward`].
    pub(crate) fn forward(&self, prefill: &Prefill, settings: &Settings) -> Result<Timed<Forward>> {
        match self {
            Self::Cpu(_) => forward::forward(prefill, settings),
            Self::Cuda(gpu) => {
                let ran = gpu.forward(prefill, settings, None)?;
                Ok(Timed { value: ran.forward, ms: ran.ms })
            }
        }
    }
}

impl Gpu {
    /// On a context that is open.
    pub(crate) fn on(context: Arc<Context>) -> Self {
        Self { context, kernel: "" }
    }

    /// For such a layer, if it is offered.
    fn serve(self, prefill: &Prefill, settings: &Settings) -> Result<Self> {
        let kernel = self.call(prefill, settings, None)?.kernel()?;
        Ok(Self { kernel, ..self })
    }

    /// The forward pass of a layer, `masks` being the verdict for selector `external`.
    ///
    /// # Errors
    /// [`Status::Unsupported`] for what CUDA does not offer; those of [`OwnedCall`].
    pub(crate) fn forward(
        &self,
        prefill: &Prefill,
        settings: &Settings,
        masks: Option<&[u32]>,
    ) -> Result<Ran> {
        let mut call = self.call(prefill, settings, masks)?;
        let shape = prefill.shape;
        let dims = [prefill.q_len(), shape.num_q_heads, shape.head_dim];
        let mut out = Data::filled(shape.dtype, dims.iter().product(), f32::NAN);
        let mut lse = vec![f32::NAN; shape.num_q_heads * prefill.q_len()];
        call.run(1)?;
        let stats = call.stats();
        if stats.counts.refused > 0 {
            return Err(Error::plain(Status::Internal, "the GPU refused a request that the CPU admits"));
        }
        let passes = timed(|| call.run(PASSES))?;
        call.out(&mut out.elements_mut())?;
        call.lse(&mut lse)?;
        let forward = Forward { out: Tensor { dims, data: out }, lse, stats };
        Ok(Ran { forward, lists: call.lists()?, ms: passes.ms / PASSES as f64 })
    }

    fn call(&self, prefill: &Prefill, settings: &Settings, masks: Option<&[u32]>) -> Result<OwnedCall> {
        let (desc, layer) = forward::desc(prefill, settings);
        let plan = Plan::new(&desc, prefill.parallel)?;
        let step = Step { layer, external: masks.map(External::Masks), ..Step::default() };
        OwnedCall::new(&self.context, &plan, &prefill.batch()?, &step)
    }
}

/// Name, processors and driver of a GPU.
pub(crate) fn describe(context: &Context) -> String {
    format!("{} ({} SMs, driver of CUDA {})", context.name(), context.num_sms(), driver(context))
}

/// The newest CUDA version that the driver serves.
pub(crate) fn driver(context: &Context) -> String {
    let version = context.driver_version();
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// Passes that a time is the mean of.
pub(crate) const PASSES: usize = 20;
