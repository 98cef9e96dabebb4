// A small serving engine around CompactAttention: continuous batching over its own block map.
//
// Requests arrive over time. Each step mixes chunks of unfinished prompts with one token of every
// request that decodes, takes pages for the new tokens (or finds a prompt's first ones filled by an
// earlier request), writes their K and V into the shared pool, and runs attention layer by layer in
// place. The next step is scheduled and uploaded while the device works on this one. Results are
// compared with dense attention that is computed here, from other memory.
//
//   paged_server                        on the CPU; fails if a result is further off than its bound
//   paged_server --device cuda          the same on GPU 0: two streams, decode steps as CUDA graphs
//   paged_server --selector streaming   first and last blocks only: misses what matters, and fails
#include <cstdio>
#include <deque>
#include <exception>
#include <memory>
#include <string>

#include "device.hpp"
#include "model.hpp"
#include "reference.hpp"
#include "scheduler.hpp"

namespace ca = compactattn;

namespace {

// Fewer pages than the prompts need together: requests wait, and pages change hands.
constexpr Page kNumPages = 320;
constexpr Limits kLimits{/*page_size=*/16, /*max_requests=*/4, /*step_tokens=*/256,
                         /*max_kv_len=*/3072};
constexpr int kDecodeTokens = 12;
// What some prompts begin with. Not a multiple of the page size: its last page is nobody else's.
constexpr int kSystemTokens = 600;
constexpr int kSystemDocument = 100;

// Largest mean error of queries with sparse lists, in units of the largest value's 2-norm. A list
// drops at most 0.03 of the weight that its sampled queries give to past blocks, on average over
// them. A query that loses the weight m gets m * (mean of what is kept - mean of what is not) too
// much: at most 2 m of those units.
constexpr double kSparseBound = 0.06;

struct Options {
  bool cuda = false;
  bool streaming = false;
};

// Presets are made for long contexts. These prompts are short, so blocks are smaller, sparsity
// starts sooner, and no cap on density keeps a list from its 0.95.
ca::Settings settings_for(const Options& options) {
  auto settings = options.streaming ? ca::Settings::of(COMPACTATTN_SELECTOR_STREAMING)
                                    : ca::Settings::of_mode(COMPACTATTN_MODE_COMPACTATTN);
  settings.block_size = 64;
  settings.dense_below_kv_len = 512;
  settings.max_density = 1;
  return settings;
}

Request request(int id, int arrives, int prompt_tokens, bool with_system) {
  Request made{std::uint64_t(id), arrives, {}, prompt_tokens};
  for (int i = 0; i < prompt_tokens + kDecodeTokens; ++i) {
    const int document = with_system && i < kSystemTokens ? kSystemDocument : id;
    made.tokens.push_back(document * kDocument + i);
  }
  return made;
}

// In order of arrival.
std::deque<Request> workload() {
  std::deque<Request> requests;
  requests.push_back(request(1, 0, 3000, false));
  requests.push_back(request(2, 3, 900, true));
  requests.push_back(request(3, 6, 2000, false));
  requests.push_back(request(4, 14, 1300, true));
  requests.push_back(request(5, 15, 300, false));
  requests.push_back(request(6, 40, 2500, true));
  return requests;
}

void print_step(int now, const Step& step, const Distance& distance) {
  std::printf("step %2d: %zu requests (%d decoding), %3d q tokens", now, step.rows.size(),
              step.decode_rows(), step.total_q());
  if (distance.sparse_vectors > 0) std::printf(", sparse error %.4f", distance.sparse_mean());
  if (distance.dense_worst > 0)
    std::printf(", dense error %.2f of its bound", distance.dense_worst);
  std::printf("\n");
}

// Whether `holds`; says so if not.
bool expect(bool holds, const char* what) {
  if (!holds) std::fprintf(stderr, "paged_server: not so: %s\n", what);
  return holds;
}

class Server {
 public:
  Server(Device& device, const ca::Settings& settings)
      : device_(device),
        requests_(workload()),
        pages_(Model::kPaddingPage + 1, kNumPages, 7),
        scheduler_(kLimits, requests_, pages_),
        model_(device, kLimits, kNumPages, settings),
        reference_(settings) {}

  void serve() {
    int submitted = 0;
    for (int now = 0; !scheduler_.idle(); ++now) {
      Step step = scheduler_.schedule(now);
      if (step.rows.empty()) continue;
      model_.submit(submitted % Model::kSlots, std::move(step));
      if (submitted > 0) judge(submitted - 1);
      ++submitted;
    }
    if (submitted > 0) judge(submitted - 1);
  }

  [[nodiscard]] bool verdict(const Options& options) const {
    const ca::Stats stats = model_.stats();
    int shared = 0;
    for (const Request& request : requests_) shared += request.shared_tokens;
    std::printf(
        "total: %d vectors compared, %lld of %lld past blocks read (density %.3f), %d prompt "
        "tokens shared, "
        "%d pages recycled, %d graph replays\n"
        "sparse error %.4f, bound %.2f; dense error %.2f of its bound\n",
        total_.vectors, static_cast<long long>(stats.selected),
        static_cast<long long>(stats.candidates), stats.density(), shared, pages_.recycled(),
        device_.replays(), total_.sparse_mean(), kSparseBound, total_.dense_worst);
    bool good = expect(total_.sparse_mean() <= kSparseBound, "sparse results are within bound");
    good &= expect(total_.dense_worst <= 1, "dense results are within bound");
    good &= expect(stats.candidates > 0 && stats.density() < 1, "some blocks were left out");
    good &= expect(stats.refused == 0, "no request was refused");
    good &= expect(shared > 0 && pages_.recycled() > 0, "pages were shared and recycled");
    good &= expect(pages_.available() == kNumPages - 1, "all pages came back");
    good &= expect(!options.cuda || device_.replays() > 0, "decode steps were graphs");
    return good;
  }

 private:
  void judge(int number) {
    const int slot = number % Model::kSlots;
    const Step& step = model_.wait(slot);
    const Distance distance = reference_.judge(model_, slot, step);
    print_step(number, step, distance);
    total_.add(distance);
  }

  Device& device_;
  std::deque<Request> requests_;
  BlockMap pages_;
  Scheduler scheduler_;
  Model model_;
  Reference reference_;
  Distance total_;
};

// False if the arguments cannot be understood.
bool parse(int argc, char** argv, Options& options) {
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i], value = argv[i + 1];
    if (name == "--device" && (value == "cpu" || value == "cuda")) {
      options.cuda = value == "cuda";
    } else if (name == "--selector" && (value == "default" || value == "streaming")) {
      options.streaming = value == "streaming";
    } else {
      return false;
    }
  }
  return argc % 2 == 1;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  if (!parse(argc, argv, options)) {
    std::fprintf(stderr,
                 "usage: paged_server [--device cpu|cuda] [--selector default|streaming]\n");
    return 2;
  }
  try {
    const std::unique_ptr<Device> device = options.cuda ? make_cuda_device(0) : make_cpu_device();
    Server server(*device, settings_for(options));
    server.serve();
    return server.verdict(options) ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "paged_server: %s\n", error.what());
    return 1;
  }
}
