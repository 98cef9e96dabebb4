//! Exported: contexts.

use std::sync::Arc;

use super::api_info::ABI_VERSION;
use super::compactattn_status;
use super::guard::guard;
use super::handle::{self, Object};
use super::objects::Context;
use super::read::{check_pointer, input};
use super::structs::{compactattn_context, compactattn_context_desc, compactattn_device_kind};
use crate::error::{Error, Result, Status};

/// Makes a context for one device. out_context is set only on COMPACTATTN_OK.
///
/// Contexts and plans may be used by any number of threads at once; destroying one that is in use is safe.
/// COMPACTATTN_E_ABI for a caller built for another ABI; COMPACTATTN_E_NO_DRIVER or COMPACTATTN_E_NOT_BUILT for CUDA
/// where it cannot be served.
///
/// # Safety
/// desc: NULL, or readable for its struct_size bytes. out_context: NULL, or writable. NULL is refused, not followed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn compactattn_context_create(
    desc: *const compactattn_context_desc,
    out_context: *mut *mut compactattn_context,
) -> compactattn_status {
    guard(|| {
        // SAFETY: this function's contract.
        let desc = unsafe { input("desc", desc) }?;
        check_pointer("out_context", out_context)?;
        let context = handle::insert(Object::Context(Arc::new(context(&desc)?)))?;
        // SAFETY: not NULL, aligned, writable by this function's contract.
        unsafe { out_context.write(context.cast()) };
        Ok(())
    })
}

/// Destroys a context; its plans live on. NULL is fine. COMPACTATTN_E_HANDLE for one that is not alive.
#[unsafe(no_mangle)]
pub extern "C" fn compactattn_context_destroy(context: *mut compactattn_context) -> compactattn_status {
    guard(|| if context.is_null() { Ok(()) } else { handle::remove_context(context.cast()) })
}

fn context(desc: &compactattn_context_desc) -> Result<Context> {
    if desc.abi_version != ABI_VERSION {
        let wanted = format!("{ABI_VERSION} (COMPACTATTN_ABI_VERSION of this library)");
        return Err(Error::new(Status::Abi, "desc.abi_version", wanted, desc.abi_version));
    }
    let ordinal = usize::try_from(desc.device_ordinal)
        .map_err(|_| Error::new(Status::Value, "desc.device_ordinal", "at least 0", desc.device_ordinal))?;
    let threads = usize::try_from(desc.num_threads).ok().filter(|&n| n <= MAX_THREADS).ok_or_else(|| {
        let wanted = format!("0..={MAX_THREADS}");
        Error::new(Status::Value, "desc.num_threads", wanted, desc.num_threads)
    })?;
    if desc.device_kind == compactattn_device_kind::COMPACTATTN_DEVICE_CUDA as i32 {
        return Context::cuda(ordinal);
    }
    if desc.device_kind != compactattn_device_kind::COMPACTATTN_DEVICE_CPU as i32 {
        let wanted = "1 (CPU) or 2 (CUDA)";
        return Err(Error::new(Status::Value, "desc.device_kind", wanted, desc.device_kind));
    }
    if ordinal != 0 {
        return Err(Error::new(Status::Value, "desc.device_ordinal", "0 for the CPU", ordinal));
    }
    Ok(Context::cpu(threads))
}

/// Beyond this a thread count is garbage.
const MAX_THREADS: usize = 1024;
