"""Variables and files that are known to keep an engine from finding this package, a GPU, or a driver."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def facts() -> dict[str, str]:
    """What was found: the variable or place, and what it does. ``{"found": "none"}`` where nothing was."""
    found = {**variables(os.environ), **places()}
    return found or {"found": "none"}


def variables(env: Mapping[str, str]) -> dict[str, str]:
    """What these variables of an environment bring about."""
    found = {}
    for name in ("VLLM_PLUGINS", "SGLANG_PLUGINS"):
        if name in env and "compactattn" not in [each.strip() for each in env[name].split(",")]:
            found[name] = f"{env[name]!r} does not name compactattn, so the engine will not load it"
    if "VLLM_ATTENTION_BACKEND" in env:
        found["VLLM_ATTENTION_BACKEND"] = "newer engines ignore it: --attention-backend CUSTOM chooses this package"
    if env.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles"):
        found["CUDA_VISIBLE_DEVICES"] = "hides every GPU from this process"
    if env.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        found["CUDA_LAUNCH_BLOCKING"] = "every launch waits for the GPU: timings mean nothing"
    driver = env.get("COMPACTATTN_LIBCUDA")
    if driver and not Path(driver).exists() and "/" in driver:
        found["COMPACTATTN_LIBCUDA"] = f"{driver} does not exist"
    for folder in filter(None, env.get("LD_LIBRARY_PATH", "").split(":")):
        library = Path(folder) / "libcuda.so.1"
        if "stubs" in Path(folder).parts or (_there(library) and not _is_driver(library)):
            found["LD_LIBRARY_PATH"] = f"{folder} comes before the driver's library, and what lies there is none"
    if env.get("LD_PRELOAD"):
        found["LD_PRELOAD"] = f"{env['LD_PRELOAD']} is loaded into every process"
    return found


def places() -> dict[str, str]:
    """Folders that engines write to and cannot."""
    found = {}
    try:
        tempfile.gettempdir()
    except OSError:
        found["TMPDIR"] = "no temporary folder can be written: engines and their compilers need one, this package none"
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - Path.home() raises without a home
    if not os.access(home, os.W_OK):
        found["HOME"] = f"{home} cannot be written: engines keep caches there, this package none"
    return found


def _there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _is_driver(library: Path) -> bool:
    """An ELF file of a driver's size; stubs are small."""
    try:
        with library.open("rb") as file:
            return file.read(4) == b"\x7fELF" and library.stat().st_size > 1 << 20
    except OSError:
        return False
