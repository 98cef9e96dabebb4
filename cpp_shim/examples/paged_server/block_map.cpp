#include "block_map.hpp"

#include <algorithm>

BlockMap::BlockMap(Page first_page, Page num_pages, std::uint32_t seed)
    : random_(seed), uses_(std::size_t(num_pages)) {
  for (Page page = first_page; page < num_pages; ++page) free_.push_back(page);
  std::shuffle(free_.begin(), free_.end(), random_);
}

Page BlockMap::take() {
  if (free_.empty()) {
    free_.push_back(idle_.front());
    idle_.pop_front();
  }
  const Page page = free_.back();
  free_.pop_back();
  Use& use = uses_[std::size_t(page)];
  if (use.content) published_.erase(*use.content);
  recycled_ += use.ever ? 1 : 0;
  use = {1, true, {}};
  return page;
}

std::optional<Page> BlockMap::share(Content content) {
  const auto found = published_.find(content);
  if (found == published_.end()) return {};
  const Page page = found->second;
  Use& use = uses_[std::size_t(page)];
  if (use.count == 0) idle_.erase(std::find(idle_.begin(), idle_.end(), page));
  ++use.count;
  return page;
}

void BlockMap::publish(Content content, Page page) {
  if (published_.emplace(content, page).second) uses_[std::size_t(page)].content = content;
}

void BlockMap::release(const std::vector<Page>& pages) {
  // The end of a prefix goes first: what is left of it then still serves.
  for (auto page = pages.rbegin(); page != pages.rend(); ++page) {
    Use& use = uses_[std::size_t(*page)];
    if (--use.count > 0) continue;
    if (use.content) {
      idle_.push_back(*page);
    } else {
      free_.push_back(*page);
    }
  }
  std::shuffle(free_.begin(), free_.end(), random_);
}
