"""What the backend says and counts: one line at start, one warning a reason, counters that cost the host nothing."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .policy import Part


class Report:
    """Counters of this process; all of it on the host, once a step and never once a layer."""

    def __init__(self) -> None:
        self.steps = self.split_steps = self.our_requests = self.our_tokens = 0
        # Requests that policy leaves to the engine, and steps or layers that fell back, by reason.
        self.left_to_engine: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()
        # What the library's plans have selected; read only when asked.
        self.selected: list[Callable[[], dict[str, Any]]] = []
        self.strict = False
        self.file: str | None = None
        self._said: set[str] = set()
        self._written = 0.0
        self._changed = False

    def start(self, line: str) -> None:
        """The line at start, once however many KV groups there are."""
        if line not in self._said:
            self._said.add(line)
            LOG.info("%s", line)

    def warn(self, line: str) -> None:
        """What an operator should know though all is served as asked; said once."""
        if line not in self._said:
            self._said.add(line)
            LOG.warning("compactattn: %s", line)

    def fallback(self, reason: str) -> None:
        """A step or layer that could have been ours; RuntimeError if the operator wants none."""
        self.fallbacks[reason] += 1
        self._changed = True
        if self.strict:
            raise RuntimeError(f"compactattn: strict: {reason}")
        if reason not in self._said:
            self._said.add(reason)
            LOG.warning("compactattn: dense by the engine: %s (said once; counters() has the number)", reason)

    def step(self, left_out: Sequence[str | None], parts: Sequence[Part]) -> None:
        """One step, of one KV group, with a chunk that is long enough; others are not looked at."""
        self.steps += 1
        self.split_steps += any(part.ours for part in parts)
        self.our_requests += sum(part.reqs.stop - part.reqs.start for part in parts if part.ours)
        self.our_tokens += sum(part.tokens.stop - part.tokens.start for part in parts if part.ours)
        self.left_to_engine.update(reason for reason in left_out if reason)
        self._changed = True

    def write(self) -> None:
        """Writes the counters to their file, if it is time and they have changed. For every step, of any kind."""
        if self.file is None or not self._changed or time.monotonic() - self._written < WRITE_EVERY_S:
            return
        self._written, self._changed = time.monotonic(), False
        target = Path(self.file.replace("{pid}", str(os.getpid())))
        beside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        try:
            beside.write_text(json.dumps(self.as_dict()), encoding="utf-8")
            # Readers see the old numbers or the new ones, never half of them.
            beside.replace(target)
        except OSError as error:
            LOG.warning("compactattn: counters_file: %s; not written any more", error)
            self.file = None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "pid": os.getpid(),
            "steps": self.steps,
            "split_steps": self.split_steps,
            "our_requests": self.our_requests,
            "our_tokens": self.our_tokens,
            "left_to_engine": dict(self.left_to_engine),
            "fallbacks": dict(self.fallbacks),
            "plans": [selected() for selected in self.selected],
        }


def counters() -> dict[str, Any]:
    """What this process has served, any time. Other processes of an engine: the setting ``counters_file``."""
    return REPORT.as_dict()


WRITE_EVERY_S = 1.0

# A child of the engine's logger, so that its level and format apply.
LOG = logging.getLogger("vllm.compactattn")
REPORT = Report()
