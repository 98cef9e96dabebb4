//! The kernels of this build on one GPU: all loaded at creation, launched by name.

use std::collections::HashMap;
use std::ffi::{CString, c_int, c_void};
use std::marker::PhantomData;
use std::sync::Arc;

use super::device::{Device, Properties};
use super::driver::Handle;
use super::images::Image;
use super::stream::Stream;
use super::symbols::{Attribute, Launch};
use crate::error::{Error, Result, Status};

/// Extents of a launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    /// CTAs along x, y, z; a zero means nothing to do.
    pub(crate) blocks: [u32; 3],
    /// Threads of a CTA, along x.
    pub(crate) threads: u32,
    /// Dynamic shared memory of a CTA.
    pub(crate) shared_bytes: u32,
}

/// One argument of a kernel, copied by the driver during the launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arg<'a> {
    value: *const c_void,
    len_bytes: usize,
    of: PhantomData<&'a ()>,
}

impl<'a> Arg<'a> {
    /// `value` as the kernel's parameter: its twin of the same layout.
    pub(crate) fn of<T: Copy>(value: &'a T) -> Self {
        Self { value: std::ptr::from_ref(value).cast(), len_bytes: size_of::<T>(), of: PhantomData }
    }
}

/// Loaded kernels by name. Unloaded when dropped, which waits for those that run.
#[derive(Debug)]
pub(crate) struct Kernels {
    device: Arc<Device>,
    modules: Vec<Handle>,
    functions: HashMap<&'static str, Function>,
}

/// A kernel, and what a launch may ask of it.
#[derive(Debug)]
struct Function {
    handle: Handle,
    /// It may start while the kernel before it still runs.
    overlaps: bool,
    max_dynamic_bytes: u32,
    num_params: usize,
    param_bytes: [usize; MAX_PARAMS],
}

impl Kernels {
    /// Loads every image made for `device` and each of its kernels now: a load at the first launch could meet a
    /// capture, which forbids it. Not allowed during a capture itself.
    ///
    /// # Errors
    /// [`Status::NotBuilt`] if `images` is empty, [`Status::Arch`] if none is for this GPU, [`Status::Image`] for a
    /// damaged one or one that lacks a kernel, others of the driver.
    pub(crate) fn load(device: &Arc<Device>, images: &[Image]) -> Result<Self> {
        let arch = choose(device.properties(), images)?;
        let _entered = device.enter()?;
        let mut this = Self { device: Arc::clone(device), modules: Vec::new(), functions: HashMap::new() };
        for image in images.iter().filter(|image| image.arch == arch) {
            this.add(image)?;
        }
        tracing::debug!(arch, kernels = this.functions.len(), gpu = %device.properties().name, "kernels loaded");
        Ok(this)
    }

