#include "model.hpp"

#include <algorithm>
#include <cstring>

namespace ca = compactattn;

namespace {

constexpr std::size_t kAlignment = 256;

std::size_t aligned(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

ca::PlanDesc describe(const Limits& limits, const ca::Settings& settings) {
  ca::PlanDesc desc;
  desc.num_q_heads = kQHeads;
  desc.num_kv_heads = kKvHeads;
  desc.head_dim = kHeadDim;
  desc.page_size = limits.page_size;
  desc.dtype = COMPACTATTN_DTYPE_BF16;
  desc.num_layers = kLayers;
  desc.max_num_reqs = limits.max_requests;
  desc.max_total_q = limits.step_tokens;
  desc.max_kv_len = limits.max_kv_len;
  desc.settings = &settings;
  return desc;
}

void write(const float* from, ca::Bf16* to) { std::transform(from, from + kHeadDim, to, to_bf16); }

}  // namespace

// Round to nearest, ties to even.
ca::Bf16 to_bf16(float value) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  return {std::uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

float to_float(ca::Bf16 value) {
  const std::uint32_t bits = std::uint32_t(value.bits) << 16;
  float out = 0;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

Model::Model(Device& device, const Limits& limits, Page num_pages, const ca::Settings& settings)
    : device_(device),
      limits_(limits),
      num_pages_(num_pages),
      plan_(ca::Plan::create(device.context(), describe(limits, settings))) {
  // Sized once for the largest step: no step allocates.
  workspace_bytes_ = plan_.sizes().workspace_bytes;
  workspace_ = device_.allocate(std::size_t(workspace_bytes_));
  for (int layer = 0; layer < kLayers; ++layer) layers_.push_back(make_layer(layer));
  const std::size_t out_bytes = kLayers * q_elements(limits_.step_tokens) * sizeof(ca::Bf16);
  for (int slot = 0; slot < kSlots; ++slot) {
    slots_.push_back({{},
                      inputs(device_.allocate_host(inputs_bytes())),
                      inputs(device_.allocate(inputs_bytes())),
                      static_cast<ca::Bf16*>(device_.allocate(out_bytes)),
                      static_cast<ca::Bf16*>(device_.allocate_host(out_bytes))});
  }
}

void Model::submit(int slot_number, Step step) {
  Slot& slot = slots_[std::size_t(slot_number)];
  slot.step = std::move(step);
  const Extent extent = this->extent(slot.step);
  fill(slot, extent);
  upload(slot, extent);
  device_.await_uploads();
  write_kv(slot);
  if (slot.step.decodes_only()) {
    device_.replay(slot_number, [&] { run(slot, extent); });
  } else {
    run(slot, extent);
  }
  for (int layer = 0; layer < kLayers; ++layer) {
    const std::size_t at = std::size_t(layer) * q_elements(limits_.step_tokens);
    device_.download(slot.host_out + at, slot.out + at,
                     q_elements(extent.total_q) * sizeof(ca::Bf16));
  }
  device_.mark(slot_number);
}

const Step& Model::wait(int slot) {
  device_.wait(slot);
  return slots_[std::size_t(slot)].step;
}

const ca::Bf16* Model::out(int slot, int layer) const {
  return slots_[std::size_t(slot)].host_out + std::size_t(layer) * q_elements(limits_.step_tokens);
}

Model::Inputs Model::inputs(void* memory) const {
  auto* next = static_cast<char*>(memory);
  const auto take = [&](std::size_t bytes) {
    char* taken = next;
    next += aligned(bytes);
    return taken;
  };
  const std::size_t q_bytes = kLayers * q_elements(limits_.step_tokens) * sizeof(ca::Bf16);
  const std::size_t kv_bytes = kLayers * kv_elements(limits_.step_tokens) * sizeof(ca::Bf16);
  const auto rows = std::size_t(limits_.max_requests);
  Inputs made{};
  made.q = reinterpret_cast<ca::Bf16*>(take(q_bytes));
  made.k = reinterpret_cast<ca::Bf16*>(take(kv_bytes));
  made.v = reinterpret_cast<ca::Bf16*>(take(kv_bytes));
  made.cu_seqlens_q = reinterpret_cast<std::int32_t*>(take((rows + 1) * sizeof(std::int32_t)));
  made.seq_lens = reinterpret_cast<std::int32_t*>(take(rows * sizeof(std::int32_t)));
  made.block_table = reinterpret_cast<std::int32_t*>(next);
  return made;
}

std::size_t Model::inputs_bytes() const {
  const std::size_t tokens = q_elements(limits_.step_tokens) + 2 * kv_elements(limits_.step_tokens);
  const std::size_t numbers =
      std::size_t(limits_.max_requests) * std::size_t(table_width() + 2) + 1;
  return kLayers * tokens * sizeof(ca::Bf16) + numbers * sizeof(std::int32_t) + 6 * kAlignment;
}

// Summaries serve selectors that read block means; the default one does not.
Model::Layer Model::make_layer(int number) {
  const std::size_t pool_bytes = kv_elements(num_pages_ * limits_.page_size) * sizeof(ca::Bf16);
  Layer layer{};
  layer.k = static_cast<ca::Bf16*>(device_.allocate(pool_bytes));
  layer.v = static_cast<ca::Bf16*>(device_.allocate(pool_bytes));
  const std::int64_t mean_bytes = plan_.summary_bytes(number, num_pages_);
  auto* means = static_cast<float*>(device_.allocate(std::size_t(mean_bytes)));
  layer.summaries.k_mean = ca::tensor(
      means, {num_pages_, plan_.sizes(number).summary_slots_per_page, kKvHeads, kHeadDim});
  return layer;
}

Model::Extent Model::extent(const Step& step) const {
  if (step.decodes_only()) return {limits_.max_requests, limits_.max_requests};
  return {int(step.rows.size()), step.total_q()};
}

void Model::fill(Slot& slot, const Extent& extent) {
  const Inputs& host = slot.host;
  const auto width = std::size_t(table_width());
  std::fill_n(host.block_table, std::size_t(extent.rows) * width, -1);
  host.cu_seqlens_q[0] = 0;
  for (int i = 0; i < extent.rows; ++i) {
    const bool padding = i >= int(slot.step.rows.size());
    std::int32_t* table = host.block_table + std::size_t(i) * width;
    if (padding) {
      host.cu_seqlens_q[i + 1] = host.cu_seqlens_q[i] + 1;
      host.seq_lens[i] = 1;
      table[0] = kPaddingPage;
      continue;
    }
    const Row& row = slot.step.rows[std::size_t(i)];
    fill_tokens(row, host.cu_seqlens_q[i], host);
    host.cu_seqlens_q[i + 1] = host.cu_seqlens_q[i] + row.q_tokens;
    host.seq_lens[i] = row.kv_tokens;
    std::copy(row.pages.begin(), row.pages.end(), table);
  }
}

void Model::fill_tokens(const Row& row, int first_q, const Inputs& host) {
  float vector[kHeadDim];
  for (int i = 0; i < row.q_tokens; ++i) {
    const Token token = row.request->tokens[std::size_t(row.first_token() + i)];
    for (int layer = 0; layer < kLayers; ++layer) {
      const std::size_t at = std::size_t(layer * limits_.step_tokens + first_q + i);
      for (int head = 0; head < kQHeads; ++head) {
        planted_.query(Place::of(token, layer, head), vector);
        write(vector, host.q + (at * kQHeads + std::size_t(head)) * kHeadDim);
      }
      for (int head = 0; head < kKvHeads; ++head) {
        const std::size_t kv_at = (at * kKvHeads + std::size_t(head)) * kHeadDim;
        planted_.key(Place::of(token, layer, head), vector);
        write(vector, host.k + kv_at);
        planted_.value(Place::of(token, layer, head), vector);
        write(vector, host.v + kv_at);
      }
    }
  }
}

void Model::upload(const Slot& slot, const Extent& extent) {
  const auto send = [&](auto* to, const auto* from, std::size_t elements) {
    device_.upload(to, from, elements * sizeof *from);
  };
  for (int layer = 0; layer < kLayers; ++layer) {
    const std::size_t q_at = std::size_t(layer) * q_elements(limits_.step_tokens);
    const std::size_t kv_at = std::size_t(layer) * kv_elements(limits_.step_tokens);
    send(slot.device.q + q_at, slot.host.q + q_at, q_elements(extent.total_q));
    send(slot.device.k + kv_at, slot.host.k + kv_at, kv_elements(extent.total_q));
    send(slot.device.v + kv_at, slot.host.v + kv_at, kv_elements(extent.total_q));
  }
  const auto rows = std::size_t(extent.rows);
  send(slot.device.cu_seqlens_q, slot.host.cu_seqlens_q, rows + 1);
  send(slot.device.seq_lens, slot.host.seq_lens, rows);
  send(slot.device.block_table, slot.host.block_table, rows * std::size_t(table_width()));
}

// What an engine's own kernel does for each layer. On the compute stream, behind the last reader of
// pages that changed hands.
void Model::write_kv(const Slot& slot) {
  int first_q = 0;
  for (const Row& row : slot.step.rows) {
    int tokens = 0;
    for (int token = row.first_token(); token < row.kv_tokens; token += tokens) {
      const int in_page = token % limits_.page_size;
      tokens = std::min(row.kv_tokens - token, limits_.page_size - in_page);
      const Page page = row.pages[std::size_t(token / limits_.page_size)];
      const std::size_t to = kv_elements(page * limits_.page_size + in_page);
      const int from_token = first_q + token - row.first_token();
      for (int layer = 0; layer < kLayers; ++layer) {
        const std::size_t from = kv_elements(layer * limits_.step_tokens + from_token);
        const std::size_t bytes = kv_elements(tokens) * sizeof(ca::Bf16);
        device_.copy(layers_[std::size_t(layer)].k + to, slot.device.k + from, bytes);
        device_.copy(layers_[std::size_t(layer)].v + to, slot.device.v + from, bytes);
      }
    }
    first_q += row.q_tokens;
  }
}

void Model::run(const Slot& slot, const Extent& extent) {
  for (int number = 0; number < kLayers; ++number) {
    const Layer& layer = layers_[std::size_t(number)];
    const ca::Batch batch = this->batch(slot, layer, number, extent);
    plan_.update_summaries(number, batch, &layer.summaries);
    ca::ForwardArgs args;
    args.layer = number;
    args.batch = &batch;
    args.summaries = &layer.summaries;
    args.out = ca::tensor(slot.out + std::size_t(number) * q_elements(limits_.step_tokens),
                          {extent.total_q, kQHeads, kHeadDim});
    args.workspace = workspace_;
    args.workspace_bytes = workspace_bytes_;
    args.stream = device_.stream();
    plan_.forward(args);
  }
}

ca::Batch Model::batch(const Slot& slot, const Layer& layer, int number,
                       const Extent& extent) const {
  ca::Batch made;
  made.q = ca::tensor(slot.device.q + std::size_t(number) * q_elements(limits_.step_tokens),
                      {extent.total_q, kQHeads, kHeadDim});
  made.k = ca::tensor(layer.k, {num_pages_, limits_.page_size, kKvHeads, kHeadDim});
  made.v = ca::tensor(layer.v, {num_pages_, limits_.page_size, kKvHeads, kHeadDim});
  made.cu_seqlens_q = ca::tensor(slot.device.cu_seqlens_q, {extent.rows + 1});
  made.seq_lens = ca::tensor(slot.device.seq_lens, {extent.rows});
  made.block_table = ca::tensor(slot.device.block_table, {extent.rows, table_width()});
  made.stream = device_.stream();
  return made;
}

std::size_t Model::q_elements(int tokens) const { return std::size_t(tokens) * kQHeads * kHeadDim; }

std::size_t Model::kv_elements(int tokens) const {
  return std::size_t(tokens) * kKvHeads * kHeadDim;
}

int Model::table_width() const {
  return (limits_.max_kv_len + limits_.page_size - 1) / limits_.page_size;
}
