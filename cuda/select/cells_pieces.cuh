// Cells from keys of 256 dims, which pass through shared memory a quarter at a time: for GPUs whose
// CTAs may have 99 KiB of it. Each product is the same sum in the same order as with whole keys, so
// cells have the same bits.
#pragma once

#include "cells_reader.cuh"

namespace compactattn::select {

constexpr int kPieceDims = 64;
constexpr int kPieces = 256 / kPieceDims;
constexpr int kPieceStages = 3;
constexpr uint32_t kPieceBytes = kTileKeys * row_bytes(kPieceDims);
static_assert(kMaxRows * row_bytes(256) + kPieceStages * kPieceBytes == cells_small_bytes(),
              "a launch's");

// As Reader, of keys as wide as the queries.
template <class Element, class Source>
struct PiecedReader : Reader<Element, Source> {
  using Whole = Reader<Element, Source>;
  using Whole::Whole;

  __device__ __forceinline__ uint32_t piece_stage(int piece) const {
    return this->queries + kMaxRows * row_bytes(256) + piece % kPieceStages * kPieceBytes;
  }

  // Piece `piece` counts over the pieces of all tiles.
  __device__ __forceinline__ void load_piece(int piece) const {
    const int unit = threadIdx.x % kLanesPerVector, dim = piece % kPieces * kPieceDims;
#pragma unroll 4
    for (int row = threadIdx.x / kLanesPerVector; row < kTileKeys;
         row += kThreads / kLanesPerVector) {
      const int token = this->token_at(piece / kPieces * kTileKeys + row);
      const bool wanted = token < this->tile.kv_end;
      const char* from = (wanted ? this->keys.at(token) : this->keys.base) + 2 * dim + 16 * unit;
      const uint32_t to = piece_stage(piece) + row * row_bytes(kPieceDims) + 16 * unit;
#pragma unroll
      for (int i = 0; i < kPieceDims / 8; i += kLanesPerVector) {
        ptx::copy_async_alone(to + 16 * i, from + 16 * i, wanted);
      }
    }
  }

  // As Reader's.
  __device__ __forceinline__ void begin() const {
    const int pieces = this->tiles() * kPieces;
#pragma unroll
    for (int piece = 0; piece < kPieceStages - 1; ++piece) {
      if (piece < pieces) load_piece(piece);
      ptx::commit_copies();
    }
  }

  __device__ __forceinline__ void run(const int (&seen_by)[kMaxRows]) {
    this->see(seen_by);
    const int pieces = this->tiles() * kPieces;
    const int warp_row = static_cast<int>(threadIdx.x) / 32 * kWarpRows;
    const uint32_t rows = this->queries + warp_row * row_bytes(256);
    Partial partial;
    partial.clear();
    Held held;
    held.count = 0;
    for (int first = 0; first < pieces; first += kPieces) {
      float logits[2][kTileKeys / 8][4] = {};
#pragma unroll 1
      for (int piece = first; piece < first + kPieces; ++piece) {
        ptx::wait_copies_but<kPieceStages - 2>();
        __syncthreads();
        const int next = piece + kPieceStages - 1;
        if (next < pieces) load_piece(next);
        ptx::commit_copies();
        if (warp_row >= this->tile.rows) continue;
        const uint32_t dims = 2 * kPieceDims * (piece - first);
        multiply_dim<Element, kTileKeys / 8, kPieceDims, 256>(logits, rows + dims,
                                                              piece_stage(piece));
      }
      if (warp_row < this->tile.rows) {
        this->fold_products(logits, first / kPieces, partial, held);
      }
    }
    this->write(held);
    ptx::wait_copies_but<0>();
    __syncthreads();
  }
};

}  // namespace compactattn::select
