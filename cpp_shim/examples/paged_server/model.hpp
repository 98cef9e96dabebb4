// The attention layers of a model without its other layers: writes K and V of new tokens into the
// paged pool, and calls CompactAttention in place.
#pragma once

#include <compactattn.hpp>
#include <vector>

#include "device.hpp"
#include "planted.hpp"
#include "scheduler.hpp"

constexpr int kLayers = 2;
constexpr int kQHeads = 4;
constexpr int kKvHeads = 2;

compactattn::Bf16 to_bf16(float value);
float to_float(compactattn::Bf16 value);

// Two slots of inputs and outputs: while the device works on one step, the host fills the next.
class Model {
 public:
  static constexpr int kSlots = 2;

  // Page 0 of the pool belongs to no request: rows that fill up a decode step read it.
  static constexpr Page kPaddingPage = 0;

  Model(Device& device, const Limits& limits, Page num_pages,
        const compactattn::Settings& settings);

  // Starts all layers of a step in a slot whose last step has been waited for. Steps that only
  // decode are filled up to max_requests rows and replay a graph: it reads lengths and pages, which
  // change, from memory, which does not move.
  void submit(int slot, Step step);

  // Waits for the step of a slot.
  const Step& wait(int slot);

  // Of that step and a layer: [total_q, kQHeads, kHeadDim].
  [[nodiscard]] const compactattn::Bf16* out(int slot, int layer) const;

  [[nodiscard]] compactattn::Stats stats() const { return plan_.stats(); }

 private:
  // One step's inputs, at the same offsets in host and device memory. q, k and v follow each other
  // layer by layer.
  struct Inputs {
    compactattn::Bf16* q;
    compactattn::Bf16* k;
    compactattn::Bf16* v;
    std::int32_t* cu_seqlens_q;
    std::int32_t* seq_lens;
    std::int32_t* block_table;
  };
  struct Slot {
    Step step;
    Inputs host;
    Inputs device;
    compactattn::Bf16* out;
    compactattn::Bf16* host_out;
  };
  struct Layer {
    compactattn::Bf16* k;
    compactattn::Bf16* v;
    compactattn::Sized<compactattn_summaries> summaries;
  };
  // Rows and query tokens of a step as the library sees it, padding included.
  struct Extent {
    int rows;
    int total_q;
  };

  Inputs inputs(void* memory) const;
  [[nodiscard]] std::size_t inputs_bytes() const;
  Layer make_layer(int layer);

  [[nodiscard]] Extent extent(const Step& step) const;
  void fill(Slot& slot, const Extent& extent);
  void fill_tokens(const Row& row, int first_q, const Inputs& host);
  void upload(const Slot& slot, const Extent& extent);
  void write_kv(const Slot& slot);
  void run(const Slot& slot, const Extent& extent);
  compactattn::Batch batch(const Slot& slot, const Layer& layer, int number,
                           const Extent& extent) const;

  [[nodiscard]] std::size_t q_elements(int tokens) const;
  [[nodiscard]] std::size_t kv_elements(int tokens) const;
  [[nodiscard]] int table_width() const;

  Device& device_;
  Limits limits_;
  Page num_pages_;
  Planted planted_{kSeed};
  compactattn::Plan plan_;
  void* workspace_;
  std::int64_t workspace_bytes_;
  std::vector<Layer> layers_;
  std::vector<Slot> slots_;

 public:
  // Of what K, V and queries are made of.
  static constexpr std::uint64_t kSeed = 2026;
};
