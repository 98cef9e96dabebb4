// Synthetic q, k and v in which some KV matters and most does not, as in a real prompt.
//
// Every 64 tokens of a document's KV are about one topic; every 64 queries of a head ask for one,
// and often go on asking for the one before. A topic is a direction: keys and queries that share it
// score high, and its values share a direction too, so that reading the wrong pages shows in the
// output. The first tokens are a sink for every query.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

constexpr int kHeadDim = 64;

// A token names a document and a place in it, so that the same token after the same ones has the
// same K and V, as in a model.
using Token = std::int32_t;
constexpr Token kDocument = 1 << 16;

// Where a vector belongs.
struct Place {
  int document;
  int layer;
  int head;
  int token;

  static Place of(Token token, int layer, int head) {
    return {token / kDocument, layer, head, token % kDocument};
  }
};

class Planted {
 public:
  explicit Planted(std::uint64_t seed) : seed_(seed) {
    for (auto& topic : topics_) direction(mix(seed_++), topic);
  }

  void key(const Place& at, float* out) const {
    noise(hash(at, 1, at.token), out);
    add(kBeta, topics_[kv_topic(at)], out);
    if (at.token < kSinkTokens) add(kSink, topics_[kSinkTopic], out);
  }

  void value(const Place& at, float* out) const {
    noise(hash(at, 2, at.token), out);
    add(kValue, topics_[kv_topic(at)], out);
  }

  void query(const Place& at, float* out) const {
    noise(hash(at, 3, at.token), out);
    add(kBeta, topics_[query_topic(at)], out);
    add(kSink, topics_[kSinkTopic], out);
  }

 private:
  using Vector = std::array<float, kHeadDim>;

  static constexpr int kTopics = 12;
  static constexpr int kSinkTopic = kTopics;
  static constexpr int kSegment = 64;
  static constexpr int kSinkTokens = 4;
  // What two vectors share adds its square over sqrt(kHeadDim) = 8 to a score whose noise has
  // deviation 1. A topic adds 8: the few segments that answer a query hold nearly all of its
  // weight. A sink token adds 10, which makes four of them worth a tenth of it.
  static constexpr float kBeta = 8.0F;
  static constexpr float kSink = 9.0F;
  static constexpr float kValue = 4.0F;

  std::size_t kv_topic(const Place& at) const {
    return static_cast<std::size_t>(hash(at, 4, at.token / kSegment) % kTopics);
  }

  // Looks back to the segment where the head last changed its mind: three times in ten.
  std::size_t query_topic(const Place& at) const {
    int segment = at.token / kSegment;
    while (segment > 0 && hash(at, 5, segment) % 10 >= 3) --segment;
    return static_cast<std::size_t>(hash(at, 6, segment) % kTopics);
  }

  std::uint64_t hash(const Place& at, std::uint64_t what, int index) const {
    std::uint64_t x = mix(seed_ + what);
    for (const auto part : {std::uint64_t(at.document), std::uint64_t(at.layer),
                            std::uint64_t(at.head), std::uint64_t(index)}) {
      x = mix(x ^ part);
    }
    return x;
  }

  // SplitMix64's finaliser.
  static std::uint64_t mix(std::uint64_t x) {
    x += 0x9E3779B97F4A7C15U;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9U;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBU;
    return x ^ (x >> 31);
  }

  // Unit normal numbers, two at a time (Box and Muller).
  static void noise(std::uint64_t state, float* out) {
    const auto uniform = [&] { return (double(mix(state++) >> 11) + 0.5) * 0x1p-53; };
    for (int i = 0; i < kHeadDim; i += 2) {
      const double radius = std::sqrt(-2 * std::log(uniform()));
      const double angle = 2 * std::acos(-1.0) * uniform();
      out[i] = float(radius * std::cos(angle));
      out[i + 1] = float(radius * std::sin(angle));
    }
  }

  static void direction(std::uint64_t state, Vector& out) {
    noise(state, out.data());
    double square = 0;
    for (const float x : out) square += double(x) * x;
    for (float& x : out) x = float(x / std::sqrt(square));
  }

  static void add(float factor, const Vector& what, float* out) {
    for (int i = 0; i < kHeadDim; ++i) out[i] += factor * what[std::size_t(i)];
  }

  std::uint64_t seed_;
  std::array<Vector, kTopics + 1> topics_;
};
