//! The CUDA driver as far as tests need it: memory, streams, graphs. Apart from the library's own binding, so that a
//! fault there does not hide itself.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

/// Declares the functions used, by their symbols.
macro_rules! functions {
    ($($name:ident = $symbol:literal ($($arg:ty),*);)*) => {
        struct Functions {
            $($name: unsafe extern "C" fn($($arg),*) -> c_int,)*
        }

        impl Functions {
            fn load(library: *mut c_void) -> Result<Self, String> {
                $(
                    let $name = symbol(library, $symbol)?;
                    // SAFETY: the driver's function of that name has this signature.
                    let $name = unsafe {
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($arg),*) -> c_int>($name)
                    };
                )*
                Ok(Self { $($name),* })
            }
        }
    };
}

functions! {
    init = c"cuInit"(c_uint);
    version = c"cuDriverGetVersion"(*mut c_int);
    count = c"cuDeviceGetCount"(*mut c_int);
    name = c"cuDeviceGetName"(*mut c_char, c_int, c_int);
    retain = c"cuDevicePrimaryCtxRetain"(*mut Handle, c_int);
    set_current = c"cuCtxSetCurrent"(Handle);
    get_current = c"cuCtxGetCurrent"(*mut Handle);
    ctx_create = c"cuCtxCreate_v2"(*mut Handle, c_uint, c_int);
    ctx_destroy = c"cuCtxDestroy_v2"(Handle);
    ctx_sync = c"cuCtxSynchronize"();
    alloc = c"cuMemAlloc_v2"(*mut u64, usize);
    free = c"cuMemFree_v2"(u64);
    to_device = c"cuMemcpyHtoD_v2"(u64, *const c_void, usize);
    to_host = c"cuMemcpyDtoH_v2"(*mut c_void, u64, usize);
    copy_on = c"cuMemcpyDtoDAsync_v2"(u64, u64, usize, Handle);
    fill = c"cuMemsetD8_v2"(u64, u8, usize);
    mem_info = c"cuMemGetInfo_v2"(*mut usize, *mut usize);
    stream_create = c"cuStreamCreate"(*mut Handle, c_uint);
    stream_destroy = c"cuStreamDestroy_v2"(Handle);
    stream_sync = c"cuStreamSynchronize"(Handle);
    begin_capture = c"cuStreamBeginCapture_v2"(Handle, c_uint);
    end_capture = c"cuStreamEndCapture"(Handle, *mut Handle);
    instantiate = c"cuGraphInstantiateWithFlags"(*mut Handle, Handle, u64);
    graph_launch = c"cuGraphLaunch"(Handle, Handle);
    graph_destroy = c"cuGraphDestroy"(Handle);
    exec_destroy = c"cuGraphExecDestroy"(Handle);
}

/// A context, stream or graph of the driver.
pub(crate) type Handle = *mut c_void;

/// The driver, with the primary context of GPU 0 (which the library uses too) retained for the life of the process.
pub(crate) struct Cuda {
    functions: Functions,
    context: Handle,
}

// SAFETY: function pointers and a context handle, which the driver lets any thread use.
unsafe impl Send for Cuda {}
// SAFETY: as above.
unsafe impl Sync for Cuda {}

impl Cuda {
    /// The driver of this machine.
    pub(crate) fn open() -> Result<Self, String> {
        // SAFETY: the name ends in NUL; the driver's constructors are sound.
        let library = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if library.is_null() {
            return Err("libcuda.so.1 could not be loaded".into());
        }
        let mut cuda = Self { functions: Functions::load(library)?, context: std::ptr::null_mut() };
        // SAFETY: the first call, as the driver wants.
        check("cuInit", unsafe { (cuda.functions.init)(0) })?;
        // SAFETY: the handle is writable; device 0 exists or the call fails.
        check("cuDevicePrimaryCtxRetain", unsafe { (cuda.functions.retain)(&raw mut cuda.context, 0) })?;
        cuda.enter();
        Ok(cuda)
    }

    /// Makes the context current to the calling thread.
    pub(crate) fn enter(&self) {
        // SAFETY: the context is retained for good.
        must("cuCtxSetCurrent", unsafe { (self.functions.set_current)(self.context) });
    }

