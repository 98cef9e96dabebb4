// C++17: the same header, the same forward pass, handles in RAII.
#include "smoke.h"

#include <memory>
#include <type_traits>
#include <vector>

static_assert(std::is_trivially_copyable<compactattn_forward_args>::value, "plain memory");
static_assert(std::is_same<std::underlying_type<compactattn_status>::type, int32_t>::value,
              "an int32_t");

namespace {

struct Destroy {
  void operator()(compactattn_context *context) const {
    (void)compactattn_context_destroy(context);
  }
  void operator()(compactattn_plan *plan) const { (void)compactattn_plan_destroy(plan); }
};

}  // namespace

int main() {
  compactattn_context_desc desc{};
  desc.struct_size = sizeof desc;
  desc.abi_version = COMPACTATTN_ABI_VERSION;
  desc.device_kind = COMPACTATTN_DEVICE_CPU;
  compactattn_context *raw = nullptr;
  CHECK(compactattn_context_create(&desc, &raw) == COMPACTATTN_OK);
  std::unique_ptr<compactattn_context, Destroy> context(raw);

  compactattn_sizes sizes{};
  std::unique_ptr<compactattn_plan, Destroy> plan(new_plan(context.get(), &sizes));
  std::unique_ptr<Memory, decltype(&free)> memory(new_memory(), &free);
  std::vector<unsigned char> block(static_cast<size_t>(sizes.workspace_bytes) +
                                   sizes.workspace_alignment);
  void *workspace = block.data();
  size_t space = block.size();
  CHECK(std::align(sizes.workspace_alignment, static_cast<size_t>(sizes.workspace_bytes), workspace,
                   space));

  const compactattn_batch batch = batch_of(memory.get());
  const int64_t lse_shape[2] = {kQHeads, kTotalQ};
  compactattn_forward_args args{};
  args.struct_size = sizeof args;
  args.batch = &batch;
  args.out = q_like(memory->out);
  args.lse = tensor(memory->lse, COMPACTATTN_DTYPE_F32, 2, lse_shape);
  args.workspace = workspace;
  args.workspace_bytes = sizes.workspace_bytes;
  CHECK(compactattn_forward(plan.get(), &args) == COMPACTATTN_OK);
  CHECK(worst_error(memory.get()) < SMOKE_TOLERANCE);
  return 0;
}
