// Dense attention in double precision over keys and values of its own, to judge the server by: it
// knows neither pages nor pool.
#pragma once

#include <array>
#include <unordered_map>
#include <vector>

#include "model.hpp"

// The largest element and the largest 2-norm of a request's values.
struct Largest {
  float element = 0;
  double norm = 0;

  void see(const float* value);
};

// How far results are from dense attention.
struct Distance {
  // Of queries that attended to everything: the largest error, as a share of its bound.
  double dense_worst = 0;
  // Of the others: 2-norms of the errors in units of Largest::norm, summed; and how many.
  double sparse_sum = 0;
  int sparse_vectors = 0;
  // Vectors compared.
  int vectors = 0;

  void add(const Distance& other);
  // One head's result.
  void compare(const compactattn::Bf16* got, const std::vector<double>& want, bool dense,
               const Largest& values);
  // The mean; infinite for what is no number, so that it never passes.
  [[nodiscard]] double sparse_mean() const;
};

class Reference {
 public:
  explicit Reference(const compactattn::Settings& settings) : settings_(settings) {}

  // Every kStride-th query of each row of a step that has been waited for, the last one first; all
  // layers and heads. Bounds on sparse rows speak of a chunk's queries together, not of each.
  Distance judge(const Model& model, int slot, const Step& step);

 private:
  // [tokens, kKvHeads, kHeadDim] of each layer.
  struct History {
    std::array<std::vector<float>, kLayers> k;
    std::array<std::vector<float>, kLayers> v;
    Largest values;
  };

  static constexpr int kStride = 16;

  const History& history(const Row& row);
  // Dense attention of one query head of the request's token `last` to all up to itself.
  [[nodiscard]] std::vector<double> attend(const History& history, const Row& row, int last,
                                           int layer, int head) const;

  compactattn::Settings settings_;
  Planted planted_{Model::kSeed};
  std::unordered_map<std::uint64_t, History> histories_;
};