    /// Whether there is a kernel of that name for this GPU.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.functions.contains_key(name)
    }

    /// Whether a launch may give the kernel `shared_bytes` of dynamic shared memory.
    ///
    /// # Errors
    /// The bytes it may be given; 0 if there is no such kernel.
    pub(crate) fn fits(&self, name: &str, shared_bytes: u32) -> std::result::Result<(), u32> {
        let available = self.functions.get(name).map_or(0, |function| function.max_dynamic_bytes);
        if shared_bytes <= available { Ok(()) } else { Err(available) }
    }

    /// Puts one launch on `stream`: no allocation, no lock of ours, no wait. The device is entered.
    ///
    /// Addresses inside `args` are the caller's to have checked; the kernel writes through them when it runs.
    ///
    /// # Errors
    /// [`Status::Internal`], with nothing launched, for a name, an argument or a shared memory size that the kernel
    /// does not have; [`Status::Capture`], [`Status::ContextLost`] and others of the driver.
    pub(crate) fn launch(
        &self,
        stream: Stream,
        name: &'static str,
        grid: Grid,
        args: &[Arg<'_>],
    ) -> Result<()> {
        let Some(function) = self.functions.get(name) else {
            return Err(Error::new(Status::Internal, "kernel", "one of this build", name));
        };
        let [x, y, z] = grid.blocks;
        if x == 0 || y == 0 || z == 0 {
            return Ok(());
        }
        function.check(name, grid, args)?;
        let mut values = [std::ptr::null_mut(); MAX_PARAMS];
        for (value, arg) in values.iter_mut().zip(args) {
            *value = arg.value.cast_mut();
        }
        let mut overlap = Attribute::overlap();
        let launch = Launch {
            grid: grid.blocks,
            block: [grid.threads, 1, 1],
            shared_bytes: grid.shared_bytes,
            stream: stream.raw(),
            attributes: &raw mut overlap,
            num_attributes: u32::from(function.overlaps),
        };
        let driver = self.device.driver();
        // SAFETY: `check` found as many arguments as the kernel has, of the same sizes; the driver only reads them and
        // `launch`, before it returns. `stream` is alive by `Stream::from_raw`.
        let code = unsafe {
            (driver.functions.launch_kernel)(
                &raw const launch,
                function.handle.0,
                values.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        if code == 0 { Ok(()) } else { driver.check(code, &format!("cuLaunchKernelEx {name}")) }
    }

    fn add(&mut self, image: &Image) -> Result<()> {
        check_image(image)?;
        let driver = self.device.driver();
        let mut module = Handle::NONE;
        // SAFETY: a whole image by `check_image`; the driver copies what it keeps.
        let code =
            unsafe { (driver.functions.module_load_data)(&raw mut module.0, image.fatbin.as_ptr().cast()) };
        driver.check(code, &format!("cuModuleLoadData {}", image.unit))?;
        self.modules.push(module);
        for &name in image.kernels {
            let function = self.function(module, image.unit, name)?;
            if self.functions.insert(name, function).is_some() {
                return Err(Error::new(Status::Image, image.unit, "kernels of its own", name));
            }
        }
        Ok(())
    }

    /// Finds a kernel, has it loaded, and opts in to all the shared memory that its own static part leaves.
    fn function(&self, module: Handle, unit: &str, name: &str) -> Result<Function> {
        let driver = self.device.driver();
        let symbol = CString::new(name).map_err(|_| Error::new(Status::Image, unit, "C names", name))?;
        let mut handle = Handle::NONE;
        // SAFETY: a module loaded above and not unloaded; `symbol` ends in NUL.
        let code =
            unsafe { (driver.functions.module_get_function)(&raw mut handle.0, module.0, symbol.as_ptr()) };
        if code == NOT_FOUND {
            return Err(Error::new(Status::Image, unit, format!("kernel {name}"), "none of that name"));
        }
        driver.check(code, "cuModuleGetFunction")?;
        // SAFETY: a function of that module.
        let code = unsafe { (driver.functions.func_load)(handle.0) };
        driver.check(code, &format!("cuFuncLoad {name}"))?;
        let mut static_bytes = 0;
        // SAFETY: as above; writes one number.
        let code = unsafe {
            (driver.functions.func_get_attribute)(&raw mut static_bytes, STATIC_SHARED_BYTES, handle.0)
        };
        driver.check(code, "cuFuncGetAttribute")?;
        let static_bytes = u32::try_from(static_bytes).unwrap_or(0);
        let max_dynamic_bytes = self.device.properties().max_shared_bytes.saturating_sub(static_bytes);
        // SAFETY: a function of that module.
        let code = unsafe {
            (driver.functions.func_set_attribute)(
                handle.0,
                MAX_DYNAMIC_SHARED_BYTES,
                max_dynamic_bytes as c_int,
            )
        };
        driver.check(code, &format!("cuFuncSetAttribute {name}"))?;
        let (num_params, param_bytes) = self.params(handle, name)?;
        let overlaps = self.device.properties().has_clusters() && overlaps(name);
        Ok(Function { handle, overlaps, max_dynamic_bytes, num_params, param_bytes })
    }

    /// Count and sizes of a kernel's parameters.
    fn params(&self, handle: Handle, name: &str) -> Result<(usize, [usize; MAX_PARAMS])> {
        let driver = self.device.driver();
        let mut param_bytes = [0; MAX_PARAMS];
        for index in 0..=MAX_PARAMS {
            let (mut offset, mut len_bytes) = (0, 0);
            // SAFETY: a function of a loaded module; writes two numbers.
            let code = unsafe {
                (driver.functions.func_get_param_info)(handle.0, index, &raw mut offset, &raw mut len_bytes)
            };
            if code == INVALID_VALUE {
                // The driver's way to say that there are no more.
                return Ok((index, param_bytes));
            }
            driver.check(code, "cuFuncGetParamInfo")?;
            if let Some(place) = param_bytes.get_mut(index) {
                *place = len_bytes;
            }
        }
        Err(Error::new(Status::Image, name, format!("at most {MAX_PARAMS} parameters"), "more"))
    }
}

impl Function {
    /// Whether the driver may read `args` for this kernel, and the launch fits.
    fn check(&self, name: &str, grid: Grid, args: &[Arg<'_>]) -> Result<()> {
        let wanted = self.param_bytes.get(..self.num_params).unwrap_or(&[]);
        if args.len() != wanted.len() || args.iter().zip(wanted).any(|(arg, bytes)| arg.len_bytes != *bytes) {
            let got: Vec<_> = args.iter().map(|arg| arg.len_bytes).collect();
            return Err(Error::new(
                Status::Internal,
                name,
                format!("arguments of {wanted:?} bytes"),
                format!("{got:?}"),
            ));
        }
        if grid.shared_bytes > self.max_dynamic_bytes {
            let wanted = format!("at most {} bytes of dynamic shared memory", self.max_dynamic_bytes);
            return Err(Error::new(Status::Internal, name, wanted, grid.shared_bytes));
        }
        Ok(())
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        if !self.device.driver().is_of_this_process() {
            return;
        }
        let Ok(_entered) = self.device.enter() else { return };
        for module in &self.modules {
            // SAFETY: loaded by `add`, not unloaded since; its functions go with `self`.
            unsafe { (self.device.driver().functions.module_unload)(module.0) };
        }
    }
}

/// The architecture whose images run on this GPU: machine code serves its own major version from its minor on, and
/// that with an `a` its very version only.
///
/// # Errors
/// [`Status::NotBuilt`] without images, [`Status::Arch`] without one for it.
pub(super) fn choose(properties: &Properties, images: &[Image]) -> Result<&'static str> {
    if images.is_empty() {
        let text = "no GPU kernels in this build (a driver was found); use device_kind CPU";
        return Err(Error::plain(Status::NotBuilt, text));
    }
    let arch = match properties.capability {
        (8, _) => Some("sm_80"),
        (9, 0) => Some("sm_90a"),
        (10, 0) => Some("sm_100a"),
        (12, 0) => Some("sm_120a"),
        _ => None,
    };
    let built = |arch: &&str| images.iter().any(|image| image.arch == *arch);
    arch.filter(built).ok_or_else(|| {
        let mut archs: Vec<_> = images.iter().map(|image| image.arch).collect();
        archs.sort_unstable();
        archs.dedup();
        let (major, minor) = properties.capability;
        let got = format!("{} of compute capability {major}.{minor}", properties.name);
        Error::new(Status::Arch, "gpu", format!("one for {}", archs.join(", ")), got)
    })
}

/// Whether a kernel waits by itself for those before it (`wait_for_earlier` of cuda/ptx/grid.cuh), so that its launch need
/// not. tests/gpu/check_sass.py looks for the wait in the machine code of each.
fn overlaps(name: &str) -> bool {
    let name = name.strip_prefix("compactattn_").unwrap_or(name);
    let name = name.strip_suffix("_means").unwrap_or(name);
    let name =
        name.rsplit_once("_d").filter(|(_, dim)| dim.parse::<u32>().is_ok()).map_or(name, |(name, _)| name);
    let name = name.strip_suffix("_e4m3").unwrap_or(name);
    let name = ["_bf16", "_fp16"].iter().find_map(|dtype| name.strip_suffix(dtype)).unwrap_or(name);
    OVERLAPPING.contains(&name)
}

/// Whether the bytes are all there: the driver takes an address without a length.
fn check_image(image: &Image) -> Result<()> {
    let number = |at: usize, len: usize| -> u64 {
        let bytes = image.fatbin.get(at..at + len).unwrap_or(&[]);
        bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    };
    let needed = if number(0, 4) == FATBIN_MAGIC {
        // Header: magic, version u16, its own size u16, size of what follows u64.
        number(6, 2).saturating_add(number(8, 8)).max(FATBIN_HEADER_BYTES)
    } else if number(0, 4) == ELF_MAGIC {
        // e_shoff + e_shnum * e_shentsize: the section table ends the file.
        number(40, 8).saturating_add(number(60, 2) * number(58, 2)).max(ELF_HEADER_BYTES)
    } else {
        return Err(Error::new(Status::Image, image.unit, "a fatbin or cubin", "other bytes"));
    };
    if (image.fatbin.len() as u64) < needed {
        let got = image.fatbin.len();
        return Err(Error::new(Status::Image, image.unit, format!("{needed} bytes"), got));
    }
    Ok(())
}

/// Kernels that wait for themselves, without the dtype and head_dim that follow. Never the first of a step: what the
/// caller put on the stream before it need not be done when the kernel before the step's is.
const OVERLAPPING: [&str; 35] = [
    "attend_sm80",
    "attend_sm90",
    "attn_gate",
    "attn_gate_keys",
    "cells_lists",
    "cells_mass",
    "cells_pool",
    "cells_pool_small",
    "cells_read",
    "cells_read_candidates",
    "cells_read_candidates_sm90",
    "cells_read_candidates_small",
    "cells_read_pairs_sm90",
    "cells_read_sm90",
    "cells_read_small",
    "check_lists",
    "fill_scores",
    "flashprefill",
    "flashprefill_relate",
    "flashprefill_sm90",
    "keep_rows",
    "mass_lists",
    "mass_lists_short",
    "plan_work",
    "plan_work_means",
    "pooled_lists",
    "sample_rows",
    "sample_rows_held",
    "table",
    "two_level_candidates",
    "two_level_mass",
    "union_table",
    "union_table_wide",
    "xattention",
    "xattention_mass",
];
/// More than any kernel of ours has.
const MAX_PARAMS: usize = 8;
const FATBIN_MAGIC: u64 = 0xBA55_ED50;
const FATBIN_HEADER_BYTES: u64 = 16;
const ELF_MAGIC: u64 = 0x464C_457F;
const ELF_HEADER_BYTES: u64 = 64;
// CU_FUNC_ATTRIBUTE_* and CUDA_ERROR_* of cuda.h.
const STATIC_SHARED_BYTES: c_int = 1;
const MAX_DYNAMIC_SHARED_BYTES: c_int = 8;
const INVALID_VALUE: c_int = 1;
const NOT_FOUND: c_int = 500;

#[cfg(test)]
#[path = "kernels_tests.rs"]
mod tests;