    /// The context that is current to the calling thread.
    pub(crate) fn current(&self) -> Handle {
        let mut context = std::ptr::null_mut();
        // SAFETY: the handle is writable.
        must("cuCtxGetCurrent", unsafe { (self.functions.get_current)(&raw mut context) });
        context
    }

    /// Name of GPU 0, its driver's version.
    pub(crate) fn describe(&self) -> String {
        let (mut name, mut version) = ([0_u8; 128], 0);
        // SAFETY: the buffer holds 128 bytes.
        must("cuDeviceGetName", unsafe { (self.functions.name)(name.as_mut_ptr().cast(), 128, 0) });
        // SAFETY: the number is writable.
        must("cuDriverGetVersion", unsafe { (self.functions.version)(&raw mut version) });
        let name = CStr::from_bytes_until_nul(&name).map_or("?".into(), CStr::to_string_lossy);
        format!("{name}, CUDA driver {}.{}", version / 1000, version % 1000 / 10)
    }

    /// GPUs of this machine.
    pub(crate) fn devices(&self) -> i32 {
        let mut count = 0;
        // SAFETY: the number is writable.
        must("cuDeviceGetCount", unsafe { (self.functions.count)(&raw mut count) });
        count
    }

    pub(crate) fn alloc(&self, bytes: usize) -> u64 {
        let mut data = 0;
        // SAFETY: the address is writable.
        must("cuMemAlloc", unsafe { (self.functions.alloc)(&raw mut data, bytes.max(1)) });
        data
    }

    /// Frees what [`Cuda::alloc`] gave; nobody may use it any more.
    pub(crate) fn free(&self, data: u64) {
        // SAFETY: by this function's contract.
        must("cuMemFree", unsafe { (self.functions.free)(data) });
    }

    pub(crate) fn upload(&self, to: u64, from: &[u8]) {
        // SAFETY: callers pass an address within their own allocation that holds as many bytes.
        must("cuMemcpyHtoD", unsafe { (self.functions.to_device)(to, from.as_ptr().cast(), from.len()) });
    }

    pub(crate) fn download(&self, from: u64, to: &mut [u8]) {
        // SAFETY: as for upload.
        must("cuMemcpyDtoH", unsafe { (self.functions.to_host)(to.as_mut_ptr().cast(), from, to.len()) });
    }

    /// Waits for everything; a fault of any kernel shows here.
    pub(crate) fn sync(&self) {
        // SAFETY: no arguments.
        must("cuCtxSynchronize", unsafe { (self.functions.ctx_sync)() });
    }

    /// A stream that waits for the legacy default stream, and it for the stream.
    pub(crate) fn new_stream(&self) -> Handle {
        let mut stream = std::ptr::null_mut();
        // SAFETY: the handle is writable.
        must("cuStreamCreate", unsafe { (self.functions.stream_create)(&raw mut stream, 0) });
        stream
    }

    /// A stream that waits for no other.
    pub(crate) fn free_stream(&self) -> Handle {
        let mut stream = std::ptr::null_mut();
        // SAFETY: the handle is writable; 1 is CU_STREAM_NON_BLOCKING.
        must("cuStreamCreate", unsafe { (self.functions.stream_create)(&raw mut stream, 1) });
        stream
    }

    /// Copies within the device, in the order of `stream`.
    pub(crate) fn copy_on(&self, to: u64, from: u64, bytes: usize, stream: Handle) {
        // SAFETY: callers pass allocations of that size and a live stream.
        must("cuMemcpyDtoDAsync", unsafe { (self.functions.copy_on)(to, from, bytes, stream) });
    }

    /// Sets every byte.
    pub(crate) fn fill(&self, to: u64, byte: u8, bytes: usize) {
        // SAFETY: callers pass an address within their own allocation that holds as many bytes.
        must("cuMemsetD8", unsafe { (self.functions.fill)(to, byte, bytes) });
    }

