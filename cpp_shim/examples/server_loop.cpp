// A small serving loop over compactattn.hpp: what an engine does around CompactAttention, and
// nothing else.
//
// Requests arrive over time. Each step mixes chunks of unfinished prompts with one token of every
// request that decodes, takes pages for the new tokens, writes their K and V into the shared pool,
// and runs attention layer by layer, twice: with the pages that matter and with all of them. It
// prints how much was read and how far the results differ.
//
//   server_loop             mode compactattn; fails if the results differ by more than kBound
//   server_loop streaming   first and last blocks only: misses what the queries ask for, and fails
#include <cmath>
#include <compactattn.hpp>
#include <cstdio>
#include <cstring>
#include <deque>
#include <vector>

#include "kv_pool.hpp"
#include "planted.hpp"

namespace ca = compactattn;

namespace {

constexpr int kLayers = 2;
constexpr int kQHeads = 4;
constexpr int kKvHeads = 2;
constexpr int kPageSize = 16;
constexpr int kNumPages = 320;
constexpr int kMaxRequests = 4;
constexpr int kStepTokens = 256;
constexpr int kMaxKvLen = 3072;
constexpr int kDecodeTokens = 3;
constexpr int kBlockSize = 64;

// Largest relative error (2-norm over all outputs). A list keeps 0.97 of the weight its sampled
// rows give to past blocks, and attention spreads the missing 0.03 over what is kept: two averages
// over values of one size, so an output moves by at most about twice 0.03.
constexpr double kBound = 0.06;

struct Request {
  std::uint64_t id;
  int arrives;
  int prompt_tokens;
  int kv_tokens = 0;
  std::vector<std::int32_t> pages = {};

  [[nodiscard]] bool decodes() const { return kv_tokens >= prompt_tokens; }
  [[nodiscard]] bool finished() const { return kv_tokens == prompt_tokens + kDecodeTokens; }
};

// The rows of one step as the library takes them; memory is reused from step to step.
struct Step {
  std::vector<Request*> requests;
  std::vector<std::int32_t> cu_seqlens_q;
  std::vector<std::int32_t> seq_lens;
  std::vector<std::int32_t> block_table;
  int decode_rows = 0;

  void clear() {
    requests.clear();
    cu_seqlens_q.assign(1, 0);
    seq_lens.clear();
    block_table.clear();
    decode_rows = 0;
  }
  [[nodiscard]] int total_q() const { return cu_seqlens_q.back(); }
  [[nodiscard]] int first_token(std::size_t row) const {
    return seq_lens[row] - (cu_seqlens_q[row + 1] - cu_seqlens_q[row]);
  }
};

struct Totals {
  double error_square = 0;
  double dense_square = 0;

  void add(const Totals& other) {
    error_square += other.error_square;
    dense_square += other.dense_square;
  }
  // Infinite for what is no number, so that it never passes.
  [[nodiscard]] double relative_error() const {
    const double error = std::sqrt(error_square / dense_square);
    return std::isfinite(error) ? error : INFINITY;
  }
};

ca::PlanDesc describe(const ca::Settings& settings) {
  ca::PlanDesc desc;
  desc.num_q_heads = kQHeads;
  desc.num_kv_heads = kKvHeads;
  desc.head_dim = kHeadDim;
  desc.page_size = kPageSize;
  desc.dtype = COMPACTATTN_DTYPE_F32;
  desc.num_layers = kLayers;
  desc.max_num_reqs = kMaxRequests;
  desc.max_total_q = kStepTokens;
  desc.max_kv_len = kMaxKvLen;
  desc.settings = &settings;
  return desc;
}

// Presets are made for long contexts. These prompts are short, so blocks are smaller, sparsity
// starts sooner, and no cap on density keeps a list from its 0.97.
ca::Settings scaled_down(ca::Settings settings) {
  settings.block_size = kBlockSize;
  settings.dense_below_kv_len = 512;
  settings.max_density = 1;
  return settings;
}

// Scheduling: which requests run, and how many tokens of each.
class Scheduler {
 public:
  explicit Scheduler(std::vector<Request> requests)
      : waiting_(requests.begin(), requests.end()), pages_(kNumPages, 7) {}

  [[nodiscard]] bool idle() const { return waiting_.empty() && running_.empty(); }

  // Fills `step` with one decode row per request past its prompt, and prompt chunks for what is
  // left of the budget.
  void schedule(int now, Step& step) {
    admit(now);
    step.clear();
    int budget = kStepTokens;
    for (const bool decode : {true, false}) {
      for (Request& request : running_) {
        if (request.decodes() != decode || budget == 0) continue;
        const int left = decode ? 1 : request.prompt_tokens - request.kv_tokens;
        const int tokens = std::min(left, budget);
        add_row(request, tokens, step);
        step.decode_rows += decode ? 1 : 0;
        budget -= tokens;
      }
    }
  }

