"""Rounds of paired items: each batch of contexts goes through every row before the next; resumable, bounded in time."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any

from . import prefill, words
from .clock import Clock
from .codec import Codec
from .folder import FIELDS, Folder, rounded
from .methods import Method
from .model import Subject
from .pool import PAGE
from .prefill import FOR_GOOD, NO_ROW, Limits, Result
from .progress import Progress
from .tasks import SEVERAL, Context, make


@dataclass(frozen=True)
class Study:
    """What is asked of which tasks and lengths: how many items, how many questions where a task has several."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    # Items (questions) a length, in whole rounds over the tasks: of the main rows, 0 = until time is up; of the others.
    items: int
    few: int
    questions: int
    seed: int
    # 0 = a quarter of the length.
    dense_below: int
    chunk: int
    # Whose questions are also asked with their own chunk dense: all, main or none of the rows.
    dense_final: str
    # Contexts that go through a model together; 0 = as many as hold BATCH_TOKENS.
    batch: int = 0
    # Greedy tokens beyond the expected answer's length.
    slack: int = 4

    def limits(self, length: int, main: bool = True) -> Limits:
        """The limits of a length, for the main rows or the others."""
        dense_final = self.dense_final in (("all", "main") if main else ("all",))
        return Limits(self.chunk, self.dense_below or length // 4, self.slack, dense_final)

    def contexts_of(self, length: int) -> int:
        """Contexts in a batch."""
        return self.batch or max(1, BATCH_TOKENS // length)

    def items_of(self, task: str) -> int:
        """Questions a context."""
        return self.questions if task in SEVERAL else 1

    def rounds(self, length: int, items: int) -> int:
        """How many rounds, each one batch of every task, hold so many items."""
        return -(-items // (self.contexts_of(length) * sum(map(self.items_of, self.tasks))))

    def context(self, codec: Codec, task: str, length: int, index: int) -> Context:
        """The context of an index; the same whatever else the study asks."""
        return make(task, codec, length, f"{self.seed}:{index}", self.items_of(task))


@dataclass(frozen=True)
class Group:
    """One batch: contexts ``first..first + count`` of a task."""

    length: int
    task: str
    first: int
    count: int
    # Whether the main rows go through it, or the others.
    main: bool = True


@dataclass(frozen=True)
class Rows:
    """The rows of one length: dense attention, those with all items, those with few."""

    dense: Method
    main: list[Method]
    few: list[Method]


@dataclass(frozen=True)
class Run:
    """What measures what, into where, for how long."""

    study: Study
    subject: Subject
    folder: Folder
    clock: Clock


def measure(run: Run, rows: dict[int, Rows]) -> None:
    """Main rows first, then the others: batches of all lengths, each as far along as the others, until time is up.

    A batch is begun only if all its rows are likely to end in time: rows have the same items. The folder is told which
    rows lack some in the end.
    """
    # Said before, as a kill says nothing.
    _leave(run, rows, "the run was cut off")
    _measure(run, rows)
    _leave(run, rows, "time was up")


def _measure(run: Run, rows: dict[int, Rows]) -> None:
    folder, progress = run.folder, Progress(run.folder, run.clock)
    processes = MAKERS if run.subject.engine.device.type == "cuda" else 0
    for group, contexts in _made(run.study, run.subject.codec, processes):
        due = _due(group, rows[group.length], folder, run.clock)
        if not due:
            continue
        if not run.clock.has_time(group.length, [row.name for row in due]):
            print(f"time is up at context {group.first}, {group.task} of {group.length} tokens", file=sys.stderr)
            return
        for lines in batch(run, due, group, contexts):
            folder.add([line for line in lines if not folder.has(*_place(line), line["method"])])
            progress.tell()


def batch(run: Run, rows: list[Method], group: Group, contexts: list[Context]) -> Iterator[list[dict[str, Any]]]:
    """The lines of one batch, row by row; ``rows[0]`` is dense. What cannot be run the folder is told."""
    dense, limits = None, run.study.limits(group.length, group.main)
    for row in rows:
        start = time.monotonic()
        try:
            result = prefill.run(run.subject, contexts, row, limits, dense)
        except NO_ROW as reason:
            print(f"{row.name}: not run: {reason}", file=sys.stderr)
            run.folder.refuse(row.name, group.length, reason, isinstance(reason, FOR_GOOD))
            if row is rows[0]:
                # Nothing to compare with.
                return
            continue
        dense = result.logits if dense is None else dense
        seconds = time.monotonic() - start
        run.clock.note(group.length, row.name, seconds)
        yield _lines(group, row, result, seconds)


def facts(study: Study, subject: Subject, dtype: str) -> dict[str, Any]:
    """What must not change between records of one folder. Tasks, lengths, rows and how many items may."""
    fixed = ("questions", "seed", "dense_below", "chunk", "batch", "slack")
    return {"model": subject.name, "dtype": dtype, "essay": words.essay_name(), "page": PAGE} | {
        name: getattr(study, name) for name in fixed
    }


def _due(group: Group, rows: Rows, folder: Folder, clock: Clock) -> list[Method]:
    """The rows that the batch has not been through, behind dense: its logits are not kept, it runs again for them."""

    def has(row: Method) -> bool:
        # A kill may have left some of a batch.
        indices = range(group.first, group.first + group.count)
        return all(folder.has(group.length, group.task, index, row.name) for index in indices)

    if folder.refused(rows.dense.name, group.length):
        # Nothing to compare with.
        return []
    wanted = [
        row
        for row in (rows.main if group.main else rows.few)
        if not folder.refused(row.name, group.length) and clock.may(group.length, row.name)
    ]
    due = [row for row in wanted if not has(row)]
    return [rows.dense, *due] if due or not has(rows.dense) else []


def _leave(run: Run, rows: dict[int, Rows], why: str) -> None:
    """Tells the folder which rows lack items that were asked for; ``why``, if nothing else is known of one."""
    folder, reasons = run.folder, dict[str, str | None](run.folder.failed)
    for (length, name), places in _asked(run.study, rows).items():
        key, reason = f"{name}:{length}", None
        lacking = {place for place in places if not folder.has(length, *place, name)}
        # Without a number of items a row is there if it has any.
        there = not lacking if run.study.items else lacking < places
        if not there and key not in folder.gaps:
            have, want = (sum(run.study.items_of(task) for task, _ in of) for of in (places - lacking, places))
            reason = f"{have} of {want} items: " if run.study.items else "no items: "
            reason += _why(run, rows[length].dense.name, length, name) or why
        reasons[key] = reason
    folder.leave(reasons)


def _why(run: Run, dense: str, length: int, name: str) -> str | None:
    if refused := run.folder.refused(name, length):
        return refused
    if run.folder.refused(dense, length):
        return "no dense row to compare with"
    return None if run.clock.may(length, name) else "its --row-seconds were up"


def _asked(study: Study, rows: dict[int, Rows]) -> dict[tuple[int, str], set[tuple[str, int]]]:
    """By length and row the contexts, by task and index, that are asked for; without a number of items those of one."""
    found = defaultdict[tuple[int, str], set[tuple[str, int]]](set)
    for group in _order(study if study.items else replace(study, items=1, few=0)):
        own = rows[group.length]
        for row in (own.dense, *(own.main if group.main else own.few)):
            found[group.length, row.name] |= {(group.task, group.first + i) for i in range(group.count)}
    return found


def _lines(group: Group, row: Method, result: Result, seconds: float) -> list[dict[str, Any]]:
    work = {"density": result.work.density, "executed": result.work.executed, "keep_value": row.settings.keep_value}
    work["seconds"] = seconds / group.count
    head = {"length": group.length, "task": group.task}
    tail = {"method": row.name} | {name: rounded(value) for name, value in work.items()}
    lines = []
    for index, questions in enumerate(result.outcomes, group.first):
        found = [vars(one) | {"question": i} for i, outcomes in enumerate(questions) for one in outcomes]
        answers = [[rounded(one[name]) for name in FIELDS] for one in found]
        lines.append(head | {"index": index} | tail | {"answers": answers})
    return lines


def _made(study: Study, codec: Codec, processes: int) -> Iterator[tuple[Group, list[Context]]]:
    """All batches with their contexts, which other processes make ahead of time; 0: this one does."""
    groups = _order(study)
    if not processes:
        yield from ((group, _contexts(study, codec, group)) for group in groups)
        return
    with ProcessPoolExecutor(processes, get_context("fork"), _adopt, (study, codec)) as pool:
        ahead = [(group, pool.submit(_adopted, group)) for group in islice(groups, 2 * processes)]
        try:
            while ahead:
                group, made = ahead.pop(0)
                ahead += [(one, pool.submit(_adopted, one)) for one in islice(groups, 1)]
                yield group, made.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _contexts(study: Study, codec: Codec, group: Group) -> list[Context]:
    indices = range(group.first, group.first + group.count)
    return [study.context(codec, group.task, group.length, index) for index in indices]


def _adopt(study: Study, codec: Codec) -> None:
    _own.append((study, codec))


def _adopted(group: Group) -> list[Context]:
    return _contexts(*_own[0], group)


def _order(study: Study) -> Iterator[Group]:
    few = study.few or study.items
    # Without an end there is no behind.
    both = ((study.items, True), (few, False)) if study.items else ((0, True), (0, False))
    parts = [_turns(study, items, main) for items, main in both]
    yield from chain(*parts) if study.items else chain.from_iterable(zip(*parts, strict=True))


def _turns(study: Study, items: int, main: bool) -> Iterator[Group]:
    """Batches in turn: the next is of the length that is least far along."""
    ends = {length: study.rounds(length, items) * len(study.tasks) for length in study.lengths}
    done = dict.fromkeys(study.lengths, 0)
    while left := [n for n in study.lengths if not items or done[n] < ends[n]]:
        length = min(left, key=lambda n: done[n] / (ends[n] or 1))
        turn, at = divmod(done[length], len(study.tasks))
        size = study.contexts_of(length)
        yield Group(length, study.tasks[at], turn * size, size, main)
        done[length] += 1


def _place(line: dict[str, Any]) -> tuple[int, str, int]:
    return line["length"], line["task"], line["index"]


# Tokens of the contexts in a batch.
BATCH_TOKENS = 131072
# Processes that make contexts ahead of a GPU.
MAKERS = 6
_own: list[tuple[Study, Codec]] = []
