#include "scheduler.hpp"

#include <algorithm>

namespace {

// Of 64 bits: an engine that must not trust them compares the tokens too.
std::vector<Content> contents_of(const std::vector<Token>& tokens, int page_size) {
  std::vector<Content> contents;
  Content content = 0x9E3779B97F4A7C15U;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    content = (content ^ std::uint64_t(tokens[i])) * 0xFF51AFD7ED558CCDU;
    content ^= content >> 32;
    if ((i + 1) % std::size_t(page_size) == 0) contents.push_back(content);
  }
  return contents;
}

}  // namespace

int Step::total_q() const {
  int total = 0;
  for (const Row& row : rows) total += row.q_tokens;
  return total;
}

int Step::decode_rows() const {
  return int(std::count_if(rows.begin(), rows.end(), [](const Row& row) { return row.decodes; }));
}

Scheduler::Scheduler(const Limits& limits, std::deque<Request>& requests, BlockMap& pages)
    : limits_(limits), pages_(pages) {
  for (Request& request : requests) {
    request.contents = contents_of(request.tokens, limits_.page_size);
    waiting_.push_back(&request);
  }
}

Step Scheduler::schedule(int now) {
  admit(now);
  Step step;
  int budget = limits_.step_tokens;
  for (const bool decode : {true, false}) {
    for (Request* request : running_) {
      if (request->decodes() != decode) continue;
      const int left = decode ? 1 : request->prompt_tokens - request->kv_tokens;
      const int tokens = std::min(left, budget);
      if (tokens == 0) continue;
      step.rows.push_back(add(*request, tokens));
      step.rows.back().decodes = decode;
      budget -= tokens;
    }
  }
  retire();
  return step;
}

// A request starts only if the pool can hold all of it beside what already runs.
void Scheduler::admit(int now) {
  while (!waiting_.empty() && waiting_.front()->arrives <= now &&
         int(running_.size()) < limits_.max_requests) {
    if (!start(*waiting_.front())) return;
    running_.push_back(waiting_.front());
    waiting_.pop_front();
  }
}

bool Scheduler::start(Request& request) {
  share_prefix(request);
  const int needed = pages_for(int(request.tokens.size())) - int(request.pages.size());
  if (pages_.available() >= std::size_t(needed + pages_promised())) return true;
  pages_.release(request.pages);
  request.pages.clear();
  request.kv_tokens = request.shared_tokens = 0;
  return false;
}

// Full pages that are in the pool already; at least one token of the prompt is left to compute.
void Scheduler::share_prefix(Request& request) {
  const auto most = std::size_t((request.prompt_tokens - 1) / limits_.page_size);
  while (request.pages.size() < most) {
    const auto page = pages_.share(request.contents[request.pages.size()]);
    if (!page) break;
    request.pages.push_back(*page);
  }
  request.kv_tokens = request.shared_tokens = int(request.pages.size()) * limits_.page_size;
}

Row Scheduler::add(Request& request, int tokens) {
  const int full_before = request.kv_tokens / limits_.page_size;
  request.kv_tokens += tokens;
  while (int(request.pages.size()) < pages_for(request.kv_tokens)) {
    request.pages.push_back(pages_.take());
  }
  for (int i = full_before; i < request.kv_tokens / limits_.page_size; ++i) {
    pages_.publish(request.contents[std::size_t(i)], request.pages[std::size_t(i)]);
  }
  return {&request, tokens, request.kv_tokens, request.pages, false};
}

void Scheduler::retire() {
  for (const Request* request : running_) {
    if (request->finished()) pages_.release(request->pages);
  }
  const auto ended = std::remove_if(running_.begin(), running_.end(),
                                    [](const Request* request) { return request->finished(); });
  running_.erase(ended, running_.end());
}

int Scheduler::pages_promised() const {
  int pages = 0;
  for (const Request* request : running_) {
    pages += pages_for(int(request->tokens.size())) - int(request->pages.size());
  }
  return pages;
}

int Scheduler::pages_for(int tokens) const {
  return (tokens + limits_.page_size - 1) / limits_.page_size;
}
