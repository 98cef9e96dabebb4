"""A bound on time: what is likely to end behind it is not begun."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable


class Clock:
    """Seconds that are left of all, and of each row of each length; and how long a batch of a row takes."""

    def __init__(self, seconds: float, row_seconds: float = 0.0) -> None:
        """0: no bound."""
        self._start = time.monotonic()
        self._end = self._start + seconds if seconds else float("inf")
        self._row_seconds = row_seconds or float("inf")
        self._took: dict[tuple[int, str], float] = {}
        self._spent: defaultdict[tuple[int, str], float] = defaultdict(float)

    @property
    def elapsed(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._start

    def has_time(self, length: int, rows: Iterable[str]) -> bool:
        """Whether a batch of that length is likely to go through all these rows in time."""
        return time.monotonic() + sum(self._took.get((length, row), 0.0) for row in rows) < self._end

    def may(self, length: int, row: str) -> bool:
        """Whether the row has time of its own left."""
        return self._spent[length, row] < self._row_seconds

    def note(self, length: int, row: str, seconds: float) -> None:
        """Remembers a batch's time; the first, which warms up, only until there is another."""
        key = length, row
        self._took[key] = max(seconds, self._took[key]) if self._spent[key] > self._took.get(key, 0.0) else seconds
        self._spent[key] += seconds
