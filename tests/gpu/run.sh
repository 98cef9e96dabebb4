#!/bin/sh
# Every GPU test on this machine, from a folder of carried binaries; no Rust and no compiler needed.
#
#   tests/gpu/run.sh BINARIES RECORD [GPU_SUITE_OPTIONS]
#
# BINARIES holds gpu_suite (target/release/deps/gpu_suite-*, built by `cargo test --release --no-run`) and, for the
# counters, libcounting_driver.so (cc -shared -fPIC tests/gpu/counting_driver.c -ldl). RECORD is the file to write, for
# tests/bench/record/<gpu>/<date>-suite.txt. CASES, COUNT, REPLAYS, HEAVY (cases of tables and reuse), SOAK (seconds) and
# SANITIZERS ("" for none) cut a run short; SEED starts all parts elsewhere.
# Exits with 1 if any part failed; what could not run is said in the record and fails too.
set -u
binaries=$(cd "$1" && pwd)
record=$2
shift 2
suite=$binaries/gpu_suite
cases=${CASES:-20000} count=${COUNT:-1000} replays=${REPLAYS:-1000}
heavy=${HEAVY:-10000} soak=${SOAK:-60} seed=${SEED:-1}
sanitizers=${SANITIZERS-memcheck racecheck initcheck synccheck}
failed=0
mkdir -p "$(dirname "$record")"
: > "$record"

say() {
  echo "$*" | tee -a "$record"
}

# part NAME COMMAND...: its output and verdict, how long it took.
part() {
  begin "$@"
  finish "$1"
}

# begin NAME COMMAND...: starts a part, for finish to wait for; what checks answers alone may run beside the rest.
begin() {
  name=$1
  shift
  {
    start=$(date +%s)
    status=0
    echo "== $name: $*" > "$record.$name"
    "$@" > "$record.$name.all" 2>&1 || status=$?
    tail -n 60 "$record.$name.all" >> "$record.$name"
    if [ "$status" -eq 0 ]; then verdict=ok; else verdict="FAILED ($status)"; fi
    echo "== $name: $verdict, $(($(date +%s) - start)) s" >> "$record.$name"
    rm -f "$record.$name.all"
  } &
  eval "job_$(echo "$name" | tr - _)=$!"
}

finish() {
  eval "wait \$job_$(echo "$1" | tr - _)"
  say
  # Paths of this machine mean nothing in a record.
  sed "s|$binaries/||g" "$record.$1" | tee -a "$record"
  tail -n 1 "$record.$1" | grep -q ": ok," || failed=1
  rm -f "$record.$1"
}

machine() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader ||
    say "no nvidia-smi"
  grep -m 1 "model name" /proc/cpuinfo
  echo "$(nproc) cores, $(uname -sr)"
}

sanitizer() {
  compute-sanitizer --version 2> /dev/null | grep -m 1 -i version
}

say "GPU suite, $(date -u +%Y-%m-%dT%H:%MZ)"
machine 2>&1 | tee -a "$record"
say "gpu_suite $(sha256sum "$suite" | cut -c 1-16), ${COMMIT:+commit $COMMIT, }$(sanitizer || echo no compute-sanitizer)"

for tool in $sanitizers; do
  # The library and its tests leave the primary context to the process's end: leaks are not looked for here. Codes of
  # driver calls are the library's to judge: it asks for parameters until the driver has no more.
  begin "$tool" compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 "$suite" sanitizer-cases "$@"
done
case " $sanitizers " in *" memcheck "*)
  begin memcheck-tables compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 "$suite" tables \
    --count 200 --apart 1 --threads 2 --seed "$seed" "$@" ;;
esac
part differential "$suite" differential --cases "$cases" --seed "$seed" "$@"
part metamorphic "$suite" metamorphic --count $((count / 2)) --seed "$seed" "$@"
part exact "$suite" exact --count $((count * 5)) --seed "$seed" "$@"
part tables "$suite" tables --count "$heavy" --seed "$seed" "$@"
part reuse "$suite" reuse --count "$heavy" --seed "$seed" "$@"
part classes "$suite" classes --count 100 --seed "$seed" "$@"
part big-pool "$suite" big-pool --count 200 --seed "$seed" "$@"
part laws "$suite" laws "$@"
part means "$suite" means --count "$count" --seed "$seed" "$@"
part stale "$suite" stale --count 100 "$@"
part combine "$suite" combine "$@"
part gate "$suite" gate "$@"
part sanitizer-cases "$suite" sanitizer-cases "$@"
part repeats "$suite" repeats --count "$count" "$@"
part perturb "$suite" perturb --count "$count" --seed "$seed" "$@"
part soak "$suite" soak --seconds "$soak" --count 1000000 --seed "$seed" "$@"
part graph "$suite" graph --replays "$replays" "$@"
part bad-input "$suite" bad-input "$@"
part counters env FAKE_CUDA=forward COMPACTATTN_LIBCUDA="$binaries/libcounting_driver.so" "$suite" counters "$@"
for tool in $sanitizers; do
  finish "$tool"
  if [ "$tool" = memcheck ]; then finish memcheck-tables; fi
done

say
say "$([ "$failed" -eq 0 ] && echo PASS || echo FAIL)"
exit "$failed"
