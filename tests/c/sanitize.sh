#!/bin/sh
# Runs the C smoke test on the static library under AddressSanitizer (with leak detection), and proves first that it
# is on: a deliberate bad access must be caught. Without a nightly toolchain: the same under valgrind.
set -eu
cd "$(dirname "$0")/../.."
target="$(rustc -vV | sed -n 's/^host: //p')"
out="${CARGO_TARGET_DIR:-target}/sanitize"
mkdir -p "$out"
flags="-std=c99 -g -O1 -Wall -Wextra -Werror -pedantic -Wno-unused-function -Iinclude"

cat > "$out/bad.c" <<'C'
/* Tells the library that a struct is longer than it is: it must read past the end, and the sanitizer must see it. */
#include <stdlib.h>
#include "compactattn.h"
int main(void) {
  compactattn_context_desc *desc = (compactattn_context_desc *)calloc(1, sizeof *desc);
  compactattn_context *context = NULL;
  desc->struct_size = sizeof *desc + 8;
  return compactattn_context_create(desc, &context) == COMPACTATTN_OK;
}
C

caught() { # COMMAND...: must fail, and name the fault
  if "$@" > "$out/bad.log" 2>&1; then echo "a bad access went unseen: the sanitizer is off"; exit 1; fi
  grep -Eq "heap-buffer-overflow|Invalid read" "$out/bad.log" || { cat "$out/bad.log"; exit 1; }
  echo "a deliberate bad access was caught: $(grep -Eom1 'heap-buffer-overflow|Invalid read' "$out/bad.log")"
}

if cargo +nightly --version > /dev/null 2>&1; then
  # The standard library stays as it is shipped; this crate's own loads and stores are checked.
  RUSTFLAGS="-Zsanitizer=address -Cdebuginfo=1" CARGO_TARGET_DIR="$out" \
    cargo +nightly rustc --lib --crate-type staticlib --target "$target"
  library="$out/$target/debug/libcompactattn.a"
  for source in "tests/c/smoke.c" "$out/bad.c"; do
    # shellcheck disable=SC2086
    gcc $flags -fsanitize=address "$source" "$library" -lpthread -ldl -lm -o "$out/$(basename "$source" .c)"
  done
  caught "$out/bad"
  ASAN_OPTIONS=detect_leaks=1:strict_init_order=1 "$out/smoke"
  # The example server: pages that change hands, steps that overlap.
  g++ -std=c++17 -g -O1 -fsanitize=address -Iinclude -Icpp_shim/include cpp_shim/examples/paged_server/*.cpp \
    "$library" -lpthread -ldl -lm -o "$out/paged_server"
  ASAN_OPTIONS=detect_leaks=1:strict_init_order=1 "$out/paged_server" > "$out/paged_server.log" \
    || { tail "$out/paged_server.log"; exit 1; }
  tail -2 "$out/paged_server.log"
  echo "AddressSanitizer and LeakSanitizer: clean"
else
  cargo build
  library="${CARGO_TARGET_DIR:-target}/debug/libcompactattn.a"
  for source in "tests/c/smoke.c" "$out/bad.c"; do
    # shellcheck disable=SC2086
    gcc $flags "$source" "$library" -lpthread -ldl -lm -o "$out/$(basename "$source" .c)"
  done
  caught valgrind -q --error-exitcode=9 "$out/bad"
  # What a process keeps until its end (the handle registry) is reachable, so not a leak.
  valgrind -q --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite,possible "$out/smoke"
  echo "valgrind: clean"
fi
