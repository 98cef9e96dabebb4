"""``python -m compactattn``: the command-line tool that the wheel installs as ``compactattn``, and ``eval``."""

from __future__ import annotations

import os
import sys
import sysconfig
from importlib import metadata
from pathlib import Path


def main() -> None:
    """Replaces this process by the tool; ``eval`` runs here, where torch and the model are."""
    if sys.argv[1:2] == ["eval"]:
        from .eval.cli import main as evaluate

        sys.exit(evaluate(sys.argv[2:]))
    tool = next((path for path in _candidates() if path.is_file() and os.access(path, os.X_OK)), None)
    if tool is None:
        sys.exit("compactattn: the command-line tool is missing; install the package (pip install .)")
    os.execv(tool, [str(tool), *sys.argv[1:]])


def _candidates() -> list[Path]:
    # The installer's record knows best; the others serve installs whose record was moved (pip --target).
    try:
        files = metadata.files("compactattn") or []
    except metadata.PackageNotFoundError:
        files = []
    recorded = [Path(str(file.locate())) for file in files if file.name == "compactattn"]
    beside = Path(__file__).parent.parent / "bin" / "compactattn"
    return [*recorded, beside, Path(sysconfig.get_path("scripts")) / "compactattn"]


if __name__ == "__main__":
    main()
