// Parameters of kernels, as counting_driver.c tells them; part of that file.
#ifndef COUNTING_KERNELS_H
#define COUNTING_KERNELS_H

static int has(const char* name, const char* part) { return strstr(name, part) != NULL; }

static void add_param(struct Function* function, size_t bytes) {
  function->param_bytes[function->num_params++] = bytes;
}

// Of real images: maps of 128 bytes, then those of cuda/params.h (Step 488, AttendParams 296), then
// a number of the launch's own. Exports, merges, gates and means are not among them.
static void describe_real(struct Function* function, const char* name) {
  int attends = has(name, "_attend_") || has(name, "_combine_");
  int maps = has(name, "_attend_sm90_") ? 3 : has(name, "_sm90_") ? 1 : 0;
  for (int i = 0; i < maps; ++i) add_param(function, 128);
  add_param(function, attends ? 296 : 488);
  if (has(name, "_cells_") || has(name, "_two_level_mass") || has(name, "_union_table") ||
      has(name, "_fill_scores")) {
    add_param(function, 4);
  }
}

// Parameters of a kernel. "FAKE name:bytes,bytes; .." after a fatbin's header says them; for a real
// image they are those of describe_real.
static int describe(struct Function* function, const char* image, const char* name) {
  const char* text = image + 16;
  if (strncmp(text, "FAKE ", 5)) {
    describe_real(function, name);
    return 1;
  }
  char key[98];
  snprintf(key, sizeof key, " %.95s:", name);
  const char* at = strstr(text, key);
  if (!at) return 0;
  at += strlen(key) - 1;
  do {
    function->param_bytes[function->num_params++] = strtoul(at + 1, (char**)&at, 10);
  } while (*at == ',' && function->num_params < 8);
  return 1;
}

#endif
