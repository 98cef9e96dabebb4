#!/bin/sh
# Installs the CUDA compiler of cuda/requirements.txt into DIR and prints DIR: toolkit.sh [--if-missing] [DIR]
# Wanted: python3 with pip or venv. About 110 MB to download, 320 MB on disk. Without DIR it goes where build.rs looks;
# of another folder tell it by CUDA_HOME=DIR/nvidia/cu13. --if-missing: does nothing where there is an nvcc with CUTLASS.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
wheels=$here/requirements.txt

if [ "${1:-}" = --if-missing ]; then
    shift
    nvcc=${NVCC:-${CUDA_HOME:+$CUDA_HOME/bin/nvcc}}
    nvcc=${nvcc:-$(command -v nvcc || true)}
    for cutlass in "${CUTLASS_DIR:-none}" "$(dirname "$nvcc")/../../../cutlass_library/source"; do
        if [ -x "$nvcc" ] && [ -e "$cutlass/include/cutlass/version.h" ]; then exit 0; fi
    done
fi

hash=$("$python" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest()[:16])' "$wheels")
dir=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/compactattn/toolkit-$hash}
stamp=.requirements-$hash

if [ ! -e "$dir/$stamp" ]; then
    if [ -e "$dir" ] && [ -n "$(ls -A "$dir")" ]; then
        echo "toolkit.sh: $dir holds something else; name another folder or remove it" >&2
        exit 1
    fi
    mkdir -p "$(dirname "$dir")"
    # Complete or not there at all: the folder gets its name last.
    new=$(mktemp -d "$(dirname "$dir")/.toolkit-XXXXXX")
    trap 'rm -rf "$new" "$new.venv"' EXIT
    trap 'exit 1' HUP INT TERM
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        "$python" -m venv "$new.venv" >&2
        python=$new.venv/bin/python
    fi
    echo "toolkit.sh: installing the CUDA compiler into $dir" >&2
    # One command for all wheels: a second one into the same folder silently leaves out what shares a folder name.
    PIP_ROOT_USER_ACTION=ignore "$python" -m pip install -q --disable-pip-version-check --no-deps --no-compile --only-binary :all: \
        --target "$new" -r "$wheels" >&2
    chmod 755 "$new"
    touch "$new/$stamp"
    mv -T "$new" "$dir" 2>/dev/null || test -e "$dir/$stamp" # another run was first: theirs is the same
    # A build without kernels was right until now; cargo sees the newer date and looks again.
    touch -c "$wheels" 2>/dev/null || true
fi
echo "$dir"
