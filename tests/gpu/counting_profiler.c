// A stand-in for a profiler that takes NVTX ranges: it attaches by NVTX's injection protocol, as
// the toolkit's nvtxTypes.h has it, and writes down what each thread pushes and pops: "(name" and
// ")". At the end of the process the log of the first thread goes to the file of FAKE_NVTX_LOG.
// -DFAKE_REFUSES: it does not start. -DFAKE_DEAF: it starts and attaches to nothing.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
  kCallbacksTable = 1,
  kVersionTable = 3,
  kCoreModule = 1,
  kPush = 9,
  kPop = 11,
  kFunctions = 16,
  kModules = 6
};

typedef void (*Function)(void);
typedef Function** Table;
typedef const void* (*GetExportTable)(uint32_t id);

struct Callbacks {
  size_t struct_bytes;
  int (*get_module_function_table)(int module, Table* table, unsigned int* size);
};

struct Version {
  size_t struct_bytes;
  uint32_t version;
  uint32_t reserved;
  void (*set_version)(uint32_t version);
};

static __thread char log_text[1 << 16];
static __thread size_t log_bytes;

static int note(const char* mark, const char* name) {
  size_t room = sizeof log_text - log_bytes;
  int bytes = snprintf(log_text + log_bytes, room, "%s%s", mark, name);
  if (bytes > 0 && (size_t)bytes < room) log_bytes += (size_t)bytes;
  return 0;
}

static int push(const char* name) { return note("(", name); }
static int pop(void) { return note(")", ""); }

// What this thread has pushed and popped since it was last asked.
const char* fake_ranges(void);
const char* fake_ranges(void) {
  static __thread char taken[sizeof log_text];
  memcpy(taken, log_text, log_bytes);
  taken[log_bytes] = 0;
  log_bytes = 0;
  return taken;
}

static void write_log(void) {
  const char* path = getenv("FAKE_NVTX_LOG");
  FILE* file = path ? fopen(path, "w") : NULL;
  if (!file) return;
  fwrite(log_text, 1, log_bytes, file);
  fclose(file);
}

int InitializeInjectionNvtx2(GetExportTable get_export_table);
int InitializeInjectionNvtx2(GetExportTable get_export_table) {
#ifdef FAKE_REFUSES
  return get_export_table == NULL;
#else
  const struct Version* version = get_export_table(kVersionTable);
  if (!version || version->struct_bytes < sizeof *version || version->version != 3) return 0;
  version->set_version(2);
  const struct Callbacks* callbacks = get_export_table(kCallbacksTable);
  if (!callbacks || callbacks->struct_bytes < sizeof *callbacks || get_export_table(99)) return 0;
  Table table = NULL;
  unsigned int size = 0;
  if (callbacks->get_module_function_table(99, &table, &size)) return 0;
#ifndef FAKE_DEAF
  // Profilers fill what they are given of every module, and not all look at what the call returns.
  for (int module = 1; module <= kModules; ++module) {
    table = NULL;
    callbacks->get_module_function_table(module, &table, &size);
    for (unsigned int i = 1; i < size; ++i) *table[i] = (Function)pop;
  }
#endif
  if (!callbacks->get_module_function_table(kCoreModule, &table, &size)) return 0;
  // Number 0 is no function; the others all have their place.
  if (size < kFunctions || table[0]) return 0;
  for (unsigned int i = 1; i < kFunctions; ++i)
    if (!table[i]) return 0;
#ifndef FAKE_DEAF
  *table[kPush] = (Function)push;
  *table[kPop] = (Function)pop;
#endif
  atexit(write_log);
  return 1;
#endif
}
