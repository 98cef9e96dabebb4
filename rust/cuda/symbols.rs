//! The driver functions in use: their C signatures and where `dlsym` finds them.
//!
//! Declared here rather than taken from cudarc: that crate panics where the driver or one of its symbols is missing,
//! and its version features, united with a dependent's, do not compile. Names and signatures are those of `cuda.h`;
//! the `_v2` names are what its macros make of the plain ones.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

/// What every driver function returns; 0 is success.
pub(super) type Code = c_int;
/// An address in a GPU's memory.
pub(super) type Address = u64;
/// An opaque driver object: context, module, function or stream.
pub(super) type Object = *mut c_void;

/// `CUlaunchConfig`.
#[repr(C)]
#[derive(Debug)]
pub(super) struct Launch {
    pub(super) grid: [c_uint; 3],
    pub(super) block: [c_uint; 3],
    pub(super) shared_bytes: c_uint,
    pub(super) stream: Object,
    /// The driver reads `num_attributes` of them.
    pub(super) attributes: *mut Attribute,
    pub(super) num_attributes: c_uint,
}

/// `CUlaunchAttribute`: which one, then a union of 64 bytes.
#[repr(C)]
#[derive(Debug)]
pub(super) struct Attribute {
    id: c_int,
    padding: c_int,
    value: [c_int; 16],
}

impl Attribute {
    /// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`: the kernel may start once all CTAs of the one before it
    /// have begun and said so; it waits for its end and its writes by itself.
    pub(super) const fn overlap() -> Self {
        let mut value = [0; 16];
        value[0] = 1;
        Self { id: 6, padding: 0, value }
    }
}

const _: () = assert!(size_of::<Launch>() == 56 && size_of::<Attribute>() == 72);

macro_rules! driver_functions {
    ($($name:ident = $symbol:literal ($($argument:ty),*);)*) => {
        /// One pointer a function, valid while the library stays loaded.
        #[derive(Debug)]
        pub(super) struct Functions {
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) -> Code,)*
        }

        impl Functions {
            /// Finds all of them; the name of the first that is missing.
            ///
            /// # Safety
            /// `library` is a live handle of `dlopen`. What it exports under these names has these signatures.
            pub(super) unsafe fn find(library: Object) -> Result<Self, &'static CStr> {
                Ok(Self {
                    $($name: {
                        // SAFETY: the caller's promise about `library`.
                        let found = unsafe { find(library, $symbol) }.ok_or($symbol)?;
                        // SAFETY: not null, and of this signature by the caller's promise.
                        unsafe { std::mem::transmute::<Object, unsafe extern "C" fn($($argument),*) -> Code>(found) }
                    },)*
                })
            }
        }
    };
}

driver_functions! {
    init = c"cuInit"(c_uint);
    driver_get_version = c"cuDriverGetVersion"(*mut c_int);
    get_error_name = c"cuGetErrorName"(Code, *mut *const c_char);
    device_get_count = c"cuDeviceGetCount"(*mut c_int);
    device_get = c"cuDeviceGet"(*mut c_int, c_int);
    device_get_name = c"cuDeviceGetName"(*mut c_char, c_int, c_int);
    device_total_mem = c"cuDeviceTotalMem_v2"(*mut usize, c_int);
    device_get_attribute = c"cuDeviceGetAttribute"(*mut c_int, c_int, c_int);
    primary_ctx_retain = c"cuDevicePrimaryCtxRetain"(*mut Object, c_int);
    primary_ctx_release = c"cuDevicePrimaryCtxRelease_v2"(c_int);
    ctx_push_current = c"cuCtxPushCurrent_v2"(Object);
    ctx_pop_current = c"cuCtxPopCurrent_v2"(*mut Object);
    module_load_data = c"cuModuleLoadData"(*mut Object, *const c_void);
    module_unload = c"cuModuleUnload"(Object);
    module_get_function = c"cuModuleGetFunction"(*mut Object, Object, *const c_char);
    func_get_attribute = c"cuFuncGetAttribute"(*mut c_int, c_int, Object);
    func_set_attribute = c"cuFuncSetAttribute"(Object, c_int, c_int);
    func_load = c"cuFuncLoad"(Object);
    func_get_param_info = c"cuFuncGetParamInfo"(Object, usize, *mut usize, *mut usize);
    launch_kernel = c"cuLaunchKernelEx"(*const Launch, Object, *mut *mut c_void, *mut *mut c_void);
    stream_get_ctx = c"cuStreamGetCtx"(Object, *mut Object);
    stream_is_capturing = c"cuStreamIsCapturing"(Object, *mut c_int);
    stream_synchronize = c"cuStreamSynchronize"(Object);
    memset_d32_async = c"cuMemsetD32Async"(Address, c_uint, usize, Object);
    mem_alloc = c"cuMemAlloc_v2"(*mut Address, usize);
    mem_free = c"cuMemFree_v2"(Address);
    memcpy_htod = c"cuMemcpyHtoD_v2"(Address, *const c_void, usize);
    memcpy_dtoh = c"cuMemcpyDtoH_v2"(*mut c_void, Address, usize);
    mem_host_alloc = c"cuMemHostAlloc"(*mut *mut c_void, usize, c_uint);
    mem_free_host = c"cuMemFreeHost"(*mut c_void);
    mem_host_get_device_pointer = c"cuMemHostGetDevicePointer_v2"(*mut Address, *mut c_void, c_uint);
    pointer_get_attributes = c"cuPointerGetAttributes"(c_uint, *const c_int, *mut *mut c_void, Address);
    tensor_map_encode_tiled = c"cuTensorMapEncodeTiled"(
        *mut c_void, c_int, u32, *mut c_void, *const u64, *const u64, *const u32, *const u32, c_int, c_int, c_int, c_int
    );
}

/// The address of one symbol, or nothing.
///
/// # Safety
/// `library` is a live handle of `dlopen`.
pub(super) unsafe fn find(library: Object, symbol: &CStr) -> Option<Object> {
    // SAFETY: the caller's promise; `symbol` ends in NUL.
    let found = unsafe { libc::dlsym(library, symbol.as_ptr()) };
    (!found.is_null()).then_some(found)
}
