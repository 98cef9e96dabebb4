#!/bin/sh
# Whether packages are reproducible: again.sh DIST. Clones this commit elsewhere, makes everything anew without any cache of
# ours, kernels too (many minutes), and compares with the files of `make dist`. Kernel images must be the same to the
# byte; so must every other file.
set -eu
dist=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
elsewhere=$(mktemp -d)
trap 'rm -rf "$elsewhere"' EXIT
git clone -q --no-checkout "$(git rev-parse --git-common-dir)" "$elsewhere/another"
git -C "$elsewhere/another" checkout -q "$(git rev-parse HEAD)"
env -u CARGO_TARGET_DIR COMPACTATTN_KERNEL_CACHE="$elsewhere/kernels" "$elsewhere/another/packaging/dist.sh" "$elsewhere/dist" >/dev/null
images=$(ls "$elsewhere/kernels" | wc -l)
[ "$images" -gt 0 ] || {
    echo "again.sh: no kernel was compiled" >&2
    exit 1
}
(cd "$elsewhere/dist" && sha256sum -c --quiet "$dist/SHA256SUMS")
echo "the same bytes: $(wc -l <"$dist/SHA256SUMS") files, $images kernel images compiled anew"
