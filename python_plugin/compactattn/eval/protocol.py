"""Rounds of paired items: each context goes through every method before it counts; resumable, bounded in time."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from . import prefill, words
from .clock import Clock
from .methods import Method, find_keep_value
from .model import Subject
from .prefill import NO_ROW, Limits
from .tasks import SEVERAL, Context, make


@dataclass(frozen=True)
class Study:
    """What is asked of which tasks and lengths: how many contexts, how many questions where a task has several."""

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
    # Greedy tokens beyond the expected answer's length.
    slack: int = 4
    # (i, n): this process makes every n-th context, from the i-th on.
    shard: tuple[int, int] = (0, 1)

    def limits(self, length: int) -> Limits:
        """The limits of a length."""
        return Limits(self.chunk, self.dense_below or length // 4, self.slack, self.dense_final)

    def context(self, subject: Subject, task: str, length: int, index: int) -> Context:
        """The context of an index; the same whatever else the study asks."""
        questions = self.questions if task in SEVERAL else 1
        return make(task, subject.codec, length, f"{self.seed}:{index}", questions)


class Folder:
    """Where a study's records lie: ``items*.jsonl``, ``study.json``, ``keep.json``, ``gaps*.json``.

    Several processes may work in one, each a shard of its own.
    """

    def __init__(self, path: Path, facts: dict[str, Any], shard: int = 0) -> None:
        """Raises ValueError if the folder holds records of another model or other rules."""
        path.mkdir(parents=True, exist_ok=True)
        suffix = f"-{shard}" if shard else ""
        self.path, self._items, self._gaps = path, path / f"items{suffix}.jsonl", path / f"gaps{suffix}.json"
        study = path / "study.json"
        if study.exists() and (old := json.loads(study.read_text())) != json.loads(json.dumps(facts)):
            changed = [name for name in facts if old.get(name) != json.loads(json.dumps(facts[name]))]
            raise ValueError(f"{path} holds another study's records (other {', '.join(changed)}); name another folder")
        _write(study, facts)
        self.records: list[dict[str, Any]] = []
        self.gaps: dict[str, str] = {}
        self.keep: dict[str, float] = {}
        self._done: set[tuple[int, str, int, str]] = set()
        self.read()

    def read(self) -> None:
        """Reads what all processes have written."""
        lines = [line for path in sorted(self.path.glob("items*.jsonl")) for line in path.read_text().splitlines()]
        self.records = [json.loads(line) for line in lines]
        self._done = {_key(record) for record in self.records}
        self.gaps = {}
        for path in sorted(self.path.glob("gaps*.json")):
            self.gaps |= json.loads(path.read_text())
        keep = self.path / "keep.json"
        self.keep = json.loads(keep.read_text()) if keep.exists() else {}

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
        _write(self._gaps, self.gaps)

    def settle(self, name: str, value: float) -> None:
        """Notes a number that was searched for."""
        self.keep[name] = value
        _write(self.path / "keep.json", self.keep)


def measure(study: Study, subject: Subject, rows: dict[int, list[Method]], folder: Folder, clock: Clock) -> None:
    """Rounds over tasks and lengths, as many as asked or as there is time for. ``rows``: of each length, dense first.

    Each row of a context is written when it is done. Where time ends a context, its last rows are missing: every row
    is paired with dense on what it has.
    """
    for index, length, task in _order(study):
        where = length, task, index
        wanted = [row for row in rows[length] if row.name not in folder.gaps]
        # Dense runs again for a method that is new: its logits are not kept on disk.
        due = [row for row in wanted[1:] if not folder.has(*where, row.name)]
        if due or not folder.has(*where, wanted[0].name):
            for records in item(study, subject, [wanted[0], *due], where, folder.refuse, clock):
                folder.add([record for record in records if not folder.has(*where, record["method"])])
        if not clock.has_time(length):
            print(f"time is up at context {index}, {task} of {length} tokens", file=sys.stderr)
            return


def at_density(
    study: Study, subject: Subject, method: Method, target: float, length: int, folder: Folder
) -> Method | None:
    """``method`` with the number that gives ``target`` on a context of that length that is no item; None if refused.

    The context has the question's needles in prose; the number is noted in the folder and found there again.
    """
    name = f"{method.name}@{target:g}:{length}"
    while study.shard[0] and not {name, method.name} & (folder.keep.keys() | folder.gaps.keys()):
        # The first process searches for all.
        time.sleep(0.2)
        folder.read()
    if {name, method.name} & folder.gaps.keys():
        return None
    if name not in folder.keep:
        context = make("multikey-essay", subject.codec, length, "density", study.questions)
        limits = study.limits(length)

        def found(value: float) -> float:
            return prefill.density(subject, context, method.at(value, target), limits)

        try:
            value, density = find_keep_value(method, target, found)
        except NO_ROW as reason:
            folder.refuse(method.name, str(reason))
            return None
        if abs(density - target) > 0.1 * target:
            folder.refuse(name, f"{density:.3f} is the nearest density that it comes to")
            return None
        folder.settle(name, value)
    return method.at(folder.keep[name], target)


def item(
    study: Study,
    subject: Subject,
    rows: list[Method],
    where: tuple[int, str, int],
    refuse: Callable[[str, str], None],
    clock: Clock,
) -> Iterator[list[dict[str, Any]]]:
    """The records of one context, ``where`` = (length, task, index), row by row; ``rows[0]`` is dense.

    What cannot be run is told to ``refuse``.
    """
    length, task, index = where
    context, dense = study.context(subject, task, length, index), None
    for row in rows:
        if not clock.has_time(length):
            return
        start = time.monotonic()
        try:
            result = prefill.run(subject, context, row, study.limits(length), dense)
        except NO_ROW as reason:
            print(f"{row.name}: not run: {reason}", file=sys.stderr)
            refuse(row.name, str(reason))
            continue
        clock.note(length, time.monotonic() - start)
        dense = dense or result.logits
        head = {"length": length, "task": task, "index": index, "method": row.name}
        work = {"density": result.work.density, "executed": result.work.executed}
        work |= {"keep_value": row.settings.keep_value, "seconds": round(time.monotonic() - start, 3)}
        answers = [(i, outcome) for i, outcomes in enumerate(result.outcomes) for outcome in outcomes]
        yield [head | {"question": i} | asdict(outcome) | work for i, outcome in answers]


def _order(study: Study) -> Iterator[tuple[int, int, str]]:
    first, step = study.shard
    for index in range(first, study.contexts, step) if study.contexts else count(first, step):
        for length in study.lengths:
            for task in study.tasks:
                yield index, length, task


def facts(study: Study, subject: Subject, dtype: str) -> dict[str, Any]:
    """What must not change between records of one folder. Tasks, lengths and how many of them may."""
    fixed = ("questions", "seed", "dense_below", "chunk", "dense_final", "slack")
    return {"model": subject.name, "dtype": dtype, "essay": words.essay_name()} | {
        name: getattr(study, name) for name in fixed
    }


def _write(path: Path, values: dict[str, Any]) -> None:
    """At once, as another process may be reading."""
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(values, indent=1))
    fresh.replace(path)


def _key(record: dict[str, Any]) -> tuple[int, str, int, str]:
    return record["length"], record["task"], record["index"], record["method"]
