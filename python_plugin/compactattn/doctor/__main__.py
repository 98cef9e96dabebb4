"""``python -m compactattn.doctor``: the report as JSON; the command-line tool asks for it."""

from __future__ import annotations

import json
import sys

from . import report


def main() -> None:
    """Prints one JSON object, in ASCII whatever the locale."""
    sys.stdout.write(json.dumps(report()) + "\n")


if __name__ == "__main__":
    main()
