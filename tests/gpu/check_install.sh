#!/bin/sh
# The wheel on a GPU machine, as a user meets it: check_install.sh WHEEL
# A fresh environment without a compiler on its PATH, without torch and without an index: install, doctor, a layer of
# real tensors through the kernels, each timed; then, where the machine has torch, its CUDA tensors against its own sdpa.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
wheel=$(readlink -f "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
begin=$(date +%s%N)
above=

timed() {
    what=$1
    shift
    start=$(date +%s%N)
    "$@" || {
        echo "failed: $what" >&2
        cat "$work"/*.json >&2 || true
        exit 1
    }
    echo "$what: $((($(date +%s%N) - start) / 1000000)) ms"
}
# What a driver may need to be found is all that is passed on.
fresh() {
    env -i HOME="$work" PATH="$work/env/bin" LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}" "$@"
}

uname -sr
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
sha256sum "$wheel" | sed "s|$(dirname "$wheel")/||"
timed "environment" python3 -m venv --without-pip "$work/env"
timed "pip install" python3 -m pip --disable-pip-version-check --python "$work/env/bin/python" install -q --no-index --no-deps "$wheel"
if fresh python -c 'import shutil, sys; sys.exit(shutil.which("nvcc") is None)'; then
    echo "there is an nvcc on PATH" >&2
    exit 1
fi
timed "doctor" fresh compactattn doctor --json >"$work/doctor.json"
fresh python - "$work/doctor.json" <<'PY'
import json, sys

lines = open(sys.argv[1]).read()
end = lines.rindex("}") + 1
report = json.loads(lines[:end])
print(lines[end:].strip())
print({name: report[name] for name in ("build", "cuda", "self_test", "gpu_self_test", "collisions")})
assert report["gpu_self_test"]["result"] == report["self_test"]["result"] == "passed"
assert report["python"]["library"].startswith("loaded")
PY
timed "a layer on the GPU" fresh compactattn attend --device cuda --output "$work/out.safetensors" \
    --input "$root/tests/data/smollm2_layer26.safetensors"
# Bars of 100 and 300 ms; the least of three, as the machine may be busy. What the driver takes by itself for a context is
# part of the second, and is measured beside it.
cat >"$work/times.py" <<'PY'
import ctypes, sys, time

if sys.argv[1:] == ["driver"]:
    begin = time.perf_counter()
    driver, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
    assert driver.cuInit(0) == driver.cuDeviceGet(ctypes.byref(device), 0) == 0
    assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
    print(f"the driver's own start and context: {1e3 * (time.perf_counter() - begin):.0f} ms")
begin = time.perf_counter()
import compactattn

imported = time.perf_counter()
from compactattn.context import Context

held = Context("cuda:0")  # Else its destruction would be timed, too.
print(f"import {1e3 * (imported - begin):.0f} ms, library and CUDA context {1e3 * (time.perf_counter() - imported):.0f} ms")
PY
for _ in 1 2 3; do fresh python "$work/times.py"; done | tee "$work/times"
fresh python "$work/times.py" driver
sort -t' ' -k2n "$work/times" | awk 'NR == 1 { exit $2 >= 100 }' || above="$above import"
sort -t' ' -k8n "$work/times" | awk 'NR == 1 { exit $8 >= 300 }' || above="$above context"
total=$((($(date +%s%N) - begin) / 1000000))
echo "from nothing to a kernel's answer: $total ms"
[ "$total" -lt 60000 ] || above="$above total"
for file in "$work"/env/lib/python3*/site-packages/compactattn/libcompactattn.so "$work/env/bin/compactattn"; do
    needed=$(readelf -d "$file" | sed -n 's/.*NEEDED.*\[\(.*\)\]/\1/p' | tr '\n' ' ')
    echo "$(basename "$file") needs $needed"
    case $needed in *torch* | *cudart* | *python* | *libcuda.*) exit 1 ;; esac
done

if python3 -c 'import torch' 2>/dev/null; then
    site=$(fresh python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "the README's lines for torch, as written, and dense against fp64:"
    PYTHONPATH=$site python3 "$root/tests/gpu/check_torch.py"
    PYTHONPATH=$site python3 - <<'PY'
import torch
import compactattn

torch.manual_seed(0)
shapes = (512, 8, 128), (160, 64, 2, 128), (160, 64, 2, 128)
q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
order = torch.randperm(160).tolist()
table, lens, cu = (torch.tensor(x, device="cuda", dtype=torch.int32) for x in ([order], [10240], [0, 512]))
settings = compactattn.Settings.of("dense")
out = compactattn.forward(q, k, v, table, lens, cu, settings=settings).float()
flat = [x[order].reshape(-1, 2, 128).repeat_interleave(4, 1).transpose(0, 1).float() for x in (k, v)]
mask = torch.arange(10240, device="cuda")[None] <= torch.arange(512, device="cuda")[:, None] + 10240 - 512
want = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1).float(), *flat, attn_mask=mask).transpose(0, 1)
error = ((out - want).norm() / want.norm()).item()
# Weights and outputs are rounded to bf16, 2^-9 each, independently; sdpa in f32 may use TF32's 2^-11 for its products.
print(f"torch's CUDA tensors: relative error {error:.1e}")
assert error < 2**-7
PY
fi
[ -z "$above" ] || {
    echo "above its bar:$above"
    exit 1
}
echo "passed"
