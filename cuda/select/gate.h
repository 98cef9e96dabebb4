// The weights of the attn_gate selector (SeerAttention, arXiv 2410.13276) as the GPU reads them.
#pragma once

#include <cstdint>

namespace compactattn {

// One layer's gate; f32 device memory, row-major, as rust/select/gate_weights.rs holds it.
struct Gate {
  const float* k;         // [k_heads, 3 * head_dim, gate_dim]: of max, min and mean
  const float* q;         // [q_heads, head_dim, gate_dim], or by_group [num_kv_heads,
                          // group_size * head_dim, gate_dim]; null takes mean queries as they are
  const float* inv_freq;  // [head_dim / 2]: pair i at position p turns by p * inv_freq[i]
  const float* gate_inv_freq;  // [gate_dim / 2]; inv_freq itself where the gate has none of its own
  float rope_scale;            // factor on cosine and sine; 1 but under YaRN and its like
  int32_t interleaved;         // pairs are (2i, 2i + 1); else (i, i + dim / 2)
  int32_t k_heads;             // num_q_heads or num_kv_heads
  int32_t gate_dim;            // even; head_dim where q is null
  int32_t by_group;            // q reads the means of the whole group: one vector a KV head
  int32_t reserved;
};
static_assert(sizeof(Gate) == 56, "host code writes this layout");

}  // namespace compactattn
