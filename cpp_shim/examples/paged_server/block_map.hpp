// Who owns which KV page: what an engine's block manager does. Host side only; knows no memory.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <random>
#include <unordered_map>
#include <vector>

using Page = std::int32_t;

// Names the contents of a full page: its tokens and all before them.
using Content = std::uint64_t;

// Pages with reference counts, and the prefix cache: a full page may be published under its
// content, found by later requests, and outlives its last owner until memory runs short.
class BlockMap {
 public:
  // Pages first_page .. num_pages - 1, handed out in random order.
  BlockMap(Page first_page, Page num_pages, std::uint32_t seed);

  // Pages nobody uses: never published, or kept only in case someone asks again.
  [[nodiscard]] std::size_t available() const { return free_.size() + idle_.size(); }

  // A page for new tokens, with whatever it held before; the caller knows that one is available.
  Page take();

  // A published page, now used by one request more.
  std::optional<Page> share(Content content);

  // The page is full and will not change; the first to hold a content is the one that is shared.
  void publish(Content content, Page page);

  // One request less uses each of them.
  void release(const std::vector<Page>& pages);

  // Pages that new tokens took over from others.
  [[nodiscard]] int recycled() const { return recycled_; }

 private:
  struct Use {
    int count = 0;
    bool ever = false;
    std::optional<Content> content = {};
  };

  std::mt19937 random_;
  std::vector<Use> uses_;
  std::vector<Page> free_;
  // Published and unused, the longest unused first.
  std::deque<Page> idle_;
  std::unordered_map<Content, Page> published_;
  int recycled_ = 0;
};