  void retire() {
    for (auto it = running_.begin(); it != running_.end();) {
      if (it->finished()) pages_.give_back(it->pages);
      it = it->finished() ? running_.erase(it) : it + 1;
    }
  }

 private:
  // A request starts only if the pool can hold all of it beside what already runs.
  void admit(int now) {
    while (!waiting_.empty() && waiting_.front().arrives <= now && running_.size() < kMaxRequests) {
      const int needed = pages_for(waiting_.front().prompt_tokens + kDecodeTokens);
      if (pages_.available() < std::size_t(needed + promised())) return;
      running_.push_back(waiting_.front());
      waiting_.pop_front();
    }
  }

  [[nodiscard]] int promised() const {
    int pages = 0;
    for (const Request& request : running_) {
      pages += pages_for(request.prompt_tokens + kDecodeTokens) - int(request.pages.size());
    }
    return pages;
  }

  void add_row(Request& request, int tokens, Step& step) {
    request.kv_tokens += tokens;
    while (int(request.pages.size()) < pages_for(request.kv_tokens)) {
      request.pages.push_back(pages_.take());
    }
    step.requests.push_back(&request);
    step.cu_seqlens_q.push_back(step.cu_seqlens_q.back() + tokens);
    step.seq_lens.push_back(request.kv_tokens);
    // -1 after a row's own pages: nothing ever reads there.
    const std::size_t begin = step.block_table.size();
    step.block_table.resize(begin + std::size_t(pages_for(kMaxKvLen)), -1);
    std::copy(request.pages.begin(), request.pages.end(), &step.block_table[begin]);
  }

  static int pages_for(int tokens) { return (tokens + kPageSize - 1) / kPageSize; }

  std::deque<Request> waiting_;
  std::deque<Request> running_;
  PageAllocator pages_;
};

// One layer's cache and what the library keeps beside it.
struct Layer {
  KvPool pool;
  ca::Summaries summaries;
};

// The model's attention: a plan to test and a dense one to compare with.
class Model {
 public:
  Model(const ca::Context& context, const ca::Settings& settings)
      : plan_(ca::Plan::create(context, describe(settings))),
        dense_(ca::Plan::create(context, describe(ca::Settings::of_mode(COMPACTATTN_MODE_DENSE)))),
        workspace_(plan_.workspace()),
        dense_workspace_(dense_.workspace()) {
    for (int layer = 0; layer < kLayers; ++layer) {
      layers_.push_back({KvPool(kNumPages, kPageSize, kKvHeads, kHeadDim),
                         ca::Summaries::create(plan_, layer, kNumPages)});
    }
  }

  // Runs all layers of one step; the distance between the two results.
  Totals run(Step& step) {
    Totals totals;
    for (int layer = 0; layer < kLayers; ++layer) {
      write_kv(step, layer);
      write_q(step, layer);
      const ca::Batch batch = make_batch(step, layer);
      const compactattn_summaries* summaries = layers_[std::size_t(layer)].summaries.get();
      plan_.update_summaries(layer, batch, summaries);
      forward(plan_, workspace_, layer, batch, summaries, out_);
      forward(dense_, dense_workspace_, layer, batch, nullptr, dense_out_);
      totals.add(compare());
    }
    return totals;
  }

  [[nodiscard]] ca::Stats stats() const { return plan_.stats(); }

 private:
  void write_kv(const Step& step, int layer) {
    KvPool& pool = layers_[std::size_t(layer)].pool;
    for (std::size_t row = 0; row < step.requests.size(); ++row) {
      const Request& request = *step.requests[row];
      for (int token = step.first_token(row); token < step.seq_lens[row]; ++token) {
        for (int head = 0; head < kKvHeads; ++head) {
          const std::size_t at = pool.offset(request.pages, token, head);
          planted_.key({request.id, layer, head, token}, &pool.k()[at]);
          planted_.value({request.id, layer, head, token}, &pool.v()[at]);
        }
      }
    }
  }

  void write_q(const Step& step, int layer) {
    q_.resize(std::size_t(step.total_q() * kQHeads * kHeadDim));
    float* next = q_.data();
    for (std::size_t row = 0; row < step.requests.size(); ++row) {
      for (int token = step.first_token(row); token < step.seq_lens[row]; ++token) {
        for (int head = 0; head < kQHeads; ++head, next += kHeadDim) {
          planted_.query({step.requests[row]->id, layer, head, token}, next);
        }
      }
    }
  }

