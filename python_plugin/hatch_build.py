"""Wheel build: cargo makes the library and the command-line tool, which go into the wheel as they are."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

READERS = ("nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm")


class CargoHook(BuildHookInterface[Any]):
    """One wheel for every Python 3: nothing in it is linked to an interpreter."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """The CUDA compiler's wheels where kernels are wanted and there is none; build.rs finds them by itself."""
        if not _kernels_wanted() or _toolkit_found(Path(self.root)):
            return []
        # Tools that only read machine code are no part of a build.
        lines = (Path(self.root) / "cuda" / "requirements.txt").read_text().splitlines()
        return [line for line in lines if "==" in line and not line.startswith(READERS)]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Builds, then names the files and the tag."""
        built = self._cargo()
        library, tool = built / "libcompactattn.so", built / "compactattn"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform(library, tool)}"
        build_data["shared_scripts"][str(tool)] = "compactattn"
        if version == "editable":
            # An editable install is imported from the source tree.
            shutil.copy(library, Path(self.root) / "python_plugin" / "compactattn" / library.name)
        else:
            build_data["force_include"][str(library)] = f"compactattn/{library.name}"

    def _cargo(self) -> Path:
        cargo = shutil.which("cargo")
        if cargo is None:
            raise SystemExit("compactattn: cargo is missing; install Rust 1.88 or newer (https://rustup.rs)")
        # Cargo's own target folder, so that a tree that was built before is not built again.
        target = Path(os.environ.get("CARGO_TARGET_DIR", Path(self.root) / "target")).absolute()
        command = [cargo, "build", "--release", "--locked", "--features", "cli", "--lib", "--bin", "compactattn"]
        command += ["--target-dir", str(target)]
        # This Python has what `dependencies` asked for.
        env = {"COMPACTATTN_PYTHON": sys.executable, **os.environ}
        if subprocess.run(command, cwd=self.root, env=env, check=False).returncode:
            raise SystemExit("compactattn: cargo build failed; its message stands above")
        return _stripped(target / "release", target / "wheel")


def _kernels_wanted() -> bool:
    mode = os.environ.get("COMPACTATTN_CUDA") or "auto"
    gpu = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
    return mode == "require" or (mode == "auto" and gpu)


def _toolkit_found(root: Path) -> bool:
    """Whether build.rs finds nvcc and CUTLASS's headers without wheels; where it looks stands in cuda/toolchain."""
    wheels = (root / "cuda" / "requirements.txt").read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compactattn"
    if (cache / f"toolkit-{hashlib.sha256(wheels).hexdigest()[:16]}").is_dir():
        return True
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    named = [os.environ.get("NVCC"), *(f"{home}/bin/nvcc" for home in homes if home), shutil.which("nvcc")]
    nvccs = [Path(nvcc).resolve() for nvcc in named if nvcc and Path(nvcc).exists()]
    beside = any((nvcc.parents[3] / "cutlass_library").is_dir() for nvcc in nvccs if len(nvcc.parents) > 3)
    return bool(nvccs) and (beside or bool(os.environ.get("CUTLASS_DIR")))


def _stripped(built: Path, into: Path) -> Path:
    """Copies without debug information, which is no use without the sources; whole ones where there is no strip."""
    into.mkdir(exist_ok=True)
    strip = shutil.which("strip")
    for name in ("libcompactattn.so", "compactattn"):
        shutil.copy(built / name, into / name)
        if strip is not None:
            subprocess.run([strip, str(into / name)], check=True)
    return into


def _platform(*files: Path) -> str:
    """The oldest glibc that serves all files, as PEP 600 writes it; without glibc, this machine's own name."""
    needed = [int(minor) for file in files for minor in re.findall(rb"\0GLIBC_2\.(\d+)(?=[\0.])", file.read_bytes())]
    machine = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return machine.replace("linux", f"manylinux_2_{max(needed)}") if needed else machine
