// A stand-in for libcuda.so.1 that counts every call. It is either a fake GPU whose memory is the
// host's and whose kernels only leave a line in a log, or, in mode "forward", a gate to the real
// driver.
//
// The mode is a list of words, from FAKE_CUDA or fake_set_mode:
//   nodevice init34 old mismatch count0   cuInit, cuDriverGetVersion or cuDeviceGetCount fail or
//   disappoint oom_on_alloc badimage nobinary lost   2 from allocations; 200, 209 from loads; 700
//   from launches capture                               the stream is captured: 900 from what a
//   capture forbids ccNN                                  compute capability N.N instead of 9.0
//   forward                               the real driver does the work; only counts are kept
//
// FAKE_FAIL, or fake_fail: "function:n:code" makes the n-th call of it ("*" of any) end in that
// code; one that loses the context (700, 702, 709 .. 719) ends every later call that needs it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kOk, kInvalidValue, kOutOfMemory, kStub = 34, kNoDevice = 100, kInvalidDevice };
enum { kBadImage = 200, kInvalidContext = 201, kNoBinary = 209, kInvalidHandle = 400 };
enum { kNotFound = 500, kLost = 700, kMismatch = 803, kCapture = 900, kImplicit = 906 };
enum { kMaxNames = 64, kMaxFunctions = 256 };
enum { kMaxLaunches = 4096, kMaxDepth = 64 };

typedef int Code;
typedef uint64_t Address;

struct Count {
  const char* name;
  uint64_t calls;
};

struct Function {
  char name[96];
  size_t param_bytes[8];
  int num_params;
  int max_dynamic_bytes;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char mode[256];
static int mode_is_set;
static struct Count counts[kMaxNames];
static struct Function functions[kMaxFunctions];
static int num_functions;
static char launches[kMaxLaunches][160];
static size_t num_launches;
static int last_attribute;
static uint64_t last_argument;
static char primary_context, foreign_context, stream, foreign_stream;
static __thread void* current[kMaxDepth];
static __thread size_t depth;

#include "counting_faults.h"

// ---- what tests see ----

void fake_set_mode(const char* words) {
  snprintf(mode, sizeof mode, "%s", words);
  mode_is_set = 1;
}

// Of one function, or of all for "*".
uint64_t fake_calls(const char* name) {
  uint64_t calls = 0;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < kMaxNames && counts[i].name; ++i) {
    if (!strcmp(name, "*") || !strcmp(name, counts[i].name)) calls += counts[i].calls;
  }
  pthread_mutex_unlock(&lock);
  return calls;
}

void fake_reset(void) {
  pthread_mutex_lock(&lock);
  for (int i = 0; i < kMaxNames; ++i) counts[i].calls = 0;
  num_launches = 0;
  pthread_mutex_unlock(&lock);
}

size_t fake_num_launches(void) { return num_launches; }
// "name XxYxZ threads shared_bytes[ overlaps]", or NULL beyond the last.
const char* fake_launch(size_t index) { return index < num_launches ? launches[index] : NULL; }
size_t fake_context_depth(void) { return depth; }
size_t fake_stream(void) { return (size_t)&stream; }
size_t fake_foreign_stream(void) { return (size_t)&foreign_stream; }
size_t fake_last_attribute(void) { return (size_t)last_attribute; }
// The first 8 bytes of the last argument of the last launch.
size_t fake_last_argument(void) { return last_argument; }

// ---- how it works ----

static int is(const char* word) {
  if (!mode_is_set) fake_set_mode(getenv("FAKE_CUDA") ? getenv("FAKE_CUDA") : "");
  return strstr(mode, word) != NULL;
}

