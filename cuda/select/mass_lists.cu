// select, scores of rows of no more than 4096 blocks, and union and table after them.
#define COMPACTATTN_HEAD_CTAS 4
#include "mass_lists.cuh"

extern "C" __global__ void COMPACTATTN_CLUSTER_OF_PARTS __launch_bounds__(512, 1)
    compactattn_mass_lists(const __grid_constant__ compactattn::Step step,
                           const __grid_constant__ compactattn::select::Wish wish) {
  extern __shared__ uint32_t dynamic_words[];
  compactattn::select::mass_lists(step, wish, dynamic_words);
}
