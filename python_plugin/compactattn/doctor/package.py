"""The package itself: which Python holds it, whether its library loads, whether another copy is in its way."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import CompactAttnError

PACKAGE = Path(__file__).parents[1]


def facts() -> dict[str, Any]:
    """Interpreter, place, version, native library."""
    found: dict[str, Any] = {
        "executable": sys.executable,
        "version": platform.python_version(),
        "package": str(PACKAGE),
        "package_version": package_version(),
        "library": library(),
    }
    others = copies()
    if others:
        found["other_copies"] = others
    return found


def package_version() -> str:
    """What the installer recorded."""
    try:
        return metadata.version("compactattn")
    except metadata.PackageNotFoundError:
        return "no record of an installation: imported from a folder"


def library() -> str:
    """Version and ABI of the native library, or why it does not load."""
    from .. import build_info, version

    try:
        return f"loaded, {version()}: {build_info()}"
    except CompactAttnError as error:
        return f"error: {error}"


def copies() -> list[str]:
    """Folders on the path, other than this package's, that also hold a ``compactattn``."""
    found = {Path(entry or ".").resolve() / "compactattn" for entry in sys.path}
    return sorted(str(path) for path in found if (path / "__init__.py").is_file() and path != PACKAGE.resolve())
