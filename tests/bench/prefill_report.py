"""What a prefill sweep leaves behind: rows as they come, tables with ratios, plots, gaps, how to repeat rows."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import plots
from module import PARTS
from report import environment
from root import ROOT
from shapes import Shape
from stages import STAGES
from sweep import PEERS, Row

FA3, FA2 = PEERS
HEAD = ["question", "case", "system", "page", "density", "ms_median", "ms_min", "ms_max", "inflation", "ranks"]
COLUMNS = [*HEAD, *(f"{it}_ms" for it in (*PARTS, *STAGES))]
PUBLISHED = ROOT / "tests/bench/published.csv"
SOURCE = (
    "Official: attention speed-up over its own dense path (FlashInfer; the cache concatenated and copied in every "
    "chunk), two H200, tensor parallel 2, Llama-3.1-8B, batch 8, chunk 1024; github.com/jiwonsong-dev/CompactAttention "
    "at 4ed4d7d, arXiv 2605.16839. It gives no densities. Ours: the same shapes a GPU, module against module."
)
LEGEND = (
    "Times of a whole prefill, of the run in the middle of three (fastest to slowest), and how many times as long FA3 "
    "in place and FA2 with copies take. `read`: share of the "
    "blocks before a chunk; `union`: what lists read over what a head's 128 queries asked for (random heads agree on "
    "little: real ones inflate less). Where it goes: plan to attend by the profiler, union and table being one kernel, "
    "select holding union too where one kernel does both; "
    "`rest`: the op less those kernels, which are of another run (the profiler's), so it may lie below 0: with it the "
    "row adds up to the module; `sum`: over GPUs, and the wait for the other one."
)


@dataclass(frozen=True)
class Measured:
    """One system on one shape; milliseconds of a whole prefill, of the slower rank."""

    case: str
    system: str
    # 0 = contiguous.
    page: int
    # Of the blocks before a chunk, the share that was read.
    density: float
    # The module without the sum over ranks, of the run in the middle (of records before ms_median: the mean of all).
    ms: float
    # Of all runs; None in those records.
    ms_min: float | None
    ms_max: float | None
    # What lists read over what a head's 128 queries asked for; None where nothing is united.
    inflation: float | None
    ranks: int
    # By module.PARTS, of that run, and by stages.STAGES (of a run of its own, under the profiler).
    parts: dict[str, float]
    stages: dict[str, float]

    @property
    def shape(self) -> Shape:
        """Of one rank."""
        return Shape.parse(self.case)

    @property
    def family(self) -> str:
        """What a table is of: the case without its context."""
        return self.case.rpartition("_kv")[0]

    def time(self, what: str) -> float:
        """module, op or kernel, milliseconds: the three that are compared."""
        return {"module": self.ms, "op": self.parts["op"], "kernel": self.stages["attend"]}[what]

    def cells(self) -> list[str]:
        """As the CSV has it."""
        head = ["prefill", self.case, self.system, str(self.page), f"{self.density:.4f}"]
        head += ["" if ms is None else f"{ms:.3f}" for ms in (self.ms, self.ms_min, self.ms_max)]
        head.append(f"{self.inflation:.3f}" if self.inflation else "")
        times = [*(self.parts[it] for it in PARTS), *(self.stages[it] for it in STAGES)]
        return [*head, str(self.ranks), *(f"{ms:.3f}" for ms in times)]

    @classmethod
    def parse(cls, row: dict[str, str]) -> Measured:
        """From a line of the CSV; older ones have a mean, and the first ones neither parts nor stages: they stay 0."""
        return cls(
            case=row["case"],
            system=row["system"],
            page=int(row["page"]),
            density=float(row["density"]),
            ms=float(row["ms_median"] if "ms_median" in row else row["ms_mean"]),
            ms_min=float(row["ms_min"]) if row.get("ms_min") else None,
            ms_max=float(row["ms_max"]) if row.get("ms_max") else None,
            inflation=float(row["inflation"]) if row.get("inflation") else None,
            ranks=int(row.get("ranks", 1)),
            parts={it: float(row.get(f"{it}_ms", 0)) for it in PARTS},
            stages={it: float(row.get(f"{it}_ms", 0)) for it in STAGES},
        )

    def __str__(self) -> str:
        stages = " ".join(f"{name} {ms:.2f}" for name, ms in self.stages.items() if ms)
        op = f"op {self.parts['op']:.2f} ({stages})"
        return f"{self.case} {self.system:24s} {self.ms:9.2f} ms{self.span}  read {self.density:.3f}  {op}"

    @property
    def span(self) -> str:
        """The fastest run and the slowest, for a text; nothing where they are not known."""
        return "" if self.ms_min is None or self.ms_max is None else f" ({self.ms_min:.1f} to {self.ms_max:.1f})"


@dataclass(frozen=True)
class Gap:
    """A row that is not there."""

    # missing or wrong.
    kind: str
    case: str
    system: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.system}, {self.case}: {self.reason}"


@dataclass(frozen=True)
class Report:
    """What the run says at its end."""

    gaps: list[str]
    wrong: list[str]
    notes: list[str]


class Book:
    """Rows are on disk as soon as they are known; a run that is cut short leaves what it had."""

    def __init__(self, out: Path) -> None:
        self.out, self.rows_path, self._gaps_path = out, out / "prefill.csv", out / "prefill-gaps.csv"

    def open(self, *, keep: bool = False) -> None:
        """Begins anew; with `keep` the rows that are there stay, and gaps are tried again."""
        head = ",".join(COLUMNS)
        if not keep or not self.rows_path.exists():
            self.rows_path.write_text(head + "\n")
        elif self.rows_path.read_text().partition("\n")[0] != head:
            raise ValueError(f"{self.rows_path} has other columns than rows have today: take another folder")
        self._gaps_path.write_text("kind,case,system,reason\n")

    def add(self, line: Measured | Gap) -> None:
        """One more."""
        gap = isinstance(line, Gap)
        cells = [line.kind, line.case, line.system, line.reason] if isinstance(line, Gap) else line.cells()
        with (self._gaps_path if gap else self.rows_path).open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(cells)

    def rows(self) -> list[Measured]:
        """What was measured."""
        with self.rows_path.open(newline="") as file:
            return [Measured.parse(row) for row in csv.DictReader(file)]

    def gaps(self) -> list[Gap]:
        """What was not, with a reason."""
        with self._gaps_path.open(newline="") as file:
            return [Gap(**row) for row in csv.DictReader(file)]


def write(book: Book, planned: Sequence[Row], about: str, command: str, failure: str, ranks: int) -> Report:
    """prefill.md and the plots, from what the book has of so many ranks; planned, and neither there nor a gap: no time.

    Rows of another number of ranks stay in the book: they are no peers of these, and answer for none.
    """
    rows, gaps = [row for row in book.rows() if row.ranks == ranks], book.gaps()
    known = {(it.case, it.system) for it in rows} | {(it.case, it.system) for it in gaps}
    late = [Gap("missing", *row.key, failure or "no time left") for row in planned if row.key not in known]
    wrong = [str(gap) for gap in gaps if gap.kind == "wrong"]
    missing = _grouped([gap for gap in (*gaps, *late) if gap.kind == "missing"])
    lines = ["# Chunked prefill", "", "```", about.strip(), *environment(), "```", "", LEGEND, ""]
    for family in dict.fromkeys(row.family for row in rows):
        lines += _family(family, [row for row in rows if row.family == family])
    lines += _beside_published(rows)
    lines += ["## Wrong answers, not timed", "", *_items(wrong, "none"), ""]
    lines += ["## Not measured", "", *_items(missing, "nothing"), ""]
    lines += ["## To repeat a row, with its peers", "", "```sh"]
    lines += [*(f"{command} --repro '{row.case},{row.system}'" for row in rows if row.system not in PEERS), "```"]
    (book.out / "prefill.md").write_text("\n".join(lines) + "\n")
    plots.draw_prefills([_drawn(row) for row in rows], book.out)
    notes = [*([failure] if failure else []), *wrong, *(f"not measured: {it}" for it in missing)]
    return Report(missing, wrong, notes)


def ratio(rows: Iterable[Measured], row: Measured, peer: str, what: str) -> float | None:
    """How many times as long the peer takes on the same shape; None without the peer."""
    other = next((it for it in rows if it.case == row.case and it.system == peer), None)
    mine = row.time(what)
    return other.time(what) / mine if other and mine and other.time(what) else None


def _family(family: str, rows: list[Measured]) -> list[str]:
    ranks = f", {rows[0].ranks} GPUs with half of the heads each" if rows[0].ranks == 2 else ""
    rows = sorted(rows, key=lambda it: it.shape.context)
    shared = rows[0].ranks > 1
    head = ["context", "system", "read", "union"]
    for what in ("module", "op", "attend"):
        head += [f"{what} ms", "x FA3", "x FA2"]
    lines = [f"## {family}{ranks}", ""]
    lines += _head([*head, *(["module and sum ms"] if shared else [])])
    for row in rows:
        cells = [_tokens(row), row.system, f"{row.density:.3f}", f"{row.inflation:.1f}" if row.inflation else ""]
        for what in ("module", "op", "kernel"):
            cells.append(
                ("" if what == "kernel" and not row.time(what) else f"{row.time(what):.1f}")
                + (row.span if what == "module" else "")
            )
            cells += [_times(ratio(rows, row, peer, what)) for peer in (FA3, FA2)]
        lines.append(_line([*cells, *([f"{row.ms + row.parts['reduce']:.1f}"] if shared else [])]))
    lines += ["", "Where it goes, ms:", ""]
    lines += _head(["context", "system", *components(rows[0])])
    lines += [_line([_tokens(row), row.system, *(f"{ms:.2f}" for ms in components(row).values())]) for row in rows]
    return [*lines, ""]


def components(row: Measured) -> dict[str, float]:
    """All of a prefill, in the module's order, milliseconds; they add up to the module and the sum over ranks.

    `rest` is what makes them: below 0 where the kernels of the profiler's run took longer than the op of the timed one.
    """
    rest = row.parts["op"] - sum(row.stages.values())
    before = {it: row.parts[it] for it in ("project", "write")}
    total = {"sum": row.parts["reduce"]} if row.ranks > 1 else {}
    return {**before, **row.stages, "rest": rest, "output": row.parts["output"], **total}


def _beside_published(rows: list[Measured]) -> list[str]:
    with PUBLISHED.open(newline="") as file:
        published = list(csv.DictReader(file))
    lines = []
    for case in dict.fromkeys(it["case"] for it in published):
        theirs = ", ".join(f"{it['method']} {it['speedup']}" for it in published if it["case"] == case)
        mine = [row for row in rows if row.case == case and row.system not in PEERS]
        for row in mine:
            over = [_times(ratio(rows, row, peer, "module")) for peer in (FA2, FA3)]
            lines.append(_line([_tokens(row), theirs, row.system, f"{row.density:.3f}", *over, str(row.ranks)]))
            theirs = ""
    if not lines:
        return []
    head = ["context", "official, over its dense", "ours", "read", "over FA2 with copies", "over FA3 in place", "GPUs"]
    return ["## The official repository beside ours", "", SOURCE, "", *_head(head), *lines, ""]


def _drawn(row: Measured) -> plots.Prefill:
    family = row.family + (f", {row.ranks} GPUs" if row.ranks > 1 else "")
    return plots.Prefill(family, row.shape.context, row.system, row.ms, components(row))


def _grouped(gaps: list[Gap]) -> list[str]:
    """A line a reason."""
    by: dict[tuple[str, str], list[str]] = defaultdict(list)
    for gap in gaps:
        by[gap.system, gap.reason].append(gap.case)
    return [f"{system}, {', '.join(cases)}: {reason}" for (system, reason), cases in by.items()]


def _items(lines: list[str], none: str) -> list[str]:
    return [f"- {line}" for line in lines] or [none]


def _head(cells: list[str]) -> list[str]:
    return [_line(cells), "|" + "---|" * len(cells)]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _tokens(row: Measured) -> str:
    return f"{row.shape.context // 1024}K"
