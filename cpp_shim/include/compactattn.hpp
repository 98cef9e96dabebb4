// CompactAttention for C++17: owning handles and typed tensors over compactattn.h, header-only.
//
//   auto context = compactattn::Context::cpu();
//   compactattn::PlanDesc desc;     // every struct starts zeroed, which means defaults
//   desc.num_q_heads = 32;          // ... and the other fields of compactattn_plan_desc
//   auto plan = compactattn::Plan::create(context, desc);
//   auto workspace = plan.workspace();
//
//   compactattn::ForwardArgs args;  // each step and layer: batch, out, and
//   workspace.lend(args);
//   plan.forward(args);
//
// Failures throw compactattn::Error. With COMPACTATTN_NO_EXCEPTIONS (set by itself under
// -fno-exceptions) nothing throws: what would return T returns Result<T>, what would return nothing
// returns Status, and neither may be ignored. Both kinds may meet in one program.
//
// Calls on the per-step path (forward, the stages, stats) allocate nothing here unless they fail.
// Structs are those of compactattn.h, whose comments say what each field means; what they point to
// is borrowed for the call.
#pragma once

#include <compactattn.h>

#include <compactattn/status.hpp>
#include <compactattn/tensor.hpp>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <utility>

namespace compactattn {
inline namespace COMPACTATTN_REPORTING {

// Everything that steers selection in one layer; change fields after creation.
struct Settings : Sized<compactattn_settings> {
  // Those a selector is published (or measured) with.
  [[nodiscard]] static Returned<Settings> of(compactattn_selector selector) {
    Settings settings;
    const Status status(compactattn_settings_init(selector, &settings));
    return detail::done(status, settings);
  }

  // Those of a preset.
  [[nodiscard]] static Returned<Settings> of_mode(compactattn_mode mode) {
    Settings settings;
    const Status status(compactattn_settings_from_mode(mode, &settings));
    return detail::done(status, settings);
  }

  // What COMPACTATTN_MODE and the file in COMPACTATTN_CONFIG ask for; layer -1 = any that the file
  // does not name.
  [[nodiscard]] static Returned<Settings> from_env(std::int32_t layer = -1) {
    Settings settings;
    const Status status(compactattn_settings_from_env(layer, &settings));
    return detail::done(status, settings);
  }
};

// Owned host memory, aligned; empty until created. A CUDA context needs device memory of the
// engine's instead.
class Workspace {
 public:
  Workspace() = default;

  [[nodiscard]] static Returned<Workspace> create(std::size_t bytes, std::size_t alignment) {
    Workspace made;
    Status status = made.allocate(bytes, alignment);
    return detail::done(std::move(status), std::move(made));
  }

  [[nodiscard]] void* data() const noexcept { return data_.get(); }
  [[nodiscard]] std::size_t size() const noexcept { return bytes_; }

  // Lends the memory to the call of `args` (ForwardArgs or AttendArgs); one call at a time.
  template <class Args>
  void lend(Args& args) const noexcept {
    args.workspace = data();
    args.workspace_bytes = static_cast<std::int64_t>(size());
  }

 private:
  friend class Plan;
  friend class Summaries;

  struct Free {
    std::size_t alignment;
    void operator()(void* data) const noexcept {
      ::operator delete(data, std::align_val_t(alignment));
    }
  };

  Status allocate(std::size_t bytes, std::size_t alignment) {
    void* data = ::operator new(bytes, std::align_val_t(alignment), std::nothrow);
    if (data == nullptr) {
      const std::string wanted = std::to_string(bytes) + " bytes";
      return Status(COMPACTATTN_E_OUT_OF_MEMORY, "E_OUT_OF_MEMORY: workspace: wanted " + wanted);
    }
    data_ = {data, Free{alignment}};
    bytes_ = bytes;
    return Status();
  }

  std::unique_ptr<void, Free> data_{nullptr, Free{1}};
  std::size_t bytes_ = 0;
};

// One device. Any number of threads may use it.
class Context {
 public:
  // The CPU, with `num_threads` threads a call; 0 = the cores this process may use.
  [[nodiscard]] static Returned<Context> cpu(std::int32_t num_threads = 0) {
    Sized<compactattn_context_desc> desc;
    desc.device_kind = COMPACTATTN_DEVICE_CPU;
    desc.num_threads = num_threads;
    return create(desc);
  }

  // A CUDA device.
  [[nodiscard]] static Returned<Context> cuda(std::int32_t ordinal) {
    Sized<compactattn_context_desc> desc;
    desc.device_kind = COMPACTATTN_DEVICE_CUDA;
    desc.device_ordinal = ordinal;
    return create(desc);
  }

  [[nodiscard]] const compactattn_context* get() const noexcept { return handle_.get(); }

 private:
  struct Destroy {
    void operator()(compactattn_context* handle) const noexcept {
      static_cast<void>(compactattn_context_destroy(handle));
    }
  };

  static Returned<Context> create(Sized<compactattn_context_desc>& desc) {
    desc.abi_version = COMPACTATTN_ABI_VERSION;
    compactattn_context* handle = nullptr;
    const Status status(compactattn_context_create(&desc, &handle));
    return detail::done(status, Context(handle));
  }

  explicit Context(compactattn_context* handle) noexcept : handle_(handle) {}

  std::unique_ptr<compactattn_context, Destroy> handle_;
};

// Shapes and settings of one model on one rank; keeps its context's device. Any number of threads
// may use it, each with a workspace of its own.
class Plan {
 public:
  [[nodiscard]] static Returned<Plan> create(const Context& context, const PlanDesc& desc) {
    compactattn_plan* handle = nullptr;
    const Status status(compactattn_plan_create(context.get(), &desc, &handle));
    return detail::done(status, Plan(handle, desc));
  }

  // How create would end, with the reason; it never throws, so an engine can choose another path
  // in advance.
  static Status supports(const Context& context, const PlanDesc& desc) {
    return Status(compactattn_supports(context.get(), &desc, nullptr, 0));
  }

  // Buffer sizes of a layer's largest step; `settings` are the call's own, if not the plan's.
  [[nodiscard]] Returned<Sizes> sizes(std::int32_t layer = 0,
                                      const compactattn_settings* settings = nullptr) const {
    Sizes out;
    const Status status(compactattn_plan_sizes(get(), layer, settings, &out));
    return detail::done(status, out);
  }

  // Host memory for the largest step of every layer.
  [[nodiscard]] Returned<Workspace> workspace() const {
    Sizes out;
    Workspace made;
    Status status(compactattn_plan_sizes(get(), 0, nullptr, &out));
    if (status.ok()) {
      status =
          made.allocate(static_cast<std::size_t>(out.workspace_bytes), out.workspace_alignment);
    }
    return detail::done(std::move(status), std::move(made));
  }

  // Bytes of k_mean (and as many of v_mean) for a pool of `num_pages`.
  [[nodiscard]] Returned<std::int64_t> summary_bytes(std::int32_t layer,
                                                     std::int64_t num_pages) const {
    std::int64_t bytes = 0;
    const Status status(compactattn_summary_bytes(get(), layer, num_pages, &bytes));
    return detail::done(status, bytes);
  }

  // What the layer's calls have selected; layer -1 = all layers together.
  [[nodiscard]] Returned<Stats> stats(std::int32_t layer = -1) const {
    Stats out;
    const Status status(compactattn_plan_stats(get(), layer, &out));
    return detail::done(status, out);
  }

  // Summaries of the blocks this step completes (or all): after its KV is written.
  Done update_summaries(std::int32_t layer, const Batch& batch,
                        const compactattn_summaries* summaries,
                        compactattn_which which = COMPACTATTN_WHICH_COMPLETED) const {
    return detail::done(
        Status(compactattn_summaries_update(get(), layer, &batch, which, summaries)));
  }

  // All stages, one layer of one step.
  Done forward(const ForwardArgs& args) const {
    return detail::done(Status(compactattn_forward(get(), &args)));
  }

  // The stages one by one, for engines that keep or replace what lies between.
  Done select(std::int32_t layer, const Batch& batch, const compactattn_summaries* summaries,
              const Selection& out) const {
    return detail::done(Status(compactattn_select(get(), layer, &batch, summaries, &out)));
  }

  // Scores or masks to lists; the batch's list rows. Stage "union", a word C++ keeps for itself.
  Returned<std::int64_t> unite(std::int32_t layer, const Batch& batch, const Selection& selection,
                               const compactattn_tensor& lists) const {
    std::int64_t rows = 0;
    const Status status(compactattn_union(get(), layer, &batch, &selection, &lists, &rows));
    return detail::done(status, rows);
  }

  Done build_table(std::int32_t layer, const Batch& batch, const compactattn_tensor& lists,
                   const Table& out) const {
    return detail::done(Status(compactattn_table_build(get(), layer, &batch, &lists, &out)));
  }

  Done export_padded(std::int32_t layer, const Batch& batch, const compactattn_tensor& lists,
                     const Padded& out) const {
    return detail::done(
        Status(compactattn_table_export_padded(get(), layer, &batch, &lists, &out)));
  }

  // The entries written to out.indices.
  Returned<std::int64_t> export_csr(std::int32_t layer, const Batch& batch,
                                    const compactattn_tensor& lists, const Csr& out) const {
    std::int64_t entries = 0;
    const Status status(compactattn_table_export_csr(get(), layer, &batch, &lists, &out, &entries));
    return detail::done(status, entries);
  }

  Done attend(const AttendArgs& args) const {
    return detail::done(Status(compactattn_attend(get(), &args)));
  }

  Done combine(const CombineArgs& args) const {
    return detail::done(Status(compactattn_combine(get(), &args)));
  }

  [[nodiscard]] const compactattn_plan* get() const noexcept { return handle_.get(); }
  [[nodiscard]] std::int64_t num_kv_heads() const noexcept { return num_kv_heads_; }
  [[nodiscard]] std::int64_t head_dim() const noexcept { return head_dim_; }

 private:
  struct Destroy {
    void operator()(compactattn_plan* handle) const noexcept {
      static_cast<void>(compactattn_plan_destroy(handle));
    }
  };

  Plan(compactattn_plan* handle, const PlanDesc& desc) noexcept
      : handle_(handle), num_kv_heads_(desc.num_kv_heads), head_dim_(desc.head_dim) {}

  std::unique_ptr<compactattn_plan, Destroy> handle_;
  std::int64_t num_kv_heads_;
  std::int64_t head_dim_;
};

// Owned mean keys (and values) of a host pool's whole blocks, for one layer, sealed: calls that
// read them make anew those whose keys have changed.
class Summaries {
 public:
  // For a pool of `num_pages`; values are needed for mean_correction only.
  [[nodiscard]] static Returned<Summaries> create(const Plan& plan, std::int32_t layer,
                                                  std::int64_t num_pages,
                                                  bool with_values = false) {
    Summaries made;
    Status status = made.allocate(plan, layer, num_pages, with_values);
    return detail::done(std::move(status), std::move(made));
  }

  // What was moved from holds nothing, and calls refuse it.
  Summaries(Summaries&& from) noexcept
      : memory_(std::move(from.memory_)), view_(std::exchange(from.view_, {})) {}
  Summaries& operator=(Summaries&& from) noexcept {
    if (this != &from) {
      memory_ = std::move(from.memory_);
      view_ = std::exchange(from.view_, {});
    }
    return *this;
  }

  [[nodiscard]] const compactattn_summaries* get() const noexcept { return &view_; }

 private:
  Summaries() = default;

  Status allocate(const Plan& plan, std::int32_t layer, std::int64_t num_pages, bool with_values) {
    Sizes sizes;
    std::int64_t bytes = 0;
    Status status(compactattn_plan_sizes(plan.get(), layer, nullptr, &sizes));
    if (status.ok()) {
      status = Status(compactattn_summary_bytes(plan.get(), layer, num_pages, &bytes));
    }
    const std::int64_t heads = num_pages * sizes.summary_slots_per_page * plan.num_kv_heads();
    const std::int64_t means = bytes * (with_values ? 2 : 1);
    const auto seal_bytes = static_cast<std::int64_t>(2 * sizeof(std::uint32_t)) * heads;
    if (status.ok()) {
      status =
          memory_.allocate(static_cast<std::size_t>(means + seal_bytes), sizes.workspace_alignment);
    }
    if (!status.ok()) return status;
    auto* const first_seal = static_cast<char*>(memory_.data()) + means;
    // Zeros seal nothing: what was never written is never read.
    std::memset(first_seal, 0, static_cast<std::size_t>(seal_bytes));
    view_.seals = tensor(reinterpret_cast<std::uint32_t*>(first_seal),
                         {num_pages, sizes.summary_slots_per_page, plan.num_kv_heads(), 2});
    view_.seals.storage_bytes = seal_bytes;
    const auto view = [&](std::int64_t offset_bytes) {
      auto* data = reinterpret_cast<float*>(static_cast<char*>(memory_.data()) + offset_bytes);
      auto shaped = tensor(
          data, {num_pages, sizes.summary_slots_per_page, plan.num_kv_heads(), plan.head_dim()});
      shaped.storage_bytes = bytes;
      return shaped;
    };
    view_.k_mean = view(0);
    if (with_values) view_.v_mean = view(bytes);
    return status;
  }

  Workspace memory_;
  Sized<compactattn_summaries> view_;
};

// "0.1.0" of the library that is loaded, not of the header.
[[nodiscard]] inline std::string version() {
  const std::uint32_t packed = compactattn_version();
  return std::to_string(packed >> 24) + "." + std::to_string(packed >> 16 & 0xff) + "." +
         std::to_string(packed >> 8 & 0xff);
}

}  // namespace COMPACTATTN_REPORTING
}  // namespace compactattn
