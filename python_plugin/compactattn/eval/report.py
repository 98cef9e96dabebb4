"""Tables and a plot from a folder's records: every method beside dense attention on the items both have."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from . import layers, plot
from .folder import Folder
from .statistics import Interval, mcnemar, paired_interval

# Who attends in the question's own chunk: the method, or dense attention.
OWN, DENSE = "own", "dense"
# What a run takes density for; runs that do not say so are from before.
BY_PAIRS = "by pairs"
# Where dense attention finds less, a task says nothing about a method: it is left out of "able" rows.
ABLE = 0.8
ALL_TASKS, ABLE_TASKS = "all tasks", "able tasks"
Record = dict[str, Any]
Pairs = list[tuple[Record, Record]]


@dataclass(frozen=True)
class Row:
    """A method on some tasks of one length, paired with dense."""

    length: int
    scope: str
    method: str
    items: int
    contexts: int
    accuracy: float
    # Dense attention's on the same items, which may be fewer than all it has.
    dense_accuracy: float
    # Against dense, percentage points; discordant pairs and their exact p, an item being right if all is found.
    difference: Interval
    lost: int
    won: int
    p: float
    nll: float
    nll_difference: Interval
    kl: float
    flips: float
    density: float | None
    executed: float
    # With the question's own chunk dense; None where that was not asked.
    dense_final: float | None
    # The task of the largest loss against dense, and that loss in points.
    worst: str
    worst_difference: float


def rows(records: list[Record]) -> list[Row]:
    """For each length: all tasks, those dense attention is able to do, each task alone; every method in each."""
    by_item: dict[tuple[Any, ...], Record] = {_item(r): r for r in records if r["method"] == "dense"}
    found = []
    for length in sorted({r["length"] for r in records}):
        of_length = [r for r in records if r["length"] == length]
        tasks = sorted({r["task"] for r in of_length})
        able = [task for task in tasks if _dense_accuracy(of_length, task) >= ABLE]
        scopes = [(ALL_TASKS, tasks), (ABLE_TASKS, able), *((task, [task]) for task in tasks)]
        methods = list(dict.fromkeys(r["method"] for r in of_length))
        for scope, members in scopes:
            for method in methods:
                mine = [r for r in of_length if r["method"] == method and r["task"] in members]
                pairs = [(r, by_item[_item(r)]) for r in mine if r["final"] == OWN and _item(r) in by_item]
                if pairs:
                    found.append(_row((length, scope, method), pairs, [r for r in mine if r["final"] == DENSE]))
    return found


def write(folder: Folder, stem: Path) -> list[Path]:
    """``<stem>.csv``, ``<stem>.md``, ``<stem>.svg`` and ``<stem>-layers.csv`` of what the folder holds."""
    table = rows(folder.records)
    paths = [stem.with_name(f"{stem.name}{end}") for end in (".csv", ".md", ".svg", "-layers.csv")]
    with paths[0].open("w", newline="") as file:
        writer = csv.DictWriter(file, list(_flat(table[0])) if table else ["length"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(_flat(row) for row in table)
    paths[1].write_text(_markdown(table, folder))
    drawings = []
    for length in sorted({row.length for row in table}):
        own = [row for row in table if row.length == length and row.scope == ALL_TASKS]
        drawings.append(plot.scatter(f"{length} tokens", [_point(row) for row in own]))
    paths[2].write_text(plot.stacked(drawings))
    layers.write(folder.probes, paths[3])
    return paths


def _point(row: Row) -> plot.Point:
    lost = row.difference
    return plot.Point(row.method, row.items, 100 * row.executed, lost.mean, lost.low, lost.high)


def _row(name: tuple[int, str, str], pairs: Pairs, dense_final: list[Record]) -> Row:
    contexts = [(r["task"], r["index"]) for r, _ in pairs]

    def difference(of: Callable[[Record], float], scale: float = 1.0) -> Interval:
        return paired_interval([scale * (of(ours) - of(dense)) for ours, dense in pairs], contexts)

    right = [(ours["recall"] == 1, dense["recall"] == 1) for ours, dense in pairs]
    lost, won = right.count((False, True)), right.count((True, False))
    by_task = _by_task(pairs)
    worst = min(by_task, key=lambda task: by_task[task])
    own = [ours for ours, _ in pairs]
    densities = [r["density"] for r in own if r["density"] is not None]
    return Row(
        *name,
        items=len(pairs),
        contexts=len(set(contexts)),
        accuracy=_mean(own, "recall"),
        dense_accuracy=_mean([dense for _, dense in pairs], "recall"),
        difference=difference(lambda r: r["recall"], 100.0),
        lost=lost,
        won=won,
        p=mcnemar(lost, won),
        nll=_mean(own, "nll"),
        nll_difference=difference(lambda r: r["nll"]),
        kl=_mean(own, "kl"),
        flips=_mean(own, "flips"),
        density=fmean(densities) if densities else None,
        executed=_mean(own, "executed"),
        dense_final=_mean(dense_final, "recall") if dense_final else None,
        worst=worst,
        worst_difference=100 * by_task[worst],
    )


def _by_task(pairs: Pairs) -> dict[str, float]:
    found = defaultdict(list)
    for ours, dense in pairs:
        found[ours["task"]].append(ours["recall"] - dense["recall"])
    return {task: fmean(values) for task, values in sorted(found.items())}


def _dense_accuracy(records: list[Record], task: str) -> float:
    found = [r["recall"] for r in records if r["task"] == task and r["method"] == "dense" and r["final"] == OWN]
    return fmean(found) if found else 0.0


def _mean(records: list[Record], name: str) -> float:
    return fmean(r[name] for r in records)


def _item(record: Record) -> tuple[Any, ...]:
    return record["length"], record["task"], record["index"], record["question"]


def _flat(row: Row) -> Record:
    flat: Record = {}
    for name, value in vars(row).items():
        if isinstance(value, Interval):
            flat |= {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high}
        else:
            flat[name] = value
    return {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in flat.items()}


def _markdown(table: list[Row], folder: Folder) -> str:
    """The report in words: what was run; of each length all tasks, the able ones, single tasks, and layers; how."""
    lines = ["# Accuracy of sparse prefill, paired with dense", "", _told(folder.facts), ""]
    for length in sorted({row.length for row in table} | {line["length"] for line in folder.probes}):
        for scope in (ALL_TASKS, ABLE_TASKS):
            own = [row for row in table if row.length == length and row.scope == scope]
            if own:
                lines += [f"## {length} tokens, {scope}", "", *_HEAD, *map(_line, own), ""]
        lines += [f"## {length} tokens, accuracy by task (n)", "", *_tasks(table, length), ""]
        lines += layers.tables(folder.probes, length)
    if any(row.method.startswith("quoka") for row in table):
        lines += ["On a GPU `quoka` is torch code (eval/quoka.py): the library has it on the CPU alone.", ""]
    if folder.absent:
        told = (f"- `{name}`: {reason}" for name, reason in sorted(folder.absent.items()))
        lines += ["## Not run, or not in full", "", *told, ""]
    if folder.runs:
        lines += ["## How", ""]
        if any(run.get("density") != BY_PAIRS for run in folder.runs):
            lines += [_POOLED, ""]
        lines += [f"    {run['command']}\n\n{_told({**run, 'command': None})}\n" for run in folder.runs]
    return "\n".join(lines)


def _told(facts: Record) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)


def _line(row: Row) -> str:
    cells = [
        row.method,
        f"{row.items} ({row.contexts})",
        f"{100 * row.accuracy:.1f}",
        f"{100 * row.dense_accuracy:.1f}",
        f"{row.difference.mean:+.1f} [{row.difference.low:+.1f}, {row.difference.high:+.1f}]",
        f"{row.lost}/{row.won}, {row.p:.2g}",
        f"{row.nll_difference.mean:+.4f} [{row.nll_difference.low:+.4f}, {row.nll_difference.high:+.4f}]",
        f"{row.kl:.4f}",
        f"{100 * row.flips:.1f}",
        "dense" if row.density is None else f"{row.density:.3f}",
        f"{row.executed:.3f}",
        "" if row.dense_final is None else f"{100 * row.dense_final:.1f}",
        f"{row.worst} {row.worst_difference:+.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _tasks(table: list[Row], length: int) -> list[str]:
    own = [row for row in table if row.length == length and row.scope not in (ALL_TASKS, ABLE_TASKS)]
    methods, tasks = (list(dict.fromkeys(getattr(row, name) for row in own)) for name in ("method", "scope"))
    cells = {(row.scope, row.method): f"{100 * row.accuracy:.1f} ({row.items})" for row in own}
    head = [f"| task | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|"]
    return head + [f"| {task} | {' | '.join(cells.get((task, m), '') for m in methods)} |" for task in tasks]


_POOLED = (
    f"Runs that do not say `density {BY_PAIRS}` pooled the questions' own chunks with the contexts: "
    "their density and executed share are too low where much is read."
)
_HEAD = (
    "| method | items (contexts) | accuracy % | dense on these % | vs dense, points [95 %] | lost/won, McNemar p "
    "| answer NLL vs dense [95 %] | KL | flips % | density | executed | dense question % | worst task, points |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
)
