//! A step on tests/gpu/counting_driver.c, a GPU that is none: its memory is the host's, its kernels compute nothing.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, clippy::wildcard_imports, reason = "tests of everything the header declares")]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small numbers")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;

use compactattn::capi::*;

/// Compiles the stand-in; `name` keeps tests that run at once apart.
pub fn compile(name: &str) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gpu/counting_driver.c");
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("libcuda-{name}.so"));
    let status = Command::new("cc")
        .args(["-std=gnu11", "-O1", "-shared", "-fPIC", "-pthread", "-o"])
        .args([&out, &source])
        .arg("-ldl")
        .status()
        .unwrap();
    assert!(status.success(), "cc: {status}");
    out
}

/// The stand-in, as this process's library has loaded it too.
pub struct Driver {
    library: *mut c_void,
}

impl Driver {
    /// The one that COMPACTATTN_LIBCUDA names.
    pub fn open() -> Self {
        let path = CString::new(std::env::var("COMPACTATTN_LIBCUDA").unwrap()).unwrap();
        // SAFETY: the path ends in NUL.
        let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        assert!(!library.is_null(), "{path:?}");
        Self { library }
    }

    fn symbol(&self, name: &CStr) -> *mut c_void {
        // SAFETY: the library is open, the name ends in NUL.
        let found = unsafe { libc::dlsym(self.library, name.as_ptr()) };
        assert!(!found.is_null(), "{name:?}");
        found
    }

    /// Calls a function of one number.
    fn with_number(&self, name: &CStr, value: c_int) {
        // SAFETY: the stand-in's functions of that name have this signature.
        let call = unsafe { std::mem::transmute::<*mut c_void, extern "C" fn(c_int)>(self.symbol(name)) };
        call(value);
    }

    fn with_text(&self, name: &CStr, text: &str) {
        let text = CString::new(text).unwrap();
        // SAFETY: as above.
        let call =
            unsafe { std::mem::transmute::<*mut c_void, extern "C" fn(*const c_char)>(self.symbol(name)) };
        call(text.as_ptr());
    }

    /// What a function without arguments says.
    pub fn number(&self, name: &CStr) -> usize {
        // SAFETY: as above.
        let call = unsafe { std::mem::transmute::<*mut c_void, extern "C" fn() -> usize>(self.symbol(name)) };
        call()
    }

    /// Calls so far, of a function or of all ("*").
    pub fn calls(&self, name: &str) -> u64 {
        let name = CString::new(name).unwrap();
        // SAFETY: as above.
        let call = unsafe {
            std::mem::transmute::<*mut c_void, extern "C" fn(*const c_char) -> u64>(
                self.symbol(c"fake_calls"),
            )
        };
        call(name.as_ptr())
    }

    pub fn set_mode(&self, words: &str) {
        self.with_text(c"fake_set_mode", words);
    }

    /// "function:n:code", or "" for none.
    pub fn fail(&self, what: &str) {
        self.with_text(c"fake_fail", what);
    }

    /// Runs `body`, whose calls of the driver neither count nor fail.
    pub fn unseen<T>(&self, body: impl FnOnce() -> T) -> T {
        self.with_number(c"fake_arm", 0);
        let answer = body();
        self.with_number(c"fake_arm", 1);
        answer
    }

    /// Memory of the GPU that is none.
    pub fn alloc(&self, bytes: usize) -> u64 {
        self.unseen(|| {
            let mut address = 0_u64;
            self.in_context(|| {
                // SAFETY: the driver's function of that name has this signature.
                let alloc = unsafe {
                    std::mem::transmute::<*mut c_void, extern "C" fn(*mut u64, usize) -> c_int>(
                        self.symbol(c"cuMemAlloc_v2"),
                    )
                };
                assert_eq!(alloc(&raw mut address, bytes.max(1)), 0);
            });
            address
        })
    }

    pub fn free(&self, address: u64) {
        self.unseen(|| {
            self.in_context(|| {
                // SAFETY: as above.
                let free = unsafe {
                    std::mem::transmute::<*mut c_void, extern "C" fn(u64) -> c_int>(
                        self.symbol(c"cuMemFree_v2"),
                    )
                };
                assert_eq!(free(address), 0);
            });
        });
    }

    fn in_context(&self, body: impl FnOnce()) {
        let mut context = std::ptr::null_mut::<c_void>();
        // SAFETY: as above.
        let retain = unsafe {
            std::mem::transmute::<*mut c_void, extern "C" fn(*mut *mut c_void, c_int) -> c_int>(
                self.symbol(c"cuDevicePrimaryCtxRetain"),
            )
        };
        retain(&raw mut context, 0);
        // SAFETY: as above.
        let push = unsafe {
            std::mem::transmute::<*mut c_void, extern "C" fn(*mut c_void) -> c_int>(
                self.symbol(c"cuCtxPushCurrent_v2"),
            )
        };
        push(context);
        body();
        // SAFETY: as above.
        let pop = unsafe {
            std::mem::transmute::<*mut c_void, extern "C" fn(*mut *mut c_void) -> c_int>(
                self.symbol(c"cuCtxPopCurrent_v2"),
            )
        };
        pop(&raw mut context);
    }
}

