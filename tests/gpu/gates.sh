#!/bin/sh
# The gates of docs/reliability.md at their full counts, beside whatever else a GPU machine does; no Rust, no compiler.
#
#   tests/gpu/gates.sh start BINARIES FOLDER     begins in the background and returns at once
#   tests/gpu/gates.sh collect FOLDER [TO]       says what there is so far; copies the record to TO
#   tests/gpu/gates.sh run BINARIES FOLDER       the same in the foreground
#
# BINARIES as for tests/gpu/run.sh. FOLDER gets a file a part as it goes. Four lanes side by side, made for 16 cores and
# nine minutes (the soak: ten): LIMIT is when no case starts any more, SOAK the seconds of the soak, SCALE a divisor of all
# counts for a trial (DEVICE=cpu: without a GPU), LANES the lanes to run ("1 2 3 4"), THREADS those of lane 1. Exits with 1 if a part failed.
set -u
: "${LIMIT:=540}" "${SOAK:=600}" "${SCALE:=1}" "${LANES:=1 2 3 4}" "${THREADS:=7}" "${SEED:=1}"
export LIMIT SOAK SCALE LANES THREADS SEED

start() {
  mkdir -p "$2"
  # A session of its own: what a command leaves behind is ended with it otherwise.
  setsid nohup "$0" run "$1" "$2" > "$2/log" 2>&1 < /dev/null &
  echo "started; $0 collect $2"
}

run() {
  binaries=$(cd "$1" && pwd)
  mkdir -p "$2"
  folder=$(cd "$2" && pwd)
  suite=$binaries/gpu_suite
  begun=$(date +%s)
  rm -f "$folder"/*.part "$folder/done"
  head_lines > "$folder/head.part"
  pids=
  for lane in $LANES; do
    "lane_$lane" &
    pids="$pids $!"
  done
  for pid in $pids; do wait "$pid"; done
  echo "$(($(date +%s) - begun)) s" > "$folder/done"
  ! grep -l ": FAILED" "$folder"/*.part
}

# G1, and whatever cores it gets: the f64 oracle is most of the work.
lane_1() {
  for i in 0 1 2 3 4; do
    part "1$i-G1" differential --cases "$(of 20000)" --seed $((SEED + i)) --threads "$THREADS"
  done
}

lane_2() {
  export COMPACTATTN_CHECK=1
  part 25-checked checked --count "$(of 2000)" --seed "$SEED" --threads 5
  part 26-checked-G1 differential --cases "$(of 5000)" --seed $((SEED + 5)) --threads 5
  unset COMPACTATTN_CHECK
  part 20-G6 tables --count "$(of 10000)" --seed "$SEED" --threads 5
  part 21-G6b reuse --count "$(of 10000)" --seed "$SEED" --threads 5
  part 22-G3 metamorphic --count "$(of 546)" --seed "$SEED" --threads 5
  part 23-G2 exact --count "$(of 5000)" --seed "$SEED" --threads 5
  part 24-means means --count "$(of 600)" --seed "$SEED" --threads 5
}

lane_3() {
  export FAKE_CUDA=forward COMPACTATTN_LIBCUDA="$binaries/libcounting_driver.so"
  soak 30-G13 "$SOAK" bf16
}

lane_4() {
  part 40-G9 big-pool --count "$(of 200)" --seed "$SEED"
  part 41-G5 classes --count "$(of 130)" --seed "$SEED" --threads 2
  part 42-G8 perturb --count "$(of 1000)" --seed "$SEED"
  part 43-G10 graph --replays "$(of 17000)"
  if command -v compute-sanitizer > /dev/null; then
    # As in tests/gpu/run.sh.
    suite="compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 $suite"
    part 44-G6-memcheck tables --count "$(of 200)" --apart 1 --threads 2 --seed "$SEED"
    suite=$binaries/gpu_suite
  fi
  left=$((LIMIT - $(date +%s) + begun))
  if [ "$left" -gt 20 ]; then
    export FAKE_CUDA=forward COMPACTATTN_LIBCUDA="$binaries/libcounting_driver.so"
    soak 45-G13-e4m3 "$left" e4m3
  fi
}

# of COUNT: what is left of it in a trial.
of() {
  echo $((($1 + SCALE - 1) / SCALE))
}

# part NAME ARGUMENTS...: as long as there is time.
part() {
  name=$1
  shift
  left=$((LIMIT - $(date +%s) + begun))
  if [ "$left" -le 0 ]; then
    echo "== $name: $* : FAILED, no time was left" > "$folder/$name.part"
    return
  fi
  judged "$name" "$@" --seconds "$left"
}

soak() {
  judged "$1" soak --seconds "$2" --count 10000000 --seed "$SEED" --kv "$3" --shared 1
}

judged() {
  name=$1
  shift
  from=$(date +%s)
  echo "== $name: $(basename "${suite##* }") $*" > "$folder/$name.part"
  # shellcheck disable=SC2086
  $suite "$@" ${DEVICE:+--device "$DEVICE"} >> "$folder/$name.part" 2>&1
  code=$?
  verdict=ok
  [ "$code" -eq 0 ] || verdict="FAILED ($code)"
  echo "== $name: $verdict, $(($(date +%s) - from)) s" >> "$folder/$name.part"
}

head_lines() {
  echo "Gates at their full counts, beside other work, $(date -u +%Y-%m-%dT%H:%MZ)"
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader 2> /dev/null || echo "no nvidia-smi"
  grep -m 1 "model name" /proc/cpuinfo
  echo "$(nproc) cores; gpu_suite $(sha256sum "$suite" | cut -c 1-16)${COMMIT:+, commit $COMMIT}"
}

collect() {
  if [ -n "${2:-}" ]; then
    mkdir -p "$(dirname "$2")"
    report "$1" > "$2"
    grep -E "^==|wrong|growth|steps in|times each|PASS|FAIL" "$2" | cut -c 1-200
  else
    report "$1"
  fi
}

# Parts in order; a part that still runs says so.
report() {
  cat "$1/head.part"
  for file in "$1"/[0-9]*.part; do
    echo
    # Paths of a machine mean nothing in a record.
    sed "s|/[^ ]*/gpu_suite|gpu_suite|g" "$file" | tail -n 60
    tail -n 1 "$file" | grep -q "^== .*: \(ok\|FAILED\)" || echo "== $(basename "$file" .part): still running"
  done
  echo
  if [ ! -e "$1/done" ]; then
    echo "not finished"
  elif grep -q ": FAILED" "$1"/*.part; then
    echo "FAIL, $(cat "$1/done")"
  else
    echo "PASS, $(cat "$1/done")"
  fi
}

verb=${1:-}
[ $# -ge 2 ] || verb=
case "$verb" in
  start | run | collect) shift; "$verb" "$@" ;;
  *) sed -n '2,13p' "$0"; exit 2 ;;
esac
