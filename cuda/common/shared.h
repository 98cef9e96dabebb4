// Dynamic shared memory that launches give the kernels before attend, in bytes. The host's numbers
// are in rust/cuda/shared.rs, where a test compares the two; kernels assert that they fit.
#pragma once

#include <cstdint>

namespace compactattn {

// Between vectors of a tile: an odd number of 16-byte units, so that eight rows lie in different
// banks for every head_dim.
constexpr uint32_t row_bytes(uint32_t head_dim) { return 2 * head_dim + 16; }

// Means of 128 blocks, two stages of 64 rows.
constexpr uint32_t flashprefill_bytes(uint32_t head_dim) { return 256 * row_bytes(head_dim); }

// Eight stages of 64 rows, swizzled, and what they are.
constexpr uint32_t flashprefill_sm90_bytes(uint32_t head_dim) { return 1024 * head_dim + 1024; }

// Stages of key groups and folded rows; logits take their place.
constexpr uint32_t xattention_bytes() { return 110592; }

// Sums of a group's queries, lanes of 8 elements: 8, 16 or 32.
constexpr uint32_t sample_rows_bytes(uint32_t heads, uint32_t head_dim) {
  return 4 * heads * (head_dim == 96 ? 128 : head_dim);
}

// Up to 512 such sums: of the group, of each of 16 warps and of a cluster's 8 CTAs.
constexpr uint32_t sample_rows_held_bytes() { return 51200; }

// A tile of 128 sampled rows, two of 64 keys.
constexpr uint32_t cells_bytes(uint32_t head_dim) { return 256 * row_bytes(head_dim); }

// The same where a CTA may have 99 KiB, at a head_dim of 256: three tiles of 64 keys, a quarter of
// each key.
constexpr uint32_t cells_small_bytes() { return 128 * row_bytes(256) + 3 * 64 * row_bytes(64); }

// The same on sm_90a: 128 rows of each of one or two spans, and as many tiles of keys as fit beside
// them.
constexpr uint32_t cells_sm90_bytes(uint32_t head_dim, uint32_t spans) {
  return spans == 2 ? 232448 : head_dim == 64 ? 215040 : head_dim == 128 ? 231424 : 198656;
}

// Cells of a slice, 128 rows of `pitch` floats, at least a tile of 128 keys.
constexpr uint32_t pooled_cells_bytes(uint32_t head_dim, uint32_t pitch) {
  return pitch * 512 > 128 * row_bytes(head_dim) ? pitch * 512 : 128 * row_bytes(head_dim);
}

// The same and a tile of 128 sampled rows, one of 128 means.
constexpr uint32_t pooled_lists_bytes(uint32_t head_dim, uint32_t pitch) {
  return pooled_cells_bytes(head_dim, pitch) + 256 * row_bytes(head_dim);
}

// Features of 16 blocks: maximum, minimum and mean.
constexpr uint32_t gate_keys_bytes(uint32_t head_dim) { return 16 * 3 * 4 * head_dim; }

// Means of `heads` heads, the features of a block, query and edge.
constexpr uint32_t gate_bytes(uint32_t heads, uint32_t head_dim, uint32_t gate_dim) {
  return 4 * ((heads + 3) * head_dim + 2 * gate_dim);
}

// Rows of scores up to this many blocks are held in shared memory while they are ranked.
constexpr int32_t kSharedRowBlocks = 8192;

// Of the kernels that keep: a row of bits, and a row of scores where it fits.
constexpr uint64_t keep_bytes(uint64_t max_blocks, uint64_t mask_words) {
  return 4 * (mask_words + (max_blocks <= kSharedRowBlocks ? max_blocks : 0));
}

}  // namespace compactattn
