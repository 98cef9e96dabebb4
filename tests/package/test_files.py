"""What the released files hold, and what they must not."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, VERSION, readelf

sys.path.insert(0, str(ROOT / "packaging"))

from images import images

# What every glibc Linux has; PEP 600 allows these and few others.
SYSTEM = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libdl.so.2", "libpthread.so.0", "ld-linux-x86-64.so.2"}
MIB = 1 << 20


def binaries(unpacked_wheel: Path) -> list[Path]:
    tool = unpacked_wheel / f"compactattn-{VERSION}.data" / "scripts" / "compactattn"
    return [unpacked_wheel / "compactattn" / "libcompactattn.so", tool]


def test_checksums_name_every_file_and_agree(dist: Path) -> None:
    listed = dict(reversed(line.split("  ")) for line in (dist / "SHA256SUMS").read_text().splitlines())
    assert set(listed) == {path.name for path in dist.iterdir()} - {"SHA256SUMS"}
    for name, digest in listed.items():
        assert hashlib.sha256((dist / name).read_bytes()).hexdigest() == digest, name


def test_the_bill_of_materials_has_every_crate_that_ships_and_the_kernels_toolchain(dist: Path) -> None:
    bill = json.loads((dist / f"compactattn-{VERSION}.cdx.json").read_text())
    parts = {part["purl"]: part for part in bill["components"]}
    assert bill["metadata"]["component"]["version"] == VERSION and len(parts) > 20
    pins = (ROOT / "cuda" / "requirements.txt").read_text()
    (cutlass,) = re.findall(r"^nvidia-cutlass==(\S+)", pins, re.MULTILINE)
    assert parts[f"pkg:pypi/nvidia-cutlass@{cutlass}"]["licenses"] == [{"expression": "BSD-3-Clause"}]
    lock = (ROOT / "Cargo.lock").read_text()
    for name, version, digest in re.findall(
        r'name = "(safetensors|libc)"\nversion = "(.*)"\n.*\nchecksum = "(.*)"', lock
    ):
        assert parts[f"pkg:cargo/{name}@{version}"]["hashes"][0]["content"] == digest


def test_one_wheel_serves_every_python_3(wheel: Path, unpacked_wheel: Path) -> None:
    tag = re.fullmatch(rf"compactattn-{VERSION}-(py3-none-manylinux_2_(\d+)_x86_64)\.whl", wheel.name)
    assert tag, wheel.name
    facts = (unpacked_wheel / f"compactattn-{VERSION}.dist-info" / "WHEEL").read_text()
    assert f"Tag: {tag[1]}" in facts and "Root-Is-Purelib: false" in facts
    # Ubuntu 22.04 has 2.35, and every system that the driver of CUDA 13 is made for has it or newer.
    assert int(tag[2]) <= 35
    assert wheel.stat().st_size < 30 * MIB


def test_no_file_is_in_the_wheel_twice(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))


def test_the_wheel_carries_library_tool_and_entry_points_and_nothing_of_a_build(unpacked_wheel: Path) -> None:
    files = {str(path.relative_to(unpacked_wheel)) for path in unpacked_wheel.rglob("*") if path.is_file()}
    assert not [name for name in files if "__pycache__" in name or name.endswith((".pyc", ".rs", ".cu"))]
    assert all(binary.is_file() for binary in binaries(unpacked_wheel)) and "compactattn/py.typed" in files
    points = (unpacked_wheel / f"compactattn-{VERSION}.dist-info" / "entry_points.txt").read_text()
    assert "[vllm.general_plugins]" in points and "[sglang.srt.plugins]" in points


def test_binaries_need_the_system_alone_and_no_newer_glibc_than_the_tag(wheel: Path, unpacked_wheel: Path) -> None:
    allowed = int(re.search(r"manylinux_2_(\d+)", wheel.name)[1])
    for binary in binaries(unpacked_wheel):
        needed = set(re.findall(r"NEEDED.*\[(.*)\]", readelf("-d", binary)))
        # So neither libtorch nor libcudart nor libpython nor libcuda.
        assert needed <= SYSTEM, f"{binary.name} needs {needed - SYSTEM}"
        versions = {int(minor) for minor in re.findall(r"GLIBC_2\.(\d+)", readelf("-V", binary))}
        assert max(versions) <= allowed, f"{binary.name} needs glibc 2.{max(versions)}"
        assert "RPATH" not in readelf("-d", binary) and "RUNPATH" not in readelf("-d", binary)


def test_every_package_carries_the_same_kernel_images(dist: Path, unpacked_wheel: Path, c_package: Path) -> None:
    lines = (dist / f"compactattn-{VERSION}-kernels.txt").read_text().splitlines()
    listed = [line.split("  ")[0] for line in lines]
    assert len(listed) == len(set(listed)) > 0, "no image, or one image twice"
    static = c_package / "lib" / "libcompactattn.a"
    for file in [*binaries(unpacked_wheel), c_package / "lib" / f"libcompactattn.so.{VERSION}", static]:
        # Order is the linker's.
        held = sorted(hashlib.sha256(image).hexdigest() for image in images(file.read_bytes()))
        assert held == sorted(listed), file


def test_the_support_page_is_what_the_wheels_library_answers(unpacked_wheel: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(unpacked_wheel)}
    printed = subprocess.check_output([sys.executable, str(ROOT / "docs" / "support.py")], text=True, env=env)
    page = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    assert page.split("<!-- support.py -->\n\n")[1].split("\n<!-- end of")[0] == printed


def test_a_changed_image_is_seen(unpacked_wheel: Path) -> None:
    library = bytearray((unpacked_wheel / "compactattn" / "libcompactattn.so").read_bytes())
    first = images(bytes(library))[0]
    at = library.find(first)
    library[at + len(first) - 1] ^= 1
    assert images(bytes(library))[0] != first and images(bytes(library))[1:]


def test_the_sdist_has_what_a_build_from_source_needs(sdist: Path) -> None:
    for name in ["Cargo.lock", "pyproject.toml", "build.rs", "cuda/requirements.txt", "cuda/toolkit.sh", "LICENSE"]:
        assert (sdist / name).is_file(), name
    pins = (sdist / "cuda" / "requirements.txt").read_text()
    wanted = [line for line in pins.splitlines() if line and not line.startswith(("#", " "))]
    assert wanted and all("==" in line for line in wanted), "the toolchain is not pinned"
    assert [path.name for path in (sdist / "tests").rglob("*.*")] == ["main.rs"] and not list(sdist.rglob("*.so"))
    # Refuses a manifest whose targets are not there, which `cargo metadata` does not.
    command = ["cargo", "fetch", "--locked", "--target", "x86_64-unknown-linux-gnu"]
    ran = subprocess.run(command, cwd=sdist, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_the_crate_fits_the_registry_and_holds_sources_alone(dist: Path) -> None:
    crate = dist / f"compactattn-{VERSION}.crate"
    assert crate.stat().st_size < 10 * MIB
    with tarfile.open(crate) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {"Cargo.toml", "README.md", "LICENSE", "rust/lib.rs", "include/compactattn.h"} <= set(names)
    folders = {name.split("/")[0] for name in names if "/" in name}
    assert folders == {"rust", "cuda", "include", "cpp_shim"}


@pytest.mark.parametrize("kind", ["shared", "static"])
def test_the_c_package_builds_a_stranger_s_program_wherever_it_lies(kind: str, c_package: Path, tmp_path: Path) -> None:
    lib, shared = c_package / "lib", c_package / "lib" / f"libcompactattn.so.{VERSION}"
    soname = f"libcompactattn.so.{VERSION.split('.')[0]}"
    # RHEL 9 and what is built like it; the wheel's tool wants one more.
    assert max(int(minor) for minor in re.findall(r"GLIBC_2\.(\d+)", readelf("-V", shared))) <= 34
    assert f"[{soname}]" in readelf("-d", shared) and (lib / soname).resolve() == shared
    assert (lib / "cmake" / "compactattn" / "compactattnConfig.cmake").is_file()
    flags = f"PKG_CONFIG_PATH={lib}/pkgconfig pkg-config --define-prefix"
    if subprocess.run(["sh", "-c", "command -v pkg-config"], capture_output=True, check=False).returncode:
        found = [f"-I{c_package}/include", f"-L{lib}", "-lcompactattn"]
    else:
        found = subprocess.check_output(["sh", "-c", f"{flags} --cflags --libs compactattn"], text=True).split()
    if kind == "static":
        found = [f"-I{c_package}/include", str(lib / "libcompactattn.a"), "-lm", "-ldl", "-lpthread", "-lgcc_s"]
    program = tmp_path / "smoke"
    subprocess.run(["cc", "-o", str(program), str(ROOT / "tests/c/smoke.c"), *found, "-lm"], check=True)
    subprocess.run([str(program)], env={"LD_LIBRARY_PATH": str(lib)}, check=True)
