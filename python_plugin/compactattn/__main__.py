"""``python -m compactattn``: the same command-line tool that the wheel installs as ``compactattn``."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from importlib import metadata
from pathlib import Path


def main() -> None:
    """Replaces this process by the tool."""
    arguments = sys.argv[1:]
    doctor = arguments[:1] == ["doctor"]
    tool = next((path for path in _candidates() if path.is_file() and os.access(path, os.X_OK)), None)
    try:
        if tool is not None:
            # The tool cannot know which Python has asked.
            asking = ["--python", sys.executable] if doctor and "--python" not in arguments else []
            os.execv(tool, [str(tool), *arguments, *asking])
        text = f"{MISSING}: install the package (pip install .)"
    except OSError as error:
        text = f"compactattn: {tool}: {error.strerror}"
    if doctor:
        _own_doctor()
    sys.exit(text)


def _own_doctor() -> None:
    """What Python alone can tell."""
    from .doctor import report

    sys.stdout.write(json.dumps(report(), indent=2) + "\n")
    sys.stdout.flush()


def _candidates() -> list[Path]:
    # The installer's record knows best; the others serve installs whose record was moved (pip --target).
    try:
        files = metadata.files("compactattn") or []
    except metadata.PackageNotFoundError:
        files = []
    recorded = [Path(str(file.locate())) for file in files if file.name == "compactattn"]
    beside = Path(__file__).parent.parent / "bin" / "compactattn"
    return [*recorded, beside, Path(sysconfig.get_path("scripts")) / "compactattn"]


MISSING = "compactattn: the command-line tool is missing"

if __name__ == "__main__":
    main()
