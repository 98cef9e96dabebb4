"""What a study has so far, said every twenty seconds."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from statistics import fmean

from .clock import Clock
from .folder import FIELDS, Folder

_EVERY = 20.0
_RECALL, _FINAL = FIELDS.index("recall"), FIELDS.index("final")


class Progress:
    """Says items and accuracy of every row of each length, on stderr."""

    def __init__(self, folder: Folder, clock: Clock) -> None:
        self._folder, self._clock, self._next = folder, clock, time.monotonic() + _EVERY

    def tell(self) -> None:
        """Says so if it is time."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _EVERY
        found: defaultdict[int, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for line in self._folder.lines:
            recalls = [answer[_RECALL] for answer in line["answers"] if answer[_FINAL] == "own"]
            found[line["length"]][line["method"]] += recalls
        print(f"-- {self._clock.elapsed:.0f} s", file=sys.stderr)
        for length, rows in sorted(found.items()):
            texts = [f"{name} {100 * fmean(recalls):.1f} ({len(recalls)})" for name, recalls in rows.items()]
            print(f"{length}: {', '.join(texts)}", file=sys.stderr, flush=True)
