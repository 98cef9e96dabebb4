"""Rounds of paired items: each context goes through every method before it counts; resumable, bounded in time."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from . import prefill, words
from .methods import Method, find_keep_value
from .model import Subject
from .prefill import Limits, Refused
from .tasks import SEVERAL, Context, make


@dataclass(frozen=True)
class Study:
    """What is asked: of which tasks and lengths, how many contexts, how many questions each where a task has several."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    # Contexts a task and length; 0 = until time is up.
    contexts: int
    questions: int
    seed: int
    # 0 = a quarter of the length.
    dense_below: int
    chunk: int
    dense_final: bool

    def limits(self, length: int) -> Limits:
        """The limits of a length."""
        return Limits(self.chunk, self.dense_below or length // 4, dense_final=self.dense_final)

    def context(self, subject: Subject, task: str, length: int, index: int) -> Context:
        """The context of an index; the same whatever else the study asks."""
        questions = self.questions if task in SEVERAL else 1
        return make(task, subject.codec, length, f"{self.seed}:{index}", questions)


class Folder:
    """Where a study's records lie: ``items.jsonl``, ``study.json``, ``keep.json``, ``gaps.json``."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        """Raises ValueError if the folder holds records of another model or other rules."""
        path.mkdir(parents=True, exist_ok=True)
        self.path, self._items = path, path / "items.jsonl"
        study = path / "study.json"
        if study.exists() and (old := json.loads(study.read_text())) != json.loads(json.dumps(facts)):
            changed = [name for name in facts if old.get(name) != json.loads(json.dumps(facts[name]))]
            raise ValueError(f"{path} holds another study's records (other {', '.join(changed)}); name another folder")
        study.write_text(json.dumps(facts, indent=1))
        self.records: list[dict[str, Any]] = []
        if self._items.exists():
            self.records = [json.loads(line) for line in self._items.read_text().splitlines()]
        self.gaps: dict[str, str] = self._read("gaps.json")
        self.keep: dict[str, float] = self._read("keep.json")
        self._done = {_key(record) for record in self.records}

    def has(self, length: int, task: str, index: int, method: str) -> bool:
        """Whether this item is recorded."""
        return (length, task, index, method) in self._done

    def add(self, records: list[dict[str, Any]]) -> None:
        """Appends a context's records, all at once."""
        with self._items.open("a") as file:
            file.write("".join(f"{json.dumps(record)}\n" for record in records))
        self.records += records
        self._done |= {_key(record) for record in records}

    def refuse(self, method: str, reason: str) -> None:
        """Notes why a method has no row."""
        self.gaps[method] = reason
        self._write("gaps.json", self.gaps)

    def settle(self, name: str, value: float) -> None:
        """Notes a number that was searched for."""
        self.keep[name] = value
        self._write("keep.json", self.keep)

    def _read(self, name: str) -> dict[str, Any]:
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else {}

    def _write(self, name: str, values: dict[str, Any]) -> None:
        (self.path / name).write_text(json.dumps(values, indent=1))


class Clock:
    """Seconds that are left, and how long a context of each length took."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds if seconds else float("inf")
        self._took: dict[int, float] = {}

    def has_time(self, length: int) -> bool:
        """Whether a context of that length is likely to end in time."""
        return time.monotonic() + self._took.get(length, 0.0) < self._end

    def note(self, length: int, seconds: float) -> None:
        """Remembers the longest so far."""
        self._took[length] = max(seconds, self._took.get(length, 0.0))


def measure(study: Study, subject: Subject, rows: dict[int, list[Method]], folder: Folder, clock: Clock) -> None:
    """Rounds over tasks and lengths, as many as asked or as there is time for. ``rows``: of each length, dense first."""
    for index, length, task in _order(study):
        if not clock.has_time(length):
            print(f"time is up in round {index}", file=sys.stderr)
            return
        wanted = [row for row in rows[length] if row.name not in folder.gaps]
        if all(folder.has(length, task, index, row.name) for row in wanted):
            continue
        start = time.monotonic()
        folder.add(_records(study, subject, wanted, (length, task, index), folder))
        clock.note(length, time.monotonic() - start)


def at_density(
    study: Study, subject: Subject, method: Method, target: float, length: int, folder: Folder
) -> Method | None:
    """``method`` with the number that gives ``target`` on a context of that length that is no item; None if refused.

    The context has the question's needles in prose; the number is noted in the folder and found there again.
    """
    name = f"{method.name}@{target:g}:{length}"
    if name not in folder.keep:
        context = make("multikey-essay", subject.codec, length, "density", study.questions)
        limits = study.limits(length)

        def found(value: float) -> float:
            return prefill.density(subject, context, method.at(value, target), limits)

        try:
            folder.settle(name, find_keep_value(method, target, found))
        except Refused as reason:
            folder.refuse(method.name, str(reason))
            return None
    return method.at(folder.keep[name], target)


def item(
    study: Study, subject: Subject, rows: list[Method], where: tuple[int, str, int], refused: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """The records of one context, ``where`` = (length, task, index); ``rows[0]`` is dense.

    What has no row is put into ``refused``.
    """
    length, task, index = where
    context, dense = study.context(subject, task, length, index), None
    for row in rows:
        start = time.monotonic()
        try:
            result = prefill.run(subject, context, row, study.limits(length), dense)
        except Refused as reason:
            refused[row.name] = str(reason)
            continue
        dense = dense or result.logits
        work = {"density": result.work.density, "executed": result.work.executed}
        work |= {"keep_value": row.settings.keep_value, "seconds": round(time.monotonic() - start, 3)}
        for number, outcomes in enumerate(result.outcomes):
            for outcome in outcomes:
                head = {"length": length, "task": task, "index": index, "question": number, "method": row.name}
                yield head | asdict(outcome) | work


def _records(
    study: Study, subject: Subject, rows: list[Method], where: tuple[int, str, int], folder: Folder
) -> list[dict[str, Any]]:
    refused: dict[str, str] = {}
    # Dense runs again for a method that is new: its logits are not kept on disk.
    due = [row for row in rows if row is rows[0] or not folder.has(*where, row.name)]
    records = list(item(study, subject, due, where, refused))
    for name, reason in refused.items():
        print(f"{name}: not run: {reason}", file=sys.stderr)
        folder.refuse(name, reason)
    return [record for record in records if not folder.has(*where, record["method"])]


def _order(study: Study) -> Iterator[tuple[int, int, str]]:
    for index in range(study.contexts) if study.contexts else count():
        for length in study.lengths:
            for task in study.tasks:
                yield index, length, task


def facts(study: Study, subject: Subject, dtype: str) -> dict[str, Any]:
    """What must not change between records of one folder. Tasks, lengths and how many of them may."""
    fixed = ("questions", "seed", "dense_below", "chunk", "dense_final")
    return {"model": subject.name, "dtype": dtype, "essay": words.essay_name()} | {
        name: getattr(study, name) for name in fixed
    }


def _key(record: dict[str, Any]) -> tuple[int, str, int, str]:
    return record["length"], record["task"], record["index"], record["method"]
