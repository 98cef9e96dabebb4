// The C++ shim as a program uses it. Built twice: with exceptions and without.
#include <compactattn.hpp>
#include <cstdio>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

namespace ca = compactattn;

// other_mode.cpp, compiled with the other way of reporting.
bool other_mode_refuses_and_accepts();

// Calls of operator new so far (count_allocations.cpp).
std::size_t allocations();

namespace {

int failures = 0;

void expect(bool condition, const char* sentence) {
  if (condition) return;
  std::fprintf(stderr, "FAILED: %s\n", sentence);
  ++failures;
}

// Both ways of reporting as one, so that each test is written once.
#ifdef COMPACTATTN_NO_EXCEPTIONS
template <class Call>
ca::Status status_of(Call call) {
  auto result = call();
  if constexpr (std::is_same_v<decltype(result), ca::Status>) {
    return result;
  } else {
    return result.status();
  }
}
template <class T>
T take(ca::Result<T> result) {
  return std::move(result).value();
}
void must(const ca::Status& status) { expect(status.ok(), status.message().c_str()); }
#define MUST(call) must(call)
#else
template <class Call>
ca::Status status_of(Call call) {
  try {
    static_cast<void>(call());
  } catch (const ca::Error& error) {
    return ca::Status(error.code(), error.what());
  }
  return ca::Status();
}
template <class T>
T take(T value) {
  return value;
}
#define MUST(call) call
#endif

constexpr std::int64_t kTokens = 40;
constexpr std::int64_t kHeads = 2;
constexpr std::int64_t kHeadDim = 64;
constexpr std::int64_t kPages = 4;
constexpr std::int64_t kPageSize = 16;

ca::PlanDesc good_desc() {
  ca::PlanDesc desc;
  desc.num_q_heads = kHeads;
  desc.num_kv_heads = 1;
  desc.head_dim = kHeadDim;
  desc.page_size = kPageSize;
  desc.dtype = COMPACTATTN_DTYPE_F32;
  desc.max_num_reqs = 1;
  desc.max_total_q = kTokens;
  desc.max_kv_len = kPages * kPageSize;
  return desc;
}

// One request of kTokens tokens whose values are all 2: whatever is attended to, each output is 2.
struct Fixture {
  std::vector<float> q = std::vector<float>(kTokens * kHeads * kHeadDim, 0.25F);
  std::vector<float> k = std::vector<float>(kPages * kPageSize * kHeadDim, 0.5F);
  std::vector<float> v = std::vector<float>(kPages * kPageSize * kHeadDim, 2.0F);
  std::vector<float> out = std::vector<float>(kTokens * kHeads * kHeadDim);
  std::vector<std::int32_t> cu_seqlens_q = {0, kTokens};
  std::vector<std::int32_t> seq_lens = {kTokens};
  std::vector<std::int32_t> block_table = {3, 0, 2};

  ca::Batch batch() {
    ca::Batch batch;
    batch.q = ca::tensor(q, {kTokens, kHeads, kHeadDim});
    batch.k = ca::tensor(k, {kPages, kPageSize, 1, kHeadDim});
    batch.v = ca::tensor(v, {kPages, kPageSize, 1, kHeadDim});
    batch.cu_seqlens_q = ca::tensor(cu_seqlens_q, {2});
    batch.seq_lens = ca::tensor(seq_lens, {1});
    batch.block_table = ca::tensor(block_table, {1, 3});
    return batch;
  }

