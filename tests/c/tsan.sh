#!/bin/sh
# Eight threads on one context, one plan and the registry of handles under ThreadSanitizer, for so many seconds.
#
#   tests/c/tsan.sh [SECONDS]      60 by default; a nightly toolchain, two minutes to build
#
# The standard library stays as it is shipped, without instrumentation: its locks and joins are seen through the
# interceptors of pthreads and through the atomics that this crate's code inlines. What that gets wrong is named in
# tests/c/tsan.supp; a library's own worker threads are left out for it (num_threads 1).
set -eu
cd "$(dirname "$0")/../.."
target="$(rustc -vV | sed -n 's/^host: //p')"
out="${CARGO_TARGET_DIR:-target}/tsan"
mkdir -p "$out"
COMPACTATTN_CUDA=off RUSTFLAGS="-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer -Cdebuginfo=1" \
  CARGO_TARGET_DIR="$out" cargo +nightly rustc --lib --crate-type staticlib --target "$target"
# Rust's own runtime: GCC's has not all that LLVM's instrumentation calls.
runtime=$(find "$(rustc +nightly --print sysroot)" -name '*rt.tsan.a' | head -1)
g++ -std=c++17 -g -O1 -Wall -Wextra -Werror -Wno-unused-function -fsanitize=thread -Iinclude -c tests/c/threads.cpp -o "$out/threads.o"
g++ -o "$out/threads" "$out/threads.o" "$out/$target/debug/libcompactattn.a" \
  -Wl,--whole-archive "$runtime" -Wl,--no-whole-archive -lpthread -ldl -lm -lrt
export TSAN_OPTIONS="suppressions=$PWD/tests/c/tsan.supp"
if "$out/threads" race > "$out/race.log" 2>&1 || ! grep -q "data race" "$out/race.log"; then
  echo "a deliberate race went unseen: the sanitizer is off"
  exit 1
fi
echo "a deliberate race was caught"
"$out/threads" "${1:-60}"
echo "ThreadSanitizer: clean"