    /// Free bytes of the GPU's memory.
    pub(crate) fn free_bytes(&self) -> usize {
        let (mut free, mut total) = (0, 0);
        // SAFETY: both numbers are writable.
        must("cuMemGetInfo", unsafe { (self.functions.mem_info)(&raw mut free, &raw mut total) });
        free
    }

    pub(crate) fn destroy_stream(&self, stream: Handle) {
        // SAFETY: callers pass a stream of new_stream, once.
        must("cuStreamDestroy", unsafe { (self.functions.stream_destroy)(stream) });
    }

    pub(crate) fn sync_stream(&self, stream: Handle) {
        // SAFETY: callers pass a live stream.
        must("cuStreamSynchronize", unsafe { (self.functions.stream_sync)(stream) });
    }

    /// A stream of another context of GPU 0, and that context.
    pub(crate) fn foreign_stream(&self) -> (Handle, Handle) {
        let mut context = std::ptr::null_mut();
        // SAFETY: the handle is writable.
        must("cuCtxCreate", unsafe { (self.functions.ctx_create)(&raw mut context, 0, 0) });
        let stream = self.new_stream();
        self.enter();
        (stream, context)
    }

    pub(crate) fn destroy_context(&self, context: Handle) {
        // SAFETY: callers pass a context of foreign_stream, once.
        must("cuCtxDestroy", unsafe { (self.functions.ctx_destroy)(context) });
        self.enter();
    }

    /// Records what `body` launches on `stream`; also `body`'s own answer. Capture in global mode: any call of this
    /// thread that would allocate or synchronise fails.
    pub(crate) fn capture<T>(
        &self,
        stream: Handle,
        body: impl FnOnce() -> T,
    ) -> (Result<Graph<'_>, String>, T) {
        // SAFETY: callers pass a live stream that nobody captures.
        must("cuStreamBeginCapture", unsafe { (self.functions.begin_capture)(stream, 0) });
        let answer = body();
        let mut graph = std::ptr::null_mut();
        // SAFETY: the stream is captured since above.
        let ended =
            check("cuStreamEndCapture", unsafe { (self.functions.end_capture)(stream, &raw mut graph) });
        (ended.and_then(|()| self.instantiate(graph)), answer)
    }

    fn instantiate(&self, graph: Handle) -> Result<Graph<'_>, String> {
        let mut exec = std::ptr::null_mut();
        // SAFETY: the graph was captured just now.
        check("cuGraphInstantiate", unsafe { (self.functions.instantiate)(&raw mut exec, graph, 0) })?;
        Ok(Graph { cuda: self, graph, exec })
    }
}

/// What a stream was given, to be given again.
pub(crate) struct Graph<'a> {
    cuda: &'a Cuda,
    graph: Handle,
    exec: Handle,
}

impl Graph<'_> {
    pub(crate) fn launch(&self, stream: Handle) {
        // SAFETY: both are alive.
        must("cuGraphLaunch", unsafe { (self.cuda.functions.graph_launch)(self.exec, stream) });
    }
}

impl Drop for Graph<'_> {
    fn drop(&mut self) {
        // SAFETY: made by instantiate, destroyed once.
        must("cuGraphExecDestroy", unsafe { (self.cuda.functions.exec_destroy)(self.exec) });
        // SAFETY: as above.
        must("cuGraphDestroy", unsafe { (self.cuda.functions.graph_destroy)(self.graph) });
    }
}

fn symbol(library: *mut c_void, name: &CStr) -> Result<*mut c_void, String> {
    // SAFETY: the library is open, the name ends in NUL.
    let found = unsafe { libc::dlsym(library, name.as_ptr()) };
    if found.is_null() { Err(format!("the driver has no {}", name.to_string_lossy())) } else { Ok(found) }
}

fn check(call: &str, status: c_int) -> Result<(), String> {
    if status == 0 { Ok(()) } else { Err(format!("{call}: CUDA error {status}")) }
}

/// For calls of the test's own: after a failure nothing that follows means anything.
fn must(call: &str, status: c_int) {
    if let Err(e) = check(call, status) {
        panic!("{e} (700: a kernel's illegal address; 719: a kernel's fault)");
    }
}
