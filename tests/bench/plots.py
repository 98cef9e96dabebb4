"""Plots from a CSV of bench.py, as SVG by hand: nothing to install. `plots.py FILE.csv DIR` draws them again.

`draw_prefills` draws what prefill.py measured.
"""

from __future__ import annotations

import csv
import math
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 64, 230, 40, 48
# Of a bar and the space below it.
BAR = 28
# fmt: off
COLOURS = (
    "#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#0a7ea4", "#bf3989", "#57606a", "#bc4c00", "#4d2d00",
    "#000000", "#6cb6ff", "#ff9492", "#57d364", "#e3b341", "#c297ff", "#2ad4c9", "#ff7ae0", "#0a3069", "#8fa300",
)
# fmt: on
# Of lines, in turn with the colours: colours that are alike to some eyes have another dash.
DASHES = ("", "7 3", "2 3")
STAGES = ("ours-select", "ours-union", "ours-table", "ours-attend")


@dataclass
class Figure:
    """Lines over contexts (log2)."""

    title: str
    unit: str
    lines: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))

    def svg(self) -> str:
        """The drawing."""
        xs = sorted({x for line in self.lines.values() for x, _ in line})
        top = _round_up(max(y for line in self.lines.values() for _, y in line))
        low, high = math.log2(xs[0]), math.log2(xs[-1])

        def at(x: int, y: float) -> tuple[float, float]:
            across = (math.log2(x) - low) / (high - low) if high > low else 0.5
            return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

        parts = [_text(LEFT, 22, self.title, size=15), _text(8, TOP - 6, self.unit)]
        for i in range(6):
            y = at(xs[0], top * i / 5)[1]
            parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#d0d7de"/>')
            parts.append(_text(LEFT - 6, y + 4, f"{top * i / 5:g}", anchor="end"))
        parts += [_text(at(x, 0)[0], HEIGHT - BOTTOM + 18, _tokens(x), anchor="middle") for x in xs]
        parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "context (tokens)", anchor="middle"))
        for i, (name, line) in enumerate(self.lines.items()):
            parts += _line(name, [at(x, y) for x, y in sorted(line)], i)
        return _svg(parts, HEIGHT)


@dataclass
class Stack:
    """Bars of parts laid end to end, one a system; a part below 0 is not drawn, and takes from what is before it."""

    title: str
    unit: str
    bars: dict[str, dict[str, float]] = field(default_factory=dict)

    def svg(self) -> str:
        """The drawing."""
        names = list(next(iter(self.bars.values())))
        left, height = 2 * LEFT + 30, TOP + BAR * len(self.bars) + BOTTOM
        scale = (WIDTH - left - LEFT) / max(sum(bar.values()) for bar in self.bars.values())
        parts = [_text(8, 22, f"{self.title} ({self.unit})", size=15)]
        for row, (system, bar) in enumerate(self.bars.items()):
            y, x = TOP + BAR * row, float(left)
            parts.append(_text(left - 6, y + 15, system, anchor="end"))
            for i, name in enumerate(names):
                width, colour = bar[name] * scale, COLOURS[i % len(COLOURS)]
                box = f'x="{x:.1f}" y="{y}" width="{max(width, 0):.1f}" height="{BAR - 6}"'
                parts.append(f'<rect {box} fill="{colour}"><title>{escape(name)} {bar[name]:.2f}</title></rect>')
                x += width
            parts.append(_text(x + 4, y + 15, f"{sum(bar.values()):.0f}"))
        for i, name in enumerate(names):
            x = 8 + i * (WIDTH - 16) / len(names)
            parts.append(
                f'<rect x="{x:.1f}" y="{height - 30}" width="12" height="12" fill="{COLOURS[i % len(COLOURS)]}"/>'
            )
            parts.append(_text(x + 16, height - 20, name))
        return _svg(parts, height)


@dataclass(frozen=True)
class Prefill:
    """One system's prefill, for a drawing."""

    # The shape without its context.
    family: str
    context: int
    system: str
    ms: float
    # Milliseconds, in order.
    components: dict[str, float]