  ca::ForwardArgs args(const ca::Batch& batch, const ca::Workspace& workspace) {
    ca::ForwardArgs args;
    args.batch = &batch;
    args.out = ca::tensor(out, {kTokens, kHeads, kHeadDim});
    workspace.lend(args);
    return args;
  }
};

void tensors_know_their_type_and_strides() {
  std::vector<ca::Bf16> data(64);
  const compactattn_tensor whole = ca::tensor(data, {2, 4, 8});
  expect(whole.dtype == COMPACTATTN_DTYPE_BF16 && whole.ndim == 3, "dtype and ndim are deduced");
  expect(whole.stride[0] == 32 && whole.stride[1] == 8 && whole.stride[2] == 1,
         "strides default to contiguous ones");
  expect(whole.storage_bytes == 128, "a container's size is passed on");
  const compactattn_tensor view = ca::tensor(data.data(), {4, 2, 8}, {8, 32, 1});
  expect(view.stride[0] == 8 && view.stride[1] == 32, "given strides are kept");
  expect(ca::tensor(data.data(), {4, 2}, {8}).ndim == -1,
         "strides that do not fit the shape are no tensor");
  expect(ca::tensor(data.data(), {1, 1, 1, 1, 1}).ndim == -1, "five dimensions are no tensor");
  expect(ca::on_cuda(view, 1).device_kind == COMPACTATTN_DEVICE_CUDA,
         "a tensor can say where it lies");
}

void a_refused_plan_says_what_was_wanted(const ca::Context& context) {
  ca::PlanDesc desc = good_desc();
  desc.head_dim = 65;
  const ca::Status status = status_of([&] { return ca::Plan::create(context, desc); });
  expect(status.code() == COMPACTATTN_E_UNSUPPORTED, "head_dim 65 is E_UNSUPPORTED");
  expect(status.message().find("head_dim") != std::string::npos, "the message names the argument");
  expect(status.message().find("65") != std::string::npos, "the message names what came");
  const ca::Status reason = ca::Plan::supports(context, desc);
  expect(reason.message() == status.message(), "supports gives the reason that create gives");
  expect(ca::Plan::supports(context, good_desc()).ok(), "supports says yes to what is offered");
}

void a_message_outlives_later_failures(const ca::Context& context) {
  ca::PlanDesc desc = good_desc();
  desc.page_size = 7;
  const ca::Status first = ca::Plan::supports(context, desc);
  desc.num_kv_heads = 0;
  const ca::Status second = ca::Plan::supports(context, desc);
  expect(first.message().find("page_size") != std::string::npos, "the first message is kept");
  expect(second.message().find("page_size") == std::string::npos, "the second is another");
}

void handles_move_and_never_copy(const ca::Context& context) {
  static_assert(!std::is_copy_constructible_v<ca::Context> && !std::is_copy_assignable_v<ca::Plan>);
  static_assert(!std::is_copy_constructible_v<ca::Workspace> &&
                !std::is_copy_constructible_v<ca::Summaries>);
  static_assert(std::is_nothrow_move_constructible_v<ca::Context> &&
                std::is_nothrow_move_assignable_v<ca::Plan> &&
                std::is_nothrow_move_constructible_v<ca::Workspace>);
  ca::Plan plan = take(ca::Plan::create(context, good_desc()));
  const compactattn_plan* handle = plan.get();
  ca::Plan moved = std::move(plan);
  expect(moved.get() == handle && plan.get() == nullptr, "a moved plan leaves nothing behind");
  moved = take(ca::Plan::create(context, good_desc()));
  ca::Sizes sizes;
  expect(compactattn_plan_sizes(handle, 0, nullptr, &sizes) == COMPACTATTN_E_HANDLE,
         "a plan that was assigned over is destroyed");
  const ca::Status status = status_of([&] { return plan.stats(); });
  expect(status.code() == COMPACTATTN_E_NULL, "a moved-from plan refuses work");
}

void a_plan_outlives_its_context() {
  auto context = std::make_unique<ca::Context>(take(ca::Context::cpu(1)));
  const ca::Plan plan = take(ca::Plan::create(*context, good_desc()));
  context.reset();
  expect(take(plan.sizes()).workspace_bytes > 0, "a plan works on after its context is gone");
}

void forward_attends_and_counts(const ca::Context& context) {
  const ca::Plan plan = take(ca::Plan::create(context, good_desc()));
  const ca::Workspace workspace = take(plan.workspace());
  const ca::Summaries summaries = take(ca::Summaries::create(plan, 0, kPages, true));
  Fixture fixture;
  const ca::Batch batch = fixture.batch();
  ca::ForwardArgs args = fixture.args(batch, workspace);
  args.summaries = summaries.get();
  const std::size_t before = allocations();
  MUST(plan.update_summaries(0, batch, summaries.get(), COMPACTATTN_WHICH_ALL));
  MUST(plan.forward(args));
  expect(allocations() == before, "a step allocates nothing on the C++ side");
  bool all_two = true;
  // An average of equal values, in at most kTokens additions: off by less than 40 units of 2^-24.
  for (const float x : fixture.out) all_two = all_two && x > 2 - 1e-5F && x < 2 + 1e-5F;
  expect(all_two, "the average of equal values is that value");
  expect(take(plan.stats()).calls == 1 && take(plan.stats(0)).calls == 1, "the call is counted");
  expect(take(plan.stats()).density() == 1.0, "without candidates the density is 1");
}

void forward_refuses_what_does_not_fit(const ca::Context& context) {
  const ca::Plan plan = take(ca::Plan::create(context, good_desc()));
  const ca::Workspace workspace = take(plan.workspace());
  Fixture fixture;
  ca::Batch batch = fixture.batch();
  ca::ForwardArgs args = fixture.args(batch, workspace);
  args.workspace_bytes = 1;
  ca::Status status = status_of([&] { return plan.forward(args); });
  expect(status.code() == COMPACTATTN_E_WORKSPACE, "a short workspace is refused");
  args = fixture.args(batch, workspace);
  fixture.block_table[1] = kPages;
  status = status_of([&] { return plan.forward(args); });
  expect(status.code() == COMPACTATTN_E_TABLE, "a page outside the pool is refused");
  expect(status.message().find("block_table") != std::string::npos, "and named");
  fixture.block_table[1] = 0;
  batch.k = ca::tensor(fixture.k, {kPages + 1, kPageSize, 1, kHeadDim});
  status = status_of([&] { return plan.forward(args); });
  expect(status.code() == COMPACTATTN_E_SHAPE, "a shape beyond its container is refused");
}

void stages_can_be_called_one_by_one(const ca::Context& context) {
  ca::Settings settings = take(ca::Settings::of(COMPACTATTN_SELECTOR_POOLED_MASS));
  settings.block_size = 16;
  ca::PlanDesc desc = good_desc();
  desc.settings = &settings;
  const ca::Plan plan = take(ca::Plan::create(context, desc));
  const ca::Sizes sizes = take(plan.sizes());
  ca::Summaries moved = take(ca::Summaries::create(plan, 0, kPages));
  const ca::Summaries summaries = std::move(moved);
  Fixture fixture;
  const ca::Batch batch = fixture.batch();
  MUST(plan.update_summaries(0, batch, summaries.get()));
  const ca::Status refused =
      status_of([&] { return plan.update_summaries(0, batch, moved.get()); });
  expect(refused.code() == COMPACTATTN_E_NULL, "moved-from summaries are refused");

  std::vector<float> scores(std::size_t(sizes.select_rows * kHeads * sizes.max_blocks));
  std::vector<std::uint32_t> lists(std::size_t(sizes.list_rows * sizes.mask_words));
  std::vector<std::int32_t> counts(std::size_t(sizes.list_rows)), lens(counts);
  std::vector<std::int32_t> boxes(std::size_t(sizes.list_rows * sizes.max_boxes));
  ca::Selection selection;
  selection.scores = ca::tensor(scores, {sizes.select_rows, kHeads, sizes.max_blocks});
  const compactattn_tensor list_bits = ca::tensor(lists, {sizes.list_rows, sizes.mask_words});
  ca::Table table;
  table.counts = ca::tensor(counts, {sizes.list_rows});
  table.stream_lens = ca::tensor(lens, {sizes.list_rows});
  table.boxes = ca::tensor(boxes, {sizes.list_rows, sizes.max_boxes});

  MUST(plan.select(0, batch, summaries.get(), selection));
  expect(take(plan.unite(0, batch, selection, list_bits)) == kHeads, "one list per head and chunk");
  MUST(plan.build_table(0, batch, list_bits, table));
  expect(counts[0] == 3 && lens[0] == kTokens, "a first chunk lists all of its own pages");
  expect(boxes[0] == 3 && boxes[1] == 0 && boxes[2] == 2, "in logical order, as physical ids");
}

}  // namespace

int main() {
  tensors_know_their_type_and_strides();
  const ca::Context context = take(ca::Context::cpu(1));
  a_refused_plan_says_what_was_wanted(context);
  a_message_outlives_later_failures(context);
  handles_move_and_never_copy(context);
  a_plan_outlives_its_context();
  forward_attends_and_counts(context);
  forward_refuses_what_does_not_fit(context);
  stages_can_be_called_one_by_one(context);
  const ca::Status cuda = status_of([] { return ca::Context::cuda(-1); });
  expect(!cuda.ok() && !cuda.message().empty(), "no device has ordinal -1");
  expect(other_mode_refuses_and_accepts(), "both ways of reporting live in one program");
  expect(ca::version() == EXPECTED_VERSION, "the loaded library has the package's version");
  std::printf("raii_test: %s\n", failures == 0 ? "ok" : "FAILED");
  return failures == 0 ? 0 : 1;
}
