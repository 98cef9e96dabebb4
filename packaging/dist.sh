#!/bin/sh
# All that a release consists of, into DIR: dist.sh DIR. `make dist` calls it with the tree's own tools.
# The same sources and tools give the same bytes: dates are the commit's, archives are sorted and nobody's.
set -eu
cd "$(dirname "$0")/.."
out=$1
python=${PYTHON:-python3}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH

rm -rf "$out"
mkdir -p "$out"
"$python" -m hatchling build -t sdist -d "$out" >/dev/null
"$python" -m hatchling build -t wheel -d "$out" >/dev/null

# The C package. FEATURES are the wheel's, so that nothing is built twice; the library itself does not differ by them.
name=compactattn-$version-linux-$(uname -m)
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
make -s install FEATURES="--features cli" DESTDIR="$stage/$name" PREFIX=
strip --strip-unneeded "$stage/$name/lib/libcompactattn.so.$version"
strip --strip-debug "$stage/$name/lib/libcompactattn.a"
install -m 644 LICENSE README.md CHANGELOG.md "$stage/$name"
tar --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" -C "$stage" -cf - "$name" |
    gzip -n -6 >"$out/$name.tar.gz"

# The crate as it would be uploaded; a tree with changes is refused unless ALLOW_DIRTY is set.
rm -f target/package/*.crate
"${CARGO:-cargo}" package --locked --no-verify ${ALLOW_DIRTY:+--allow-dirty} 2>"$stage/log" || {
    cat "$stage/log" >&2
    exit 1
}
cp "target/package/compactattn-$version.crate" "$out/"

"$python" packaging/images.py "$stage/$name/lib/libcompactattn.so.$version" >"$out/compactattn-$version-kernels.txt"
"$python" tests/supply/sbom.py "$out/compactattn-$version.cdx.json" >/dev/null
(cd "$out" && sha256sum -- * >SHA256SUMS)
ls -l "$out"
