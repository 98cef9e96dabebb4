#!/bin/sh
# The installed package as strangers use it. Usage: tests/cpp/run.sh PREFIX BUILD_DIR
set -eu

prefix=$(cd "$1" && pwd)
mkdir -p "$2"
build=$(cd "$2" && pwd)
tests=$(cd "$(dirname "$0")" && pwd)
example=$tests/../../cpp_shim/examples/paged_server
cxx=${CXX:-g++}

fail() {
  echo "tests/cpp: $*" >&2
  exit 1
}

# configure_and_build SOURCE NAME PREFIX [OPTION...]
configure_and_build() {
  source=$1 name=$2 from=$3
  shift 3
  cmake -S "$source" -B "$build/$name" -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$from" "$@" > "$build/$name.log"
  cmake --build "$build/$name" >> "$build/$name.log" || fail "$name does not build, see $build/$name.log"
}

check_headers() {
  for compiler in "$cxx" clang++; do
    command -v "$compiler" > /dev/null || continue
    for mode in -fexceptions -fno-exceptions -DCOMPACTATTN_NO_EXCEPTIONS; do
      for standard in c++17 c++20; do
        echo '#include <compactattn.hpp>' | "$compiler" -x c++ -std=$standard $mode -Wall -Wextra -Wconversion -Wshadow \
          -Werror -pedantic -fsyntax-only -I "$prefix/include" - || fail "header: $compiler $standard $mode"
      done
    done
  done
}

# The static build uses a copy of the tree elsewhere: the package must not know where it was installed.
check_cmake() {
  moved=$build/moved
  rm -rf "$moved"
  cp -a "$prefix" "$moved"
  for link in shared static; do
    from=$prefix
    [ $link = shared ] || from=$moved
    configure_and_build "$example" "example-$link" "$from" -DCOMPACTATTN_LINK=$link
    configure_and_build "$tests" "tests-$link" "$from" -DCOMPACTATTN_LINK=$link
    "$build/tests-$link/raii_throwing"
    "$build/tests-$link/raii_reporting"
    "$build/example-$link/paged_server"
  done
  if cmake -S "$tests" -B "$build/too-new" -DCMAKE_PREFIX_PATH="$prefix" -DWANTED_VERSION=0.9 > "$build/too-new.log" 2>&1; then
    fail "find_package(compactattn 0.9) is satisfied by another version"
  fi
}

# The example's bound means something only if worse lists exceed it.
check_example_can_fail() {
  if "$build/example-shared/paged_server" --selector streaming > "$build/streaming.log"; then
    fail "paged_server accepts a selector that misses what matters, see $build/streaming.log"
  fi
  grep -q '^total: ' "$build/streaming.log" || fail "paged_server --selector streaming ended early"
}

# Built without CUDA, it runs where there is a GPU and says why where it cannot; any other end is a fault.
check_example_on_gpu() {
  "$build/example-shared/paged_server" --device cuda > "$build/cuda.log" 2>&1 && return
  grep -Eq '^paged_server: (no CUDA driver|cuInit: CUDA_ERROR_NO_DEVICE|.*no GPU kernels in this build)' "$build/cuda.log" \
    || fail "paged_server --device cuda, see $build/cuda.log"
}

check_pkg_config() {
  pkg_config=$(command -v pkg-config || command -v pkgconf) || fail "needs pkg-config or pkgconf"
  export PKG_CONFIG_PATH="$prefix/lib/pkgconfig"
  version=$($pkg_config --modversion compactattn)
  objects=
  for name in raii_test other_mode count_allocations; do
    # other_mode.cpp wants the other way of reporting.
    mode=-fexceptions
    [ $name != other_mode ] || mode=-fno-exceptions
    "$cxx" -std=c++17 $mode "-DEXPECTED_VERSION=\"$version\"" "$tests/$name.cpp" -c -o "$build/$name.o" \
      $($pkg_config --cflags compactattn)
    objects="$objects $name.o"
  done
  cd "$build"
  "$cxx" $objects -o raii-pkg-config $($pkg_config --libs compactattn)
  LD_LIBRARY_PATH="$prefix/lib" ./raii-pkg-config
  "$cxx" $objects -o raii-pkg-config-static \
    "$($pkg_config --variable=static_library compactattn)" $($pkg_config --static --libs-only-other compactattn)
  ./raii-pkg-config-static
}

check_binaries() {
  library=$prefix/lib/libcompactattn.so
  version=$(PKG_CONFIG_PATH="$prefix/lib/pkgconfig" $pkg_config --modversion compactattn)
  soname=$(readelf -d "$library" | sed -n 's/.*SONAME.*\[\(.*\)\]/\1/p')
  [ "$soname" = "libcompactattn.so.${version%%.*}" ] || fail "SONAME is '$soname'"
  needed=$(readelf -d "$library" | sed -n 's/.*NEEDED.*\[\(.*\)\]/\1/p')
  for name in $needed; do
    case $name in
      libgcc_s.so.* | libc.so.* | libm.so.* | ld-linux*) ;;
      *) fail "libcompactattn.so needs $name" ;;
    esac
  done
  foreign=$(exports "$library" | grep -v '^compactattn_' || true)
  [ -z "$foreign" ] || fail "libcompactattn.so exports $foreign"
  declared=$(grep -o 'compactattn_[a-z_]*(' "$prefix/include/compactattn.h" | tr -d '(' | sort -u)
  [ "$(exports "$library" | sort -u)" = "$declared" ] || fail "exports and header differ"
  leaked=$(exports "$build/tests-static/libplugin.so")
  [ "$leaked" = plugin_version ] || fail "a library made from compactattn::static exports $leaked"
}

# Symbols a dynamic library defines for others.
exports() {
  nm -D --defined-only "$1" | awk '{ print $NF }'
}

check_headers
check_cmake
check_example_can_fail
check_example_on_gpu
check_pkg_config
check_binaries
echo "tests/cpp: ok"