def draw_prefills(rows: list[Prefill], out: Path) -> list[Path]:
    """For each family: the module's speed-up over either peer against context, and at each context where time goes."""
    written = []
    for family in dict.fromkeys(row.family for row in rows):
        own = [row for row in rows if row.family == family]
        stem = "prefill-" + family.replace(", ", "-").replace(" ", "-")
        drawn: dict[str, Figure | Stack] = {}
        for peer in ("vllm-fa3", "fa2-copies"):
            drawn[f"over-{peer}"] = _speedup(family, own, peer)
        for context in dict.fromkeys(row.context for row in own):
            bars = {row.system: row.components for row in own if row.context == context}
            drawn[f"stack-{_tokens(context)}"] = Stack(f"{family}, {_tokens(context)}", "ms", bars)
        for what, figure in drawn.items():
            if isinstance(figure, Stack) or figure.lines:
                written.append(out / f"{stem}-{what}.svg")
                written[-1].write_text(figure.svg())
    return written


def _speedup(family: str, rows: list[Prefill], peer: str) -> Figure:
    figure = Figure(f"{family}: attention module, speed-up over {peer}", "x")
    base = {row.context: row.ms for row in rows if row.system == peer}
    for row in sorted(rows, key=lambda it: it.context):
        if row.context in base:
            figure.lines[row.system].append((row.context, base[row.context] / row.ms))
    return figure


def style(i: int) -> tuple[str, str]:
    """Colour and dash of the i-th line of a figure: no colour twice in 20 lines, no pair twice in 60."""
    return COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]


def draw(rows_csv: Path, out: Path) -> list[Path]:
    """Speed-up over the best dense peer, TFLOP/s, time by stage: for each family of shapes with several contexts."""
    with rows_csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    families: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        families[row["case"].rpartition("_kv")[0], row["page"]].append(row)
    written = []
    for (family, page), own in families.items():
        peers = families.get((family, "0"), []) if page != "0" else []
        contexts = {row["case"] for row in own}
        if page == "0" or len(contexts) < 2:
            continue
        for what, figure in _figures(f"{family}, page {page}", own + peers):
            path = out / f"{rows_csv.stem}-{family}-page{page}-{what}.svg"
            path.write_text(figure.svg())
            written.append(path)
    return written


def _figures(title: str, rows: list[dict[str, str]]) -> list[tuple[str, Figure]]:
    speed, rate = Figure(f"{title}: speed-up over the best dense peer", "x"), Figure(title, "TFLOP/s")
    stages = Figure(f"{title}: time by stage", "ms")
    best: dict[int, float] = {}
    for row in rows:
        if _is_dense_peer(row):
            context = _context(row)
            best[context] = min(best.get(context, math.inf), float(row["ms_median"]))
    for row in rows:
        context, ms, name = _context(row), float(row["ms_median"]), row["system"]
        if name in STAGES:
            stages.lines[name.removeprefix("ours-")].append((context, ms))
            continue
        rate.lines[name].append((context, float(row["tflops"])))
        if context in best:
            speed.lines[name].append((context, best[context] / ms))
    figures = {"speedup": speed, "tflops": rate, "stages": stages}
    return [(what, figure) for what, figure in figures.items() if figure.lines]


def _is_dense_peer(row: dict[str, str]) -> bool:
    return not row["system"].startswith("ours") and float(row["density"]) == 1


def _context(row: dict[str, str]) -> int:
    return int(row["case"].rpartition("_kv")[2])


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)


def _round_up(value: float) -> float:
    """To a number that reads well at fifths of it."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(step * power for step in (1, 1.5, 2, 3, 5, 8, 10) if value <= step * power)


def _svg(parts: list[str], height: int) -> str:
    body, style = "\n".join(parts), 'font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" {style}>\n{body}\n</svg>\n'


def _line(name: str, points: list[tuple[float, float]], i: int) -> list[str]:
    (colour, dash), y = style(i), TOP + 18 * i
    stroke = f'stroke="{colour}" stroke-width="2"' + (f' stroke-dasharray="{dash}"' if dash else "")
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    parts = [f'<path d="{path}" fill="none" {stroke}/>']
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
    parts.append(f'<path d="M{WIDTH - RIGHT + 14} {y}h18" {stroke}/>')
    return [*parts, _text(WIDTH - RIGHT + 38, y + 4, name)]


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


if __name__ == "__main__":
    print(*draw(Path(sys.argv[1]), Path(sys.argv[2])), sep="\n")
