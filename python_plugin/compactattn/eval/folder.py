"""Where a study lies: ``items.jsonl``, a line a context and row; ``probes.jsonl``; ``study.json``; ``notes.json``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# Of an answer, in a line's lists; numbers of real magnitudes have so many digits.
FIELDS = ("question", "final", "recall", "exact", "nll", "kl", "flips")
_DIGITS = 5
Record = dict[str, Any]


class Folder:
    """A study's records and what was noted beside them; a second run goes on with them."""

    def __init__(self, path: Path, facts: Record | None) -> None:
        """``facts``: None = those it holds, and nothing is made.

        Raises ValueError if it holds no study though it should, or records of another model or other rules.
        """
        self.path = path
        study = path / "study.json"
        if facts is None and not study.exists():
            raise ValueError(f"{path}: wanted the --out of a study, it holds no {study.name}")
        if facts is None:
            facts = json.loads(study.read_text())
        elif study.exists() and (old := json.loads(study.read_text())) != json.loads(json.dumps(facts)):
            changed = [name for name in facts if old.get(name) != json.loads(json.dumps(facts[name]))]
            raise ValueError(f"{path} holds another study's records (other {', '.join(changed)}); name another folder")
        self.facts: Record = facts
        if not study.exists():
            path.mkdir(parents=True, exist_ok=True)
            _write(study, facts)
        notes = path / "notes.json"
        self._notes: Record = {"keep": {}, "gaps": {}, "left": {}, "runs": []}
        self._notes |= json.loads(notes.read_text()) if notes.exists() else {}
        # What this run does not try again, though the next one does.
        self.failed: dict[str, str] = {}
        self.lines = self._read("items.jsonl")
        self.probes = self._read("probes.jsonl")
        self._done = {_key(line) for line in self.lines}

    @property
    def records(self) -> list[Record]:
        """One for each answer."""
        found = []
        for line in self.lines:
            head = {name: value for name, value in line.items() if name != "answers"}
            found += [head | dict(zip(FIELDS, answer, strict=True)) for answer in line["answers"]]
        return found

    @property
    def keep(self) -> dict[str, float]:
        """Numbers that were searched for, by ``row:length``."""
        found: dict[str, float] = self._notes["keep"]
        return found

    @property
    def gaps(self) -> dict[str, str]:
        """Why methods have no row, for good, by ``row:length``; of old folders by ``row``, which keeps no row away."""
        found: dict[str, str] = self._notes["gaps"]
        return found

    @property
    def absent(self) -> dict[str, str]:
        """Why rows are not there, or not with all items, by ``row:length``: for good, or until a run brings them."""
        return {**self._notes["left"], **self.gaps}

    @property
    def runs(self) -> list[Record]:
        """What has measured: the command, and on what."""
        found: list[Record] = self._notes["runs"]
        return found

    def has(self, length: int, task: str, index: int, method: str) -> bool:
        """Whether this context is recorded."""
        return (length, task, index, method) in self._done

    def add(self, lines: list[Record]) -> None:
        """Appends a batch's lines, all at once."""
        self._append("items.jsonl", lines)
        self.lines += lines
        self._done |= {_key(line) for line in lines}

    def add_probes(self, lines: list[Record]) -> None:
        """Appends what a probe has found, all at once."""
        self._append("probes.jsonl", lines)
        self.probes += lines

    def note(self, kind: str, name: str, value: Any) -> None:
        """Notes a number that was searched for (``keep``), or why there is no row (``gaps``); ``name``: row:length."""
        self._notes[kind][name] = value
        _write(self.path / "notes.json", self._notes)

    def refuse(self, name: str, length: int, reason: Exception, for_good: bool) -> None:
        """A row of one length cannot be run: for good, or until the next run (see :meth:`leave`)."""
        text = str(reason).partition("\n")[0]
        if for_good:
            self.note("gaps", f"{name}:{length}", text)
        else:
            self.failed[f"{name}:{length}"] = text

    def refused(self, name: str, length: int) -> str | None:
        """Why a row of one length is not tried, or not again in this run; None if it is."""
        key = f"{name}:{length}"
        return self.gaps.get(key) or self.failed.get(key)

    def leave(self, reasons: dict[str, str | None]) -> None:
        """Notes what the next run has to bring and why, by ``row:length``; None: nothing. Others stay as they are."""
        left = {**self._notes["left"], **reasons}
        self._notes["left"] = {key: reason for key, reason in left.items() if reason is not None}
        for key in reasons:
            # Old notes name no length, so each was tried again.
            self.gaps.pop(key.rpartition(":")[0], None)
        _write(self.path / "notes.json", self._notes)

    def begin(self, run: Record) -> None:
        """Notes what measures from here on."""
        self.runs.append(run)
        _write(self.path / "notes.json", self._notes)

    def end(self, seconds: float) -> None:
        """Notes how long the last run took."""
        self.runs[-1]["seconds"] = round(seconds, 1)
        _write(self.path / "notes.json", self._notes)

    def _read(self, name: str) -> list[Record]:
        path = self.path / name
        # A line without its end was cut off by a kill.
        return [json.loads(x) for x in path.read_text().splitlines(True) if x.endswith("\n")] if path.exists() else []

    def _append(self, name: str, lines: list[Record]) -> None:
        path = self.path / name
        if path.exists() and not (held := path.read_bytes()).endswith(b"\n"):
            # What a kill has cut off goes, in place: the lines before it are never written again.
            os.truncate(path, held.rfind(b"\n") + 1)
        with path.open("a") as file:
            file.write("".join(f"{json.dumps(line, separators=(',', ':'))}\n" for line in lines))


def rounded(value: Any) -> Any:
    """Numbers as they are recorded."""
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _write(path: Path, values: Record) -> None:
    """At once, as another process may be reading."""
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(values, indent=1))
    fresh.replace(path)


def _key(line: Record) -> tuple[int, str, int, str]:
    return line["length"], line["task"], line["index"], line["method"]