/// A plan's description: 4 heads in 2 groups, 128 wide, pages of 16.
pub fn desc() -> compactattn_plan_desc {
    let mut desc: compactattn_plan_desc = zeroed();
    desc.struct_size = size_of::<compactattn_plan_desc>() as u32;
    (desc.num_q_heads, desc.num_kv_heads, desc.head_dim, desc.page_size) = (4, 2, 128, 16);
    desc.dtype = compactattn_dtype::COMPACTATTN_DTYPE_BF16 as i32;
    (desc.max_num_reqs, desc.max_total_q, desc.max_kv_len) = (2, 64, 512);
    desc
}

pub fn create_context(out: &mut *mut compactattn_context) -> compactattn_status {
    let desc = compactattn_context_desc {
        struct_size: size_of::<compactattn_context_desc>() as u32,
        abi_version: compactattn_abi_version(),
        device_kind: compactattn_device_kind::COMPACTATTN_DEVICE_CUDA as i32,
        ..zeroed()
    };
    // SAFETY: both point to live memory.
    unsafe { compactattn_context_create(&raw const desc, out) }
}

pub fn create_plan(
    context: *const compactattn_context,
    desc: &compactattn_plan_desc,
    out: &mut *mut compactattn_plan,
) -> compactattn_status {
    // SAFETY: both point to live memory; the description names no settings.
    unsafe { compactattn_plan_create(context, desc, out) }
}

/// A forward call in memory of the stand-in.
pub struct Call {
    pub batch: Box<compactattn_batch>,
    pub args: compactattn_forward_args,
    pub memory: Vec<u64>,
}

impl Call {
    /// Two requests, 20 and 1 queries on 100 and 50 tokens.
    pub fn new(driver: &Driver, plan: *const compactattn_plan) -> Self {
        let mut memory = Vec::new();
        let mut tensor = |dtype: i32, shape: &[i64]| {
            let bytes = shape.iter().product::<i64>() as usize * if dtype <= 2 { 2 } else { 4 };
            memory.push(driver.alloc(bytes));
            tensor(memory[memory.len() - 1], bytes, dtype, shape)
        };
        let mut batch: Box<compactattn_batch> = Box::new(zeroed());
        batch.struct_size = size_of::<compactattn_batch>() as u32;
        batch.q = tensor(1, &[21, 4, 128]);
        batch.k = tensor(1, &[12, 16, 2, 128]);
        batch.v = tensor(1, &[12, 16, 2, 128]);
        batch.cu_seqlens_q = tensor(4, &[3]);
        batch.seq_lens = tensor(4, &[2]);
        batch.block_table = tensor(4, &[2, 7]);
        let mut args: compactattn_forward_args = zeroed();
        args.struct_size = size_of::<compactattn_forward_args>() as u32;
        args.out = tensor(1, &[21, 4, 128]);
        args.lse = tensor(3, &[4, 21]);
        let bytes = workspace_bytes(plan);
        let workspace = driver.alloc(bytes as usize);
        memory.push(workspace);
        args.workspace = std::ptr::with_exposed_provenance_mut(workspace as usize);
        args.workspace_bytes = bytes;
        args.stream = std::ptr::with_exposed_provenance_mut(driver.number(c"fake_stream"));
        args.batch = &raw const *batch;
        Self { batch, args, memory }
    }

    pub fn forward(&self, plan: *const compactattn_plan) -> compactattn_status {
        // SAFETY: the structs describe live memory, or what a test of refusals has put there.
        unsafe { compactattn_forward(plan, &raw const self.args) }
    }
}

pub fn workspace_bytes(plan: *const compactattn_plan) -> i64 {
    let mut sizes: compactattn_sizes = zeroed();
    sizes.struct_size = size_of::<compactattn_sizes>() as u32;
    // SAFETY: `sizes` is as long as it says.
    let status = unsafe { compactattn_plan_sizes(plan, 0, std::ptr::null(), &raw mut sizes) };
    assert_eq!(status, compactattn_status::COMPACTATTN_OK, "{}", last_error());
    sizes.workspace_bytes
}

fn tensor(address: u64, bytes: usize, dtype: i32, shape: &[i64]) -> compactattn_tensor {
    let mut tensor: compactattn_tensor = zeroed();
    tensor.data = std::ptr::with_exposed_provenance_mut(address as usize);
    (tensor.storage_bytes, tensor.dtype, tensor.ndim) = (bytes as i64, dtype, shape.len() as i32);
    let mut stride = 1;
    for i in (0..shape.len()).rev() {
        (tensor.shape[i], tensor.stride[i]) = (shape[i], stride);
        stride *= shape[i];
    }
    tensor
}

pub fn last_error() -> String {
    let mut buf = [0_u8; 512];
    // SAFETY: `buf` holds 512 bytes.
    let len = unsafe { compactattn_last_error(buf.as_mut_ptr().cast(), buf.len()) };
    String::from_utf8(buf[..len].to_vec()).unwrap()
}

/// A struct of the header, all zero.
pub fn zeroed<T>() -> T {
    // SAFETY: the header's structs hold numbers and raw pointers only.
    unsafe { std::mem::zeroed() }
}
