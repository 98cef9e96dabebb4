"""Wheel build: cargo makes the library and the command-line tool, which go into the wheel as they are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CargoHook(BuildHookInterface[Any]):
    """One wheel for every Python 3: nothing in it is linked to an interpreter."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Builds, then names the files and the tag."""
        built = self._cargo()
        library, tool = built / "libcompactattn.so", built / "compactattn"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform()}"
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
        if subprocess.run(command, cwd=self.root, check=False).returncode:
            raise SystemExit("compactattn: cargo build failed; its message stands above")
        return _stripped(target / "release", target / "wheel")


def _stripped(built: Path, into: Path) -> Path:
    """Copies without debug information, which is no use without the sources; whole ones where there is no strip."""
    into.mkdir(exist_ok=True)
    strip = shutil.which("strip")
    for name in ("libcompactattn.so", "compactattn"):
        shutil.copy(built / name, into / name)
        if strip is not None:
            subprocess.run([strip, str(into / name)], check=True)
    return into


def _platform() -> str:
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
