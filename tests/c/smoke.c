/* C99: the header compiles, its layouts are what the library was built with, and a forward pass is
 * attention. */
#include "smoke.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define SAME(condition) extern char JOIN(same_, __LINE__)[(condition) ? 1 : -1]
#define AT(type, field, offset) SAME(offsetof(type, field) == (offset))

SAME(sizeof(compactattn_tensor) == 96);
AT(compactattn_tensor, stride, 40);
AT(compactattn_tensor, storage_bytes, 72);
AT(compactattn_tensor, device_ordinal, 92);
SAME(sizeof(compactattn_context_desc) == 24);
AT(compactattn_context_desc, num_threads, 16);
SAME(sizeof(compactattn_settings) == 96);
AT(compactattn_settings, keep_value, 24);
AT(compactattn_settings, two_level_factor, 92);
SAME(sizeof(compactattn_plan_desc) == 120);
AT(compactattn_plan_desc, max_total_q, 40);
AT(compactattn_plan_desc, settings, 56);
AT(compactattn_plan_desc, num_splits, 96);
AT(compactattn_plan_desc, reserved, 116);
SAME(sizeof(compactattn_batch) == 800);
AT(compactattn_batch, block_table, 488);
SAME(sizeof(compactattn_summaries) == 296);
AT(compactattn_summaries, seals, 200);
SAME(sizeof(compactattn_selection) == 200);
SAME(sizeof(compactattn_table) == 296);
SAME(sizeof(compactattn_padded) == 296);
SAME(sizeof(compactattn_csr) == 296);
SAME(sizeof(compactattn_forward_args) == 256);
AT(compactattn_forward_args, out, 40);
AT(compactattn_forward_args, workspace, 232);
SAME(sizeof(compactattn_attend_args) == 256);
AT(compactattn_attend_args, stream, 248);
SAME(sizeof(compactattn_combine_args) == 592);
SAME(sizeof(compactattn_sizes) == 104);
SAME(sizeof(compactattn_stats) == 72);

static void *aligned(void *from, size_t to) {
  return (void *)(((uintptr_t)from + to - 1) / to * to);
}

int main(void) {
  compactattn_context_desc desc;
  compactattn_context *context = NULL;
  compactattn_plan *plan;
  compactattn_sizes sizes;
  compactattn_batch batch;
  compactattn_forward_args args;
  compactattn_stats stats;
  Memory *memory = new_memory();
  void *block;
  char text[320];

  CHECK(compactattn_abi_version() == COMPACTATTN_ABI_VERSION);
  CHECK(compactattn_version() >> 24 == COMPACTATTN_VERSION_MAJOR);
  CHECK(compactattn_build_info(text, sizeof text) > 0);
  printf("%s\n", text);

  memset(&desc, 0, sizeof desc);
  desc.struct_size = sizeof desc;
  desc.abi_version = COMPACTATTN_ABI_VERSION;
  desc.device_kind = COMPACTATTN_DEVICE_CPU;
  desc.num_threads = 2;
  CHECK(compactattn_context_create(&desc, &context) == COMPACTATTN_OK);
  plan = new_plan(context, &sizes);

  batch = batch_of(memory);
  block = malloc((size_t)sizes.workspace_bytes + sizes.workspace_alignment);
  CHECK(block != NULL);
  memset(&args, 0, sizeof args);
  args.struct_size = sizeof args;
  args.batch = &batch;
  args.out = q_like(memory->out);
  {
    const int64_t shape[2] = {kQHeads, kTotalQ};
    args.lse = tensor(memory->lse, COMPACTATTN_DTYPE_F32, 2, shape);
  }
  args.workspace = aligned(block, sizes.workspace_alignment);
  args.workspace_bytes = sizes.workspace_bytes;
  CHECK(compactattn_forward(plan, &args) == COMPACTATTN_OK);
  printf("largest difference from plain attention: %.1e\n", worst_error(memory));
  CHECK(worst_error(memory) < SMOKE_TOLERANCE);

  memset(&stats, 0, sizeof stats);
  stats.struct_size = sizeof stats;
  CHECK(compactattn_plan_stats(plan, -1, &stats) == COMPACTATTN_OK);
  CHECK(stats.calls == 1 && stats.lists == stats.dense && stats.lists == kReqs * kQHeads);

  args.workspace_bytes = 16;
  CHECK(compactattn_forward(plan, &args) == COMPACTATTN_E_WORKSPACE);
  CHECK(compactattn_last_error(text, sizeof text) == strlen(text));
  CHECK(strstr(text, "E_WORKSPACE: args.workspace") == text);
  CHECK(strcmp(compactattn_status_string(COMPACTATTN_E_WORKSPACE), "E_WORKSPACE") == 0);

  CHECK(compactattn_plan_destroy(plan) == COMPACTATTN_OK);
  CHECK(compactattn_plan_destroy(plan) == COMPACTATTN_E_HANDLE);
  CHECK(compactattn_plan_destroy(NULL) == COMPACTATTN_OK);
  CHECK(compactattn_context_destroy(context) == COMPACTATTN_OK);
  free(block);
  free(memory);
  return 0;
}
