// Continuous batching: which requests run in a step, and how many tokens of each.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "block_map.hpp"
#include "planted.hpp"

struct Limits {
  int page_size;
  int max_requests;
  // Query tokens of a step.
  int step_tokens;
  int max_kv_len;
};

struct Request {
  std::uint64_t id;
  int arrives;
  // The prompt and, as there is no model here to make them up, the tokens decoded after it.
  std::vector<Token> tokens;
  int prompt_tokens;
  // Tokens whose KV is in the pool, those of the step being built included.
  int kv_tokens = 0;
  int shared_tokens = 0;
  std::vector<Page> pages = {};
  // Content of each full page.
  std::vector<Content> contents = {};

  [[nodiscard]] bool decodes() const { return kv_tokens >= prompt_tokens; }
  [[nodiscard]] bool finished() const { return kv_tokens == int(tokens.size()); }
};

// One request's share of a step. `request` outlives the step; its counts go on changing.
struct Row {
  const Request* request;
  int q_tokens;
  int kv_tokens;
  std::vector<Page> pages;
  bool decodes;

  [[nodiscard]] int first_token() const { return kv_tokens - q_tokens; }
};

// Decode rows first.
struct Step {
  std::vector<Row> rows;

  [[nodiscard]] int total_q() const;
  [[nodiscard]] int decode_rows() const;
  [[nodiscard]] bool decodes_only() const { return decode_rows() == int(rows.size()); }
};

class Scheduler {
 public:
  // `requests` in order of arrival; they stay where they are.
  Scheduler(const Limits& limits, std::deque<Request>& requests, BlockMap& pages);

  [[nodiscard]] bool idle() const { return waiting_.empty() && running_.empty(); }

  // One decode row per request past its prompt, and prompt chunks for what is left of the budget.
  // Requests that end with this step give their pages back: whatever is written there next is
  // written after this step on the same stream.
  Step schedule(int now);

 private:
  void admit(int now);
  bool start(Request& request);
  void share_prefix(Request& request);
  Row add(Request& request, int tokens);
  void retire();
  [[nodiscard]] int pages_for(int tokens) const;
  [[nodiscard]] int pages_promised() const;

  Limits limits_;
  BlockMap& pages_;
  std::deque<Request*> waiting_;
  std::deque<Request*> running_;
};
