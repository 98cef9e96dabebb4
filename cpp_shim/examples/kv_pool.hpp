// What an engine has: a paged KV pool shared by all requests, and the map of who owns which page.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

// Hands out page ids in random order and takes them back; a page that comes back is handed out
// again, contents and all.
class PageAllocator {
 public:
  PageAllocator(int num_pages, std::uint32_t seed) : random_(seed) {
    for (int page = 0; page < num_pages; ++page) free_.push_back(page);
    std::shuffle(free_.begin(), free_.end(), random_);
  }

  [[nodiscard]] std::size_t available() const { return free_.size(); }

  std::int32_t take() {
    const std::int32_t page = free_.back();
    free_.pop_back();
    return page;
  }

  void give_back(const std::vector<std::int32_t>& pages) {
    free_.insert(free_.end(), pages.begin(), pages.end());
    std::shuffle(free_.begin(), free_.end(), random_);
  }

 private:
  std::mt19937 random_;
  std::vector<std::int32_t> free_;
};

// One layer's K and V, each [num_pages, page_size, num_kv_heads, head_dim]. Unwritten memory is
// NaN: what reads it shows.
class KvPool {
 public:
  KvPool(int num_pages, int page_size, int num_kv_heads, int head_dim)
      : page_size_(page_size), num_kv_heads_(num_kv_heads), head_dim_(head_dim) {
    const auto size = std::size_t(num_pages) * std::size_t(page_size * num_kv_heads * head_dim);
    k_.assign(size, std::numeric_limits<float>::quiet_NaN());
    v_ = k_;
  }

  // Where a request with these pages keeps one head of one token.
  [[nodiscard]] std::size_t offset(const std::vector<std::int32_t>& pages, int token,
                                   int kv_head) const {
    const auto page = std::size_t(pages[std::size_t(token / page_size_)]);
    const auto slot = page * std::size_t(page_size_) + std::size_t(token % page_size_);
    return (slot * std::size_t(num_kv_heads_) + std::size_t(kv_head)) * std::size_t(head_dim_);
  }

  [[nodiscard]] std::vector<float>& k() { return k_; }
  [[nodiscard]] std::vector<float>& v() { return v_; }

 private:
  int page_size_;
  int num_kv_heads_;
  int head_dim_;
  std::vector<float> k_;
  std::vector<float> v_;
};