  ca::Batch make_batch(Step& step, int layer) {
    KvPool& pool = layers_[std::size_t(layer)].pool;
    const auto rows = std::int64_t(step.requests.size());
    ca::Batch batch;
    batch.q = ca::tensor(q_, {step.total_q(), kQHeads, kHeadDim});
    batch.k = ca::tensor(pool.k(), {kNumPages, kPageSize, kKvHeads, kHeadDim});
    batch.v = ca::tensor(pool.v(), {kNumPages, kPageSize, kKvHeads, kHeadDim});
    batch.cu_seqlens_q = ca::tensor(step.cu_seqlens_q, {rows + 1});
    batch.seq_lens = ca::tensor(step.seq_lens, {rows});
    batch.block_table =
        ca::tensor(step.block_table, {rows, std::int64_t(step.block_table.size()) / rows});
    return batch;
  }

  void forward(const ca::Plan& plan, const ca::Workspace& workspace, int layer,
               const ca::Batch& batch, const compactattn_summaries* summaries,
               std::vector<float>& out) {
    out.resize(q_.size());
    ca::ForwardArgs args;
    args.layer = layer;
    args.batch = &batch;
    args.summaries = summaries;
    args.out = ca::tensor(out, {batch.q.shape[0], kQHeads, kHeadDim});
    workspace.lend(args);
    plan.forward(args);
  }

  [[nodiscard]] Totals compare() const {
    Totals totals;
    for (std::size_t i = 0; i < out_.size(); ++i) {
      const double error = double(out_[i]) - double(dense_out_[i]);
      totals.error_square += error * error;
      totals.dense_square += double(dense_out_[i]) * double(dense_out_[i]);
    }
    return totals;
  }

  Planted planted_{2026};
  ca::Plan plan_;
  ca::Plan dense_;
  ca::Workspace workspace_;
  ca::Workspace dense_workspace_;
  std::vector<Layer> layers_;
  std::vector<float> q_;
  std::vector<float> out_;
  std::vector<float> dense_out_;
};

// What the lists of one step kept of their past blocks; "dense" where policy made every list dense.
void print_step(int now, const Step& step, const ca::Stats& before, const ca::Stats& after,
                const Totals& totals) {
  ca::Stats since = after;
  since.candidates -= before.candidates;
  since.selected -= before.selected;
  char density[16] = "dense";
  if (since.candidates > 0) std::snprintf(density, sizeof density, "%.3f", since.density());
  std::printf(
      "step %2d: %zu requests (%d decoding), %3d q tokens, density %-5s  relative error %.2e\n",
      now, step.requests.size(), step.decode_rows, step.total_q(), density,
      totals.relative_error());
}

// Serves all requests; false if the results are too far apart.
bool serve(const ca::Context& context, const ca::Settings& settings) {
  Model model(context, settings);
  Scheduler scheduler({{1, 0, 3000}, {2, 3, 700}, {3, 6, 2000}, {4, 14, 300}});
  Step step;
  Totals totals;
  for (int now = 0; !scheduler.idle(); ++now) {
    scheduler.schedule(now, step);
    if (step.requests.empty()) continue;
    const ca::Stats before = model.stats();
    const Totals this_step = model.run(step);
    print_step(now, step, before, model.stats(), this_step);
    totals.add(this_step);
    scheduler.retire();
  }
  const ca::Stats stats = model.stats();
  std::printf(
      "total: %lld of %lld past blocks read (density %.3f), relative error %.4f, bound %.2f\n",
      static_cast<long long>(stats.selected), static_cast<long long>(stats.candidates),
      stats.density(), totals.relative_error(), kBound);
  return stats.candidates > 0 && stats.density() < 1 && totals.relative_error() <= kBound;
}

}  // namespace

int main(int argc, char** argv) {
  const bool streaming = argc > 1 && std::strcmp(argv[1], "streaming") == 0;
  if (argc > 1 && !streaming) {
    std::fprintf(stderr, "usage: server_loop [streaming]\n");
    return 2;
  }
  try {
    const auto settings = streaming ? ca::Settings::of(COMPACTATTN_SELECTOR_STREAMING)
                                    : ca::Settings::of_mode(COMPACTATTN_MODE_COMPACTATTN);
    return serve(ca::Context::cpu(), scaled_down(settings)) ? 0 : 1;
  } catch (const ca::Error& error) {
    std::fprintf(stderr, "server_loop: %s\n", error.what());
    return 1;
  }
}
