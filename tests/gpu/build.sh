#!/bin/sh
# Compiles the GPU stages and the timing variants into $1, side by side; CUTLASS's headers lie in $CUTLASS_INCLUDE.
set -eu
mkdir -p "$1"
root=$(cd "$(dirname "$0")/../.." && pwd)
for source in cuda/attend/sm90/inst/bf16_d128 cuda/attend/sm90/inst/fp16_d128 cuda/plan/plan cuda/combine/combine tests/gpu/variants; do
  into="$1/$(basename $source)"
  nvcc -cubin -O3 -std=c++17 -DNDEBUG --expt-relaxed-constexpr -lineinfo -Xptxas -v -I"$CUTLASS_INCLUDE" \
    -gencode arch=compute_90a,code=sm_90a -o "$into.cubin" "$root/$source.cu" > "$into.log" 2>&1 || touch "$1/failed" &
done
wait
grep -hi "error\|warning\|C75\|spill" "$1"/*.log || true
test ! -e "$1/failed"
