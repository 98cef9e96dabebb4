#!/bin/sh
# Compiles the GPU stages and the timing variants into $1, side by side; CUTLASS's headers lie in $CUTLASS_INCLUDE.
set -eu
mkdir -p "$1"
root=$(cd "$(dirname "$0")/../.." && pwd)
compile() { # folder, source, name, flag
  into="$1/$3"
  nvcc -cubin -O3 -std=c++17 -DNDEBUG --expt-relaxed-constexpr -lineinfo -Xptxas -v -I"$CUTLASS_INCLUDE" ${4:-} \
    -gencode arch=compute_90a,code=sm_90a -o "$into.cubin" "$root/$2" > "$into.log" 2>&1 || touch "$1/failed"
}
compile "$1" cuda/plan/work.cu work &
compile "$1" tests/gpu/variants.cu variants &
for arch in sm90 sm80; do
  for source in "$root/cuda/attend/$arch/inst/"*.cu; do
    name=$(basename "$source" .cu)
    compile "$1" "cuda/attend/$arch/inst/$name.cu" "${arch}_$name" &
  done
done
for source in "$root/cuda/attend/sm80/inst/"*.cu; do # with the tiles of GPUs with little shared memory
  name=$(basename "$source" .cu)
  compile "$1" "cuda/attend/sm80/inst/$name.cu" "sm80small_$name" -DCOMPACTATTN_ROOMY=0 &
done
wait
grep -hi "error\|warning\|C75\|spill" "$1"/*.log | grep -v " 0 bytes spill stores, 0 bytes spill loads" || true
test ! -e "$1/failed"
