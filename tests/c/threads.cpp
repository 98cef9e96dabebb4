// Threads that share everything a caller may share, for ThreadSanitizer: one context, one plan, its
// statistics, and the registry of handles, in which other threads make and destroy plans, and use
// some that are gone.
//
//   threads SECONDS          exits with 0 if all results are right and no call has an unexpected
//   status threads race             makes a race of its own first, which a sanitizer that is on
//   must report
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "smoke.h"

namespace {

constexpr int kThreads = 8;

struct Shared {
  compactattn_context* context;
  compactattn_plan* plan;
  compactattn_sizes sizes;
  // Shorter-lived ones, which any thread may replace.
  std::atomic<compactattn_plan*> passing;
  std::atomic<bool> over{false};
  std::atomic<long> calls{0};
  const float* wanted;
};

void* workspace(const compactattn_sizes& sizes) {
  const size_t unit = sizes.workspace_alignment;
  return std::aligned_alloc(unit, (sizes.workspace_bytes + unit - 1) / unit * unit);
}

// A pass with memory of its own; its status.
compactattn_status pass(compactattn_plan* plan, const compactattn_sizes& sizes, Memory* memory,
                        void* block) {
  const compactattn_batch batch = batch_of(memory);
  compactattn_forward_args args;
  std::memset(&args, 0, sizeof args);
  args.struct_size = sizeof args;
  args.batch = &batch;
  args.out = q_like(memory->out);
  const int64_t shape[2] = {kQHeads, kTotalQ};
  args.lse = tensor(memory->lse, COMPACTATTN_DTYPE_F32, 2, shape);
  args.workspace = block;
  args.workspace_bytes = sizes.workspace_bytes;
  return compactattn_forward(plan, &args);
}

// What one thread does until the time is over; turns differ from thread to thread.
void live(Shared& shared, int self) {
  Memory* memory = new_memory();
  void* block = workspace(shared.sizes);
  for (unsigned turn = self; !shared.over.load(); ++turn, ++shared.calls) {
    if (turn % 4 == 0) {
      compactattn_sizes sizes;
      compactattn_plan* fresh = new_plan(shared.context, &sizes);
      compactattn_plan* old = shared.passing.exchange(fresh);
      const compactattn_status status = compactattn_plan_destroy(old);
      CHECK(status == COMPACTATTN_OK);
      CHECK(compactattn_plan_destroy(old) != COMPACTATTN_OK || old == nullptr);
    } else if (turn % 4 == 1) {
      compactattn_stats stats;
      std::memset(&stats, 0, sizeof stats);
      stats.struct_size = sizeof stats;
      CHECK(compactattn_plan_stats(shared.plan, -1, &stats) == COMPACTATTN_OK && stats.calls >= 0);
    } else if (turn % 4 == 2) {
      // Somebody may destroy it before or during the call.
      const compactattn_status status = pass(shared.passing, shared.sizes, memory, block);
      CHECK(status == COMPACTATTN_OK || status == COMPACTATTN_E_HANDLE);
    } else {
      CHECK(pass(shared.plan, shared.sizes, memory, block) == COMPACTATTN_OK);
      CHECK(std::memcmp(memory->out, shared.wanted, sizeof memory->out) == 0);
    }
    std::this_thread::yield();
  }
  std::free(block);
  std::free(memory);
}

int counted_without_a_lock;

void race() {
  std::thread other([] { ++counted_without_a_lock; });
  ++counted_without_a_lock;
  other.join();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "race") == 0) {
    race();
    return 0;
  }
  Shared shared{};
  compactattn_context_desc desc;
  std::memset(&desc, 0, sizeof desc);
  desc.struct_size = sizeof desc;
  desc.abi_version = COMPACTATTN_ABI_VERSION;
  desc.device_kind = COMPACTATTN_DEVICE_CPU;
  desc.num_threads = 1;
  CHECK(compactattn_context_create(&desc, &shared.context) == COMPACTATTN_OK);
  shared.plan = new_plan(shared.context, &shared.sizes);
  compactattn_sizes sizes;
  shared.passing = new_plan(shared.context, &sizes);
  Memory* memory = new_memory();
  void* block = workspace(shared.sizes);
  CHECK(pass(shared.plan, shared.sizes, memory, block) == COMPACTATTN_OK);
  shared.wanted = memory->out;
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back(live, std::ref(shared), i);
  std::this_thread::sleep_for(std::chrono::seconds(argc > 1 ? std::atoi(argv[1]) : 5));
  shared.over = true;
  for (std::thread& thread : threads) thread.join();
  CHECK(compactattn_plan_destroy(shared.passing.load()) == COMPACTATTN_OK);
  CHECK(compactattn_plan_destroy(shared.plan) == COMPACTATTN_OK);
  CHECK(compactattn_context_destroy(shared.context) == COMPACTATTN_OK);
  printf("%d threads, %ld turns\n", kThreads, shared.calls.load());
  std::free(block);
  std::free(memory);
  return 0;
}
