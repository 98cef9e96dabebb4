//! Handles: numbers in the shape of a pointer, looked up and never followed.
//!
//! A handle is `TAG | pid | serial`. The tag lies outside every user address, so a real pointer is never taken for a
//! handle; the pid tells a forked child from its parent without a lock, which a fork may have left taken; a serial
//! is used once, so a destroyed handle stays dead.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use once_cell::sync::OnceCell;

use super::objects::{Context, PlanObject};
use super::registry::Registry;
use crate::error::{Error, Result, Status};

/// What a handle stands for.
#[derive(Clone, Debug)]
pub(super) enum Object {
    /// `compactattn_context`.
    Context(Arc<Context>),
    /// `compactattn_plan`.
    Plan(Arc<PlanObject>),
}

/// Registers `object`; its handle.
pub(super) fn insert(object: Object) -> Result<*mut c_void> {
    let serial = NEXT.fetch_add(1, Ordering::Relaxed);
    if serial > SERIAL_MAX {
        return Err(Error::plain(Status::Internal, "this process has used up its 2^30 handles"));
    }
    let pid = std::process::id();
    let id = TAG | u64::from(pid) << SERIAL_BITS | serial;
    handles(pid).objects.insert(id, object);
    Ok(std::ptr::without_provenance_mut(usize::try_from(id).unwrap_or(0)))
}

/// The live context behind `handle`.
pub(super) fn context(handle: *const c_void) -> Result<Arc<Context>> {
    match get("context", handle)? {
        Object::Context(context) => Ok(context),
        Object::Plan(_) => Err(Error::new(Status::Handle, "context", "a context", "a plan")),
    }
}

/// The live plan behind `handle`.
pub(super) fn plan(handle: *const c_void) -> Result<Arc<PlanObject>> {
    match get("plan", handle)? {
        Object::Plan(plan) => Ok(plan),
        Object::Context(_) => Err(Error::new(Status::Handle, "plan", "a plan", "a context")),
    }
}

/// Forgets a context; calls that still use it keep it alive until they return.
pub(super) fn remove_context(handle: *const c_void) -> Result<()> {
    context(handle)?;
    remove("context", handle)
}

/// Forgets a plan; calls that still use it keep it alive until they return.
pub(super) fn remove_plan(handle: *const c_void) -> Result<()> {
    plan(handle)?;
    remove("plan", handle)
}

fn get(name: &str, handle: *const c_void) -> Result<Object> {
    let (id, handles) = locate(name, handle)?;
    handles.objects.get(id).ok_or_else(|| dead(name))
}

fn remove(name: &str, handle: *const c_void) -> Result<()> {
    let (id, handles) = locate(name, handle)?;
    handles.objects.remove(id).map(drop).ok_or_else(|| dead(name))
}

/// The id, and the registry of this process, if this process made the handle.
fn locate(name: &str, handle: *const c_void) -> Result<(u64, &'static Handles)> {
    if handle.is_null() {
        return Err(Error::new(Status::Null, name, "a handle", "NULL"));
    }
    let id = handle.addr() as u64;
    if id & TAG_MASK != TAG {
        return Err(Error::new(Status::Handle, name, "a handle from this library", "another pointer"));
    }
    let pid = std::process::id();
    if (id & PID_MASK) >> SERIAL_BITS != u64::from(pid) {
        let wanted = "a handle made in this process (after the fork)";
        return Err(Error::new(Status::WrongProcess, name, wanted, "one of another process"));
    }
    Ok((id, handles(pid)))
}

fn dead(name: &str) -> Error {
    Error::new(Status::Handle, name, "a live handle", "one that was destroyed or never made")
}

/// The handles of one process. A forked child starts a registry of its own, whose lock nobody can have held.
struct Handles {
    pid: u32,
    objects: Registry<Object>,
    child: OnceCell<Box<Self>>,
}

impl Handles {
    fn new(pid: u32) -> Self {
        Self { pid, objects: Registry::new(), child: OnceCell::new() }
    }
}

fn handles(pid: u32) -> &'static Handles {
    let mut handles = FIRST.get_or_init(|| Handles::new(pid));
    while handles.pid != pid {
        handles = handles.child.get_or_init(|| Box::new(Handles::new(pid)));
    }
    handles
}

static FIRST: OnceCell<Handles> = OnceCell::new();
static NEXT: AtomicU64 = AtomicU64::new(1);

const SERIAL_BITS: u32 = 30;
const SERIAL_MAX: u64 = (1 << SERIAL_BITS) - 1;
/// Linux bounds a pid by 2^22.
const PID_MASK: u64 = ((1 << 22) - 1) << SERIAL_BITS;
const TAG: u64 = 0xCA7 << 52;
const TAG_MASK: u64 = 0xFFF << 52;

const _: () = assert!(size_of::<usize>() == 8, "handles need 64-bit addresses");

#[cfg(test)]
mod tests {
    use super::*;

    fn context_handle() -> *mut c_void {
        insert(Object::Context(Arc::new(Context::cpu(1)))).unwrap()
    }

    #[test]
    fn a_destroyed_handle_stays_dead() {
        let handle = context_handle();
        assert!(context(handle).is_ok());
        remove_context(handle).unwrap();
        assert_eq!(context(handle).unwrap_err().status(), Status::Handle);
        assert_eq!(remove_context(handle).unwrap_err().status(), Status::Handle);
        assert_ne!(context_handle(), handle);
    }

    #[test]
    fn a_context_is_no_plan() {
        assert_eq!(plan(context_handle()).unwrap_err().status(), Status::Handle);
    }

    #[test]
    fn a_handle_of_another_process_is_told_apart() {
        let other = context_handle().addr() ^ (1 << SERIAL_BITS);
        let error = context(std::ptr::without_provenance(other)).unwrap_err();
        assert_eq!(error.status(), Status::WrongProcess);
    }

    #[test]
    fn a_plain_pointer_is_refused_unread() {
        for address in [1, 16, 0x7fff_ffff_fff0, usize::MAX] {
            let error = context(std::ptr::without_provenance(address)).unwrap_err();
            assert_eq!(error.status(), Status::Handle);
            assert!(!error.to_string().contains(&format!("{address:x}")) || address < 17);
        }
    }
}
