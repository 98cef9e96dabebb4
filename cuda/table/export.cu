// table: lists as whole engine pages, for kernels that read nothing smaller (rust/export.rs).
#include "../common/bits.cuh"
#include "../common/cta.cuh"
#include "../common/spans.cuh"
#include "../ptx/grid.cuh"
#include "export.h"

namespace compactattn {
namespace {

constexpr int kPagesPerThread = 8;
constexpr int kPagesPerTurn = kPagesPerThread * cta::kThreads;

// One list row, seen in whole pages.
struct PageRow {
  const uint32_t* bits;     // [mask_words], global
  const int32_t* page_ids;  // of the request, in logical order
  int log2_page;
  int log2_block;
  int kv_end;      // KV tokens that the span sees: 0 where there is no such row
  int num_pages;   // that hold them
  int num_blocks;  // that hold them

  // Whether the list names a token of logical page `page`, 0 .. num_pages.
  __device__ bool holds(int page) const {
    if (log2_block >= log2_page) {
      const int block = page >> (log2_block - log2_page);
      return bits[block >> 5] >> (block & 31) & 1;
    }
    const int first = page << (log2_page - log2_block);
    const int end = min(first + (1 << (log2_page - log2_block)), num_blocks);
    for (int word = first >> 5; word * 32 < end; ++word) {
      if (bits[word] & range_word(word, first, end)) return true;
    }
    return false;
  }

  // Which of the kPagesPerThread pages from `begin` on it holds.
  __device__ uint32_t held_from(int begin) const {
    uint32_t held = 0;
    for (int i = 0; i < kPagesPerThread && begin + i < num_pages; ++i)
      held |= static_cast<uint32_t>(holds(begin + i)) << i;
    return held;
  }

  // Tokens of the last page held, of `count`: only the span's very last page may lack some.
  __device__ int last_page_len(int count) const {
    if (count == 0) return 0;
    const int last = num_pages - 1;
    return holds(last) ? kv_end - (last << log2_page) : 1 << log2_page;
  }
};

__device__ PageRow page_row(const Step& step, int64_t row) {
  const Layout& layout = step.layout;
  PageRow mine{};
  const int span = static_cast<int>(row / lists_per_span(layout));
  if (span >= step.stages.counters->num_list_spans) return mine;
  const Span& of = step.stages.list_spans[span];
  mine.bits = step.stages.lists + row * layout.mask_words;
  mine.page_ids = step.batch.block_table + of.req * step.batch.table_stride;
  mine.log2_page = layout.log2_page_tokens;
  mine.log2_block = layout.log2_block_tokens;
  mine.kv_end = of.kv_end;
  mine.num_pages = pieces_of(of.kv_end, 1 << mine.log2_page);
  mine.num_blocks = pieces_of(of.kv_end, 1 << mine.log2_block);
  return mine;
}

// Calls store(place in the row, logical page) for every page held, ascending; how many there are.
template <class Store>
__device__ int each_page(const PageRow& row, Store store) {
  int before = 0;
  for (int base = 0; base < row.num_pages; base += kPagesPerTurn) {
    const int begin = base + static_cast<int>(threadIdx.x) * kPagesPerThread;
    uint32_t held = row.held_from(begin);
    const cta::Sum<int> sum = cta::exclusive_sum(__popc(held));
    for (int at = before + sum.before; held != 0; held &= held - 1)
      store(at++, begin + __ffs(held) - 1);
    before += sum.total;
  }
  return before;
}

}  // namespace
}  // namespace compactattn

// Grid rows x 256, after plan_spans.
extern "C" __global__ void __launch_bounds__(256)
    compactattn_export_padded(const __grid_constant__ compactattn::Step step,
                              const __grid_constant__ compactattn::PaddedTables tables) {
  using namespace compactattn;
  ptx::wait_for_earlier();
  const int64_t row = blockIdx.x;
  const PageRow mine = page_row(step, row);
  int32_t* pages = tables.pages + row * tables.width;
  const int count = each_page(mine, [&](int at, int page) { pages[at] = mine.page_ids[page]; });
  for (int i = count + threadIdx.x; i < tables.width; i += cta::kThreads) pages[i] = 0;
  if (threadIdx.x != 0) return;
  const int whole = count > 0 ? (count - 1) << mine.log2_page : 0;
  tables.counts[row] = count;
  tables.seq_lens[row] = whole + mine.last_page_len(count);
}

// Grid rows x 256, after plan_spans: each row's pages into indptr[row + 1].
extern "C" __global__ void __launch_bounds__(256)
    compactattn_export_counts(const __grid_constant__ compactattn::Step step,
                              const __grid_constant__ compactattn::CsrTables tables) {
  using namespace compactattn;
  ptx::wait_for_earlier();
  const int64_t row = blockIdx.x;
  const PageRow mine = page_row(step, row);
  const int count = each_page(mine, [](int, int) {});
  if (threadIdx.x != 0) return;
  tables.indptr[row + 1] = count;
  tables.last_page_len[row] = mine.last_page_len(count);
}

// One CTA x 256: counts to where rows start.
extern "C" __global__ void __launch_bounds__(256)
    compactattn_export_starts(const __grid_constant__ compactattn::CsrTables tables) {
  using namespace compactattn;
  ptx::wait_for_earlier();
  if (threadIdx.x == 0) tables.indptr[0] = 0;
  int before = 0;
  for (int base = 0; base < tables.rows; base += cta::kThreads) {
    const int row = base + static_cast<int>(threadIdx.x);
    const int mine = row < tables.rows ? tables.indptr[row + 1] : 0;
    const cta::Sum<int> sum = cta::exclusive_sum(mine);
    if (row < tables.rows) tables.indptr[row + 1] = before + sum.before + mine;
    before += sum.total;
  }
}

// Grid rows x 256, after starts.
extern "C" __global__ void __launch_bounds__(256)
    compactattn_export_csr(const __grid_constant__ compactattn::Step step,
                           const __grid_constant__ compactattn::CsrTables tables) {
  using namespace compactattn;
  ptx::wait_for_earlier();
  const int64_t row = blockIdx.x;
  const PageRow mine = page_row(step, row);
  int32_t* indices = tables.indices + tables.indptr[row];
  each_page(mine, [&](int at, int page) { indices[at] = mine.page_ids[page]; });
}
