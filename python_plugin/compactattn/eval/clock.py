"""A bound on time: what is likely to end behind it is not begun."""

from __future__ import annotations

import time


class Clock:
    """Seconds that are left, and how long a row of each length takes."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds if seconds else float("inf")
        self._took: dict[int, float] = {}

    def has_time(self, length: int) -> bool:
        """Whether a row of that length is likely to end in time."""
        return time.monotonic() + self._took.get(length, 0.0) < self._end

    def note(self, length: int, seconds: float) -> None:
        """Remembers the longest so far."""
        self._took[length] = max(seconds, self._took.get(length, 0.0))
