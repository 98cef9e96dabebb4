#include "compactattn/block_map.hpp"

#include <stdexcept>

namespace compactattn {

void HashBlockMap::set(const std::string& request, const std::vector<std::int32_t>& pages,
                       std::int32_t seq_len) {
  entries_[request] = Entry{pages, seq_len};
}

void HashBlockMap::erase(const std::string& request) {
  find(request);
  entries_.erase(request);
}

const std::vector<std::int32_t>& HashBlockMap::pages(const std::string& request) const {
  return find(request).pages;
}

std::int32_t HashBlockMap::seq_len(const std::string& request) const {
  return find(request).seq_len;
}

const HashBlockMap::Entry& HashBlockMap::find(const std::string& request) const {
  const auto found = entries_.find(request);
  if (found == entries_.end()) {
    throw std::out_of_range("request \"" + request + "\" is not in the block map");
  }
  return found->second;
}

}  // namespace compactattn