static void* real(const char* name) {
  const char* path = getenv("FAKE_CUDA_REAL");
  void* library = dlopen(path ? path : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  void* found = library ? dlsym(library, name) : NULL;
  if (!found) {
    fprintf(stderr, "counting driver: no %s in the real driver\n", name);
    abort();
  }
  return found;
}

// Defines a driver function: counted, then forwarded or faked by the body that follows.
#define DRIVER(name, parameters, arguments) AROUND(name, parameters, arguments, (void)0, (void)0)

// The same, and what the real driver gives out is noted, what it takes back forgotten.
#define GIVEN(name, parameters, arguments, place, size, type) \
  AROUND(name, parameters, arguments, (void)0, made ? (void)0 : note(place, size, type))
#define TAKEN(name, parameters, arguments, place)                       \
  AROUND(name, parameters, arguments, struct Block was = forget(place), \
         made && was.start ? note(was.start, was.bytes, was.memory_type) : (void)0)

// The same, between two statements where the real driver does it.
#define AROUND(name, parameters, arguments, before, after)              \
  static Code fake_##name parameters;                                   \
  Code name parameters {                                                \
    static Code(*forward) parameters;                                   \
    int made = count(#name);                                            \
    if (made) return made;                                              \
    if (!is("forward")) return fake_##name arguments;                   \
    if (!forward) forward = (Code(*) parameters)(uintptr_t)real(#name); \
    before;                                                             \
    made = forward arguments;                                           \
    after;                                                              \
    return made;                                                        \
  }                                                                     \
  static Code fake_##name parameters

#define UNUSED(x) (void)(x)

static int has_context(void) { return depth > 0 && current[depth - 1] == &primary_context; }

static int capability(void) {
  const char* word = is("cc") ? strstr(mode, "cc") : NULL;
  return word ? atoi(word + 2) : 90;
}

// Of a CTA that opts in: 9.0 and 10.0, 8.0, and the others.
static int most_shared_bytes(void) {
  int roomy = capability() == 90 || capability() == 100;
  return roomy ? 232448 : capability() == 80 ? 166912 : 101376;
}

// None in kernels whose dynamic memory is all that some GPUs have.
static int static_bytes(const struct Function* function) {
  const char* name = function->name;
  if (strstr(name, "_pooled_lists_")) return 32 << 10;  // what clusters exchange, and rank lists by
  return strstr(name, "_attend_") || strstr(name, "_cells_read_pairs_") ? 0 : 1024;
}

#include "counting_kernels.h"
#include "counting_memory.h"

// ---- the driver's functions ----

DRIVER(cuInit, (unsigned flags), (flags)) {
  if (is("nodevice")) return kNoDevice;
  if (is("init34")) return kStub;
  if (is("mismatch")) return kMismatch;
  return flags ? kInvalidValue : kOk;
}

DRIVER(cuDriverGetVersion, (int* version), (version)) {
  *version = is("old") ? 12080 : 13000;
  return kOk;
}

DRIVER(cuGetErrorName, (Code code, const char** name), (code, name)) {
  static const struct {
    Code code;
    const char* name;
  } names[] = {
      {1, "CUDA_ERROR_INVALID_VALUE"},       {2, "CUDA_ERROR_OUT_OF_MEMORY"},
      {34, "CUDA_ERROR_STUB_LIBRARY"},       {100, "CUDA_ERROR_NO_DEVICE"},
      {200, "CUDA_ERROR_INVALID_IMAGE"},     {201, "CUDA_ERROR_INVALID_CONTEXT"},
      {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"}, {500, "CUDA_ERROR_NOT_FOUND"},
      {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},   {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"}};
  for (size_t i = 0; i < sizeof names / sizeof *names; ++i) {
    if (names[i].code == code) {
      *name = names[i].name;
      return kOk;
    }
  }
  *name = NULL;
  return kInvalidValue;
}

DRIVER(cuDeviceGetCount, (int* n), (n)) {
  *n = is("count0") ? 0 : 1;
  return kOk;
}

DRIVER(cuDeviceGet, (int* device, int ordinal), (device, ordinal)) {
  *device = 0;
  return ordinal ? kInvalidDevice : kOk;
}

DRIVER(cuDeviceGetName, (char* name, int bytes, int device), (name, bytes, device)) {
  snprintf(name, (size_t)bytes, "fake GPU");
  return device ? kInvalidDevice : kOk;
}

DRIVER(cuDeviceTotalMem_v2, (size_t* bytes, int device), (bytes, device)) {
  *bytes = (size_t)80 << 30;
  return device ? kInvalidDevice : kOk;
}

DRIVER(cuDeviceGetAttribute, (int* value, int which, int device), (value, which, device)) {
  if (which == 16) *value = 132;
  if (which == 75) *value = capability() / 10;
  if (which == 76) *value = capability() % 10;
  if (which == 97) *value = most_shared_bytes();
  if (which != 16 && which != 75 && which != 76 && which != 97) return kInvalidValue;
  return device ? kInvalidDevice : kOk;
}

DRIVER(cuDevicePrimaryCtxRetain, (void** context, int device), (context, device)) {
  *context = &primary_context;
  return device ? kInvalidDevice : kOk;
}

DRIVER(cuDevicePrimaryCtxRelease_v2, (int device), (device)) {
  return device ? kInvalidDevice : kOk;
}

DRIVER(cuCtxPushCurrent_v2, (void* context), (context)) {
  if (depth == kMaxDepth) return kInvalidValue;
  current[depth++] = context;
  return context == &primary_context ? kOk : kInvalidContext;
}

DRIVER(cuCtxPopCurrent_v2, (void** context), (context)) {
  if (!depth) return kInvalidContext;
  *context = current[--depth];
  return kOk;
}

DRIVER(cuModuleLoadData, (void** module, const void* image), (module, image)) {
  if (!has_context()) return kInvalidContext;
  if (is("capture")) return kCapture;
  if (is("badimage")) return kBadImage;
  if (is("nobinary")) return kNoBinary;
  *module = (void*)(uintptr_t)image;
  return kOk;
}

DRIVER(cuModuleUnload, (void* module), (module)) {
  return has_context() && module ? kOk : kInvalidContext;
}

DRIVER(cuModuleGetFunction, (void** function, void* module, const char* name),
       (function, module, name)) {
  if (!has_context()) return kInvalidContext;
  struct Function made = {0};
  if (!describe(&made, module, name)) return kNotFound;
  snprintf(made.name, sizeof made.name, "%s", name);
  pthread_mutex_lock(&lock);
  int full = num_functions == kMaxFunctions;
  if (!full) functions[num_functions++] = made;
  *function = &functions[num_functions - 1];
  pthread_mutex_unlock(&lock);
  return full ? kOutOfMemory : kOk;
}

DRIVER(cuFuncGetAttribute, (int* value, int which, void* function), (value, which, function)) {
  if (which != 1 || !function)
    return kInvalidValue;  // static shared memory is all that is asked for
  *value = static_bytes(function);
  return kOk;
}

DRIVER(cuFuncSetAttribute, (void* function, int which, int value), (function, which, value)) {
  int most = most_shared_bytes() - static_bytes(function);
  if (which != 8 || value < 0 || value > most) return kInvalidValue;
  ((struct Function*)function)->max_dynamic_bytes = last_attribute = value;
  return kOk;
}

#ifndef WITHOUT_FUNC_LOAD
DRIVER(cuFuncLoad, (void* function), (function)) { return function ? kOk : kInvalidHandle; }
#endif

DRIVER(cuFuncGetParamInfo, (void* function, size_t index, size_t* offset, size_t* bytes),
       (function, index, offset, bytes)) {
  struct Function* of = function;
  if (index >= (size_t)of->num_params) return kInvalidValue;
  *offset = 0;  // nobody asks
  *bytes = of->param_bytes[index];
  return kOk;
}

// CUlaunchConfig and CUlaunchAttribute of cuda.h.
struct Attribute {
  int id, padding, value[16];
};
struct Launch {
  unsigned grid[3], block[3], shared;
  void* on;
  struct Attribute* attributes;
  unsigned num_attributes;
};

// Whether it asks to overlap with the kernel before it; -1 for anything else.
static int overlap_of(const struct Launch* launch) {
  if (launch->num_attributes == 0) return 0;
  int known = launch->num_attributes == 1 && launch->attributes->id == 6;
  return known && launch->attributes->value[0] == 1 && capability() >= 90 ? 1 : -1;
}

DRIVER(cuLaunchKernelEx, (const struct Launch* launch, void* function, void** values, void** extra),
       (launch, function, values, extra)) {
  struct Function* of = function;
  const unsigned *grid = launch->grid, *block = launch->block;
  int most = of->max_dynamic_bytes > 49152 ? of->max_dynamic_bytes : 49152;
  int overlap = overlap_of(launch);
  if (!has_context()) return kInvalidContext;
  if (is("lost")) return kLost;
  if (!grid[0] || !grid[1] || !grid[2] || grid[1] > 65535 || grid[2] > 65535 || !block[0] ||
      block[0] * block[1] * block[2] > 1024 || extra || overlap < 0 || (int)launch->shared > most)
    return kInvalidValue;
  pthread_mutex_lock(&lock);
  if (num_launches < kMaxLaunches) {
    snprintf(launches[num_launches++], sizeof *launches, "%s %ux%ux%u %u %u%s", of->name, grid[0],
             grid[1], grid[2], block[0], launch->shared, overlap ? " overlaps" : "");
  }
  for (int i = 0; i < of->num_params; ++i) {
    if (of->param_bytes[i] >= 8) memcpy(&last_argument, values[i], 8);
  }
  pthread_mutex_unlock(&lock);
  return kOk;
}

DRIVER(cuStreamGetCtx, (void* of, void** context), (of, context)) {
  *context = of == &foreign_stream ? &foreign_context : &primary_context;
  return kOk;
}

DRIVER(cuStreamIsCapturing, (void* of, int* status), (of, status)) {
  *status = is("capture") ? 1 : 0;
  return is("capture") && !of ? kImplicit : kOk;
}

DRIVER(cuStreamSynchronize, (void* of), (of)) {
  UNUSED(of);
  return is("capture") ? kCapture : kOk;
}

DRIVER(cuMemsetD32Async, (Address to, unsigned value, size_t words, void* on),
       (to, value, words, on)) {
  UNUSED(on);
  struct Block block = block_of(to);
  if (!has_context()) return kInvalidContext;
  if (!block.start || to % 4 || to + 4 * words > (Address)(uintptr_t)block.start + block.bytes)
    return kInvalidValue;
  for (size_t i = 0; i < words; ++i) ((uint32_t*)(uintptr_t)to)[i] = value;
  return kOk;
}

GIVEN(cuMemAlloc_v2, (Address * out, size_t bytes), (out, bytes), (void*)(uintptr_t)*out, bytes,
      2) {
  void* start = NULL;
  Code code = allocate(&start, bytes, 2);
  if (!code) *out = (Address)(uintptr_t)start;
  return code;
}

TAKEN(cuMemFree_v2, (Address address), (address), (void*)(uintptr_t)address) {
  return release(address, 2);
}

DRIVER(cuMemcpyHtoD_v2, (Address to, const void* from, size_t bytes), (to, from, bytes)) {
  return copy((void*)(uintptr_t)to, from, bytes, to);
}

DRIVER(cuMemcpyDtoH_v2, (void* to, Address from, size_t bytes), (to, from, bytes)) {
  return copy(to, (void*)(uintptr_t)from, bytes, from);
}

GIVEN(cuMemHostAlloc, (void** out, size_t bytes, unsigned flags), (out, bytes, flags), *out, bytes,
      1) {
  return flags > 7 ? kInvalidValue : allocate(out, bytes, 1);
}

TAKEN(cuMemFreeHost, (void* host), (host), host) { return release((Address)(uintptr_t)host, 1); }

DRIVER(cuMemHostGetDevicePointer_v2, (Address * out, void* host, unsigned flags),
       (out, host, flags)) {
  struct Block block = block_of((Address)(uintptr_t)host);
  *out = (Address)(uintptr_t)host;
  return block.memory_type == 1 && !flags ? kOk : kInvalidValue;
}

DRIVER(cuPointerGetAttributes, (unsigned n, const int* which, void** data, Address address),
       (n, which, data, address)) {
  struct Block block = block_of(address);
  for (unsigned i = 0; i < n; ++i) {
    if (which[i] == 2) *(unsigned*)data[i] = (unsigned)block.memory_type;
    if (which[i] == 9) *(int*)data[i] = block.start ? 0 : -2;
    if (which[i] != 2 && which[i] != 9) return kInvalidValue;
  }
  return kOk;
}

// The map is what it was told: element << 32 | rank, address, sizes (5 words), strides (4), boxes
// (two a word, 3), nothing, and the four modes.
DRIVER(cuTensorMapEncodeTiled,
       (void* map, int element, uint32_t rank, void* address, const uint64_t* sizes,
        const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleave,
        int swizzle, int promotion, int fill),
       (map, element, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion,
        fill)) {
  uint64_t* words = map;
  if ((uintptr_t)map % 64 || (uintptr_t)address % 16 || rank < 1 || rank > 5) return kInvalidValue;
  memset(words, 0, 128);
  words[0] = (uint64_t)element << 32 | rank;
  words[1] = (uint64_t)(uintptr_t)address;
  for (uint32_t i = 0; i < rank; ++i) {
    if (!sizes[i] || box[i] < 1 || box[i] > 256 || steps[i] != 1) return kInvalidValue;
    words[2 + i] = sizes[i];
    if (i > 0 && strides[i - 1] % 16) return kInvalidValue;
    if (i > 0) words[6 + i] = strides[i - 1];
    words[11 + i / 2] |= (uint64_t)box[i] << (i % 2 * 32);
  }
  words[15] = (uint64_t)interleave << 24 | (uint64_t)swizzle << 16 | (uint64_t)promotion << 8 |
              (uint64_t)fill;
  return kOk;
}
