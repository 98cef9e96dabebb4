#!/bin/sh
# Whether packages are reproducible: again.sh DIST [KERNEL_CACHE]. Clones this commit, makes everything anew from it, every
# kernel too (20 minutes on two cores) unless there is a cache that may be trusted, and compares each byte with `make dist`.
#
# The clone is mounted at this tree's own path, in a mount namespace of its own, because the path does matter: nvcc names
# what CuTe's headers leave in a module by the absolute path of its source, and the linker's build id covers line tables.
# So DIST's kernels must have been compiled here too: `COMPACTATTN_KERNEL_CACHE=$PWD/build/kernels make dist`.
set -eu
dist=$(cd "$1" && pwd)
cache=${2:-}
root=$(cd "$(dirname "$0")/.." && pwd)
elsewhere=$(mktemp -d)
trap 'rm -rf "$elsewhere"' EXIT
git clone -q --no-checkout "$(cd "$root" && git rev-parse --path-format=absolute --git-common-dir)" "$elsewhere/clone"
git -C "$elsewhere/clone" checkout -q "$(git -C "$root" rev-parse HEAD)"
mkdir -p "$elsewhere/clone/build/venv" "$elsewhere/dist" "$elsewhere/kernels"

COMPACTATTN_KERNEL_CACHE=${cache:-$elsewhere/kernels} unshare --mount --map-root-user sh -euc '
    mount --bind "$1/build/venv" "$2/clone/build/venv"
    mount --rbind "$2/clone" "$1"
    cd "$1"
    env -u CARGO_TARGET_DIR packaging/dist.sh "$2/dist" >/dev/null' again "$root" "$elsewhere"

[ -n "$cache" ] || [ -n "$(ls "$elsewhere/kernels")" ] || {
    echo "again.sh: no kernel was compiled" >&2
    exit 1
}
(cd "$elsewhere/dist" && sha256sum -c --quiet "$dist/SHA256SUMS")
echo "the same bytes: $(wc -l <"$dist/SHA256SUMS") files, kernels ${cache:+not }compiled anew"
