// union and table of long rows: union_table.cu by four times the threads.
#define COMPACTATTN_CTA_THREADS 1024
#include "union_table.cuh"

// Grid and shared memory as compactattn_union_table, x 1024.
extern "C" __global__ void __launch_bounds__(1024, 1)
    compactattn_union_table_wide(const __grid_constant__ compactattn::Step step, int32_t external) {
  extern __shared__ uint32_t dynamic[];
  compactattn::union_table(step, external, dynamic);
}
