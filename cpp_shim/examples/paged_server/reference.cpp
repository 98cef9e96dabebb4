#include "reference.hpp"

#include <algorithm>
#include <cmath>

namespace {

// Inputs are exact in bf16. What is read is then rounded twice: probabilities before they meet V,
// each by at most 2^-9 of itself, and the result; both move an element by at most 2^-9 of the
// largest value. Sums are f32, whose part is the last term.
constexpr double kDenseBound = 0x1p-8 + 0x1p-12;

void rounded(float* vector) {
  std::transform(vector, vector + kHeadDim, vector, [](float x) { return to_float(to_bf16(x)); });
}

}  // namespace

void Largest::see(const float* value) {
  double square = 0;
  for (int i = 0; i < kHeadDim; ++i) {
    element = std::max(element, std::abs(value[i]));
    square += double(value[i]) * double(value[i]);
  }
  norm = std::max(norm, std::sqrt(square));
}

void Distance::add(const Distance& other) {
  dense_worst = std::max(dense_worst, other.dense_worst);
  sparse_sum += other.sparse_sum;
  sparse_vectors += other.sparse_vectors;
  vectors += other.vectors;
}

void Distance::compare(const compactattn::Bf16* got, const std::vector<double>& want, bool dense,
                       const Largest& values) {
  ++vectors;
  double worst = 0, square = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double error = std::abs(double(to_float(got[i])) - want[i]);
    // What is no number is worse than any.
    worst = std::isfinite(error) ? std::max(worst, error) : INFINITY;
    square += error * error;
  }
  if (dense) {
    dense_worst = std::max(dense_worst, worst / (kDenseBound * double(values.element)));
  } else {
    sparse_sum += std::sqrt(square) / values.norm;
    ++sparse_vectors;
  }
}

double Distance::sparse_mean() const {
  if (sparse_vectors == 0) return 0;
  return std::isfinite(sparse_sum) ? sparse_sum / sparse_vectors : INFINITY;
}

Distance Reference::judge(const Model& model, int slot, const Step& step) {
  Distance distance;
  int end_q = 0;
  for (const Row& row : step.rows) {
    end_q += row.q_tokens;
    const History& history = this->history(row);
    const bool dense =
        row.q_tokens <= settings_.dense_max_q_len || row.kv_tokens < settings_.dense_below_kv_len;
    for (int back = 1; back <= row.q_tokens; back += kStride) {
      for (int at = 0; at < kLayers * kQHeads; ++at) {
        const int layer = at / kQHeads, head = at % kQHeads;
        const auto* got = model.out(slot, layer) + ((end_q - back) * kQHeads + head) * kHeadDim;
        const auto want = attend(history, row, row.kv_tokens - back, layer, head);
        distance.compare(got, want, dense, history.values);
      }
    }
  }
  return distance;
}

const Reference::History& Reference::history(const Row& row) {
  History& history = histories_[row.request->id];
  const std::size_t token_elements = kKvHeads * kHeadDim;
  float vector[kHeadDim];
  for (int layer = 0; layer < kLayers; ++layer) {
    auto& k = history.k[std::size_t(layer)];
    auto& v = history.v[std::size_t(layer)];
    for (std::size_t token = k.size() / token_elements; token < std::size_t(row.kv_tokens);
         ++token) {
      for (int head = 0; head < kKvHeads; ++head) {
        const Place place = Place::of(row.request->tokens[token], layer, head);
        planted_.key(place, vector);
        rounded(vector);
        k.insert(k.end(), vector, vector + kHeadDim);
        planted_.value(place, vector);
        rounded(vector);
        v.insert(v.end(), vector, vector + kHeadDim);
        history.values.see(vector);
      }
    }
  }
  return history;
}

std::vector<double> Reference::attend(const History& history, const Row& row, int last, int layer,
                                      int head) const {
  float q[kHeadDim];
  planted_.query(Place::of(row.request->tokens[std::size_t(last)], layer, head), q);
  rounded(q);
  const auto at = [&](const std::vector<float>& kv, int token) {
    return &kv[std::size_t((token * kKvHeads + head / (kQHeads / kKvHeads)) * kHeadDim)];
  };
  std::vector<double> weights;
  for (int token = 0; token <= last; ++token) {
    const float* k = at(history.k[std::size_t(layer)], token);
    double score = 0;
    for (int i = 0; i < kHeadDim; ++i) score += double(q[i]) * double(k[i]);
    weights.push_back(score / std::sqrt(double(kHeadDim)));
  }
  const double largest = *std::max_element(weights.begin(), weights.end());
  double sum = 0;
  for (double& weight : weights) sum += weight = std::exp(weight - largest);
  std::vector<double> out(kHeadDim, 0.0);
  for (int token = 0; token <= last; ++token) {
    const float* v = at(history.v[std::size_t(layer)], token);
    for (int i = 0; i < kHeadDim; ++i) {
      out[std::size_t(i)] += weights[std::size_t(token)] / sum * double(v[i]);
    }
  }
  return out;
}
