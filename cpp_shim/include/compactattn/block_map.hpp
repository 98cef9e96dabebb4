// The block map of an engine whose scheduler is C++: which KV pages each request owns.
//
// For engines built by cargo (feature `cxx`, rust/bridge.rs); C++ engines that link the C library
// pass their tables through compactattn.hpp and need none of this.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace compactattn {

// What Rust reads each step. A scheduler implements it over the containers it has; nothing is
// copied into it. Both calls may throw (std::out_of_range for an unknown request): Rust receives an
// error with what().
class BlockMap {
 public:
  virtual ~BlockMap() = default;

  // Physical pages of the request in logical order. Rust borrows them until the scheduler next
  // changes the map.
  virtual const std::vector<std::int32_t>& pages(const std::string& request) const = 0;

  // KV tokens of the request, this step's chunk included; at most pages().size() * page_size.
  virtual std::int32_t seq_len(const std::string& request) const = 0;
};

// A map of its own memory, for schedulers that have none yet.
class HashBlockMap final : public BlockMap {
 public:
  // Adds the request, or replaces what is known of it.
  void set(const std::string& request, const std::vector<std::int32_t>& pages,
           std::int32_t seq_len);

  // Forgets the request. Throws std::out_of_range if it is not there.
  void erase(const std::string& request);

  const std::vector<std::int32_t>& pages(const std::string& request) const override;
  std::int32_t seq_len(const std::string& request) const override;

 private:
  struct Entry {
    std::vector<std::int32_t> pages;
    std::int32_t seq_len;
  };

  const Entry& find(const std::string& request) const;

  std::unordered_map<std::string, Entry> entries_;
};

// For Rust, which knows no base classes.
inline std::unique_ptr<HashBlockMap> make_hash_block_map() {
  return std::make_unique<HashBlockMap>();
}
inline const BlockMap& as_block_map(const HashBlockMap& map) { return map; }

}  // namespace compactattn
