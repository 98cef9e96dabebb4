"""Accuracy against speed-up as one picture, from two records: an evaluation's csv and a sweep of whole prefills'.

python3 tests/bench/tradeoff.py --eval EVAL.csv --prefill PREFILL.csv --out PICTURE.svg

Up: points against dense attention on the same items, with their interval, of one length a panel. Across: how many
times as long FA3 in place takes for what attends and selects of a whole prefill, at the density that the row read. A
method's time at a density lies on the straight line through its two measured ones, .17 and .30; beyond .30 it is
continued. Model and shapes of the two records differ: the picture orders methods, and says of no model what it would
do.
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import plots

# Names of the evaluation, and of the sweep.
SYSTEMS = {
    "default": "ours-op",
    "two_level": "two_level",
    "pooled_mass-head": "pooled_mass",
    "flashprefill-union": "flashprefill-union",
    "flashprefill-block_sparse": "flashprefill-block_sparse",
    "xattention": "xattention",
}
PEER, DENSITIES = "vllm-fa3", (0.17, 0.30)
WIDTH, PANEL, LEFT, RIGHT, TOP, BOTTOM = 820, 300, 64, 300, 40, 44
FASTEST, WORST, BEST = 6.0, -30.0, 5.0


@dataclass(frozen=True)
class Point:
    """A row: times as fast as the peer, points against dense with their interval."""

    name: str
    length: int
    speed: float
    mean: float
    low: float
    high: float


def main() -> int:
    """0 if the picture was drawn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--prefill", type=Path, required=True)
    parser.add_argument("--case", default="h32k8_d128_b1_q1024_kv131072", help="of the sweep")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.write_text(drawn(points(_rows(args.eval), times(_rows(args.prefill), args.case)), args.case))
    return 0


def times(rows: list[dict[str, str]], case: str) -> dict[str, list[tuple[float, float]]]:
    """By system, without its density: (density, ms of the op) of each row of the case."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        name, _, told = row["system"].rpartition("-")
        base = name if told in {f"{density:.2f}" for density in DENSITIES} else row["system"]
        if row["case"] == case:
            found.setdefault(base, []).append((float(row["density"]), float(row["op_ms"])))
    return found


def points(rows: list[dict[str, str]], taken: dict[str, list[tuple[float, float]]]) -> list[Point]:
    """The evaluation's rows over all tasks whose method the sweep has timed at two densities."""
    found = []
    for row in rows:
        system = SYSTEMS.get(row["method"].partition("@")[0], "")
        if row["scope"] != "all tasks" or len(taken.get(system, [])) < len(DENSITIES):
            continue
        speed = taken[PEER][0][1] / _at(taken[system], float(row["density"]))
        told = (float(row[name]) for name in ("difference", "difference_low", "difference_high"))
        found.append(Point(row["method"], int(row["length"]), speed, *told))
    return found


def _at(taken: list[tuple[float, float]], density: float) -> float:
    (low, at_low), (high, at_high) = sorted(taken)
    return at_low + (at_high - at_low) / (high - low) * (density - low)


def drawn(found: list[Point], case: str) -> str:
    """A panel a length, one below the other."""
    lengths = sorted({point.length for point in found})
    names = list(dict.fromkeys(point.name.partition("@")[0] for point in found))
    parts = [f'<rect width="{WIDTH}" height="{PANEL * len(lengths)}" fill="white"/>']
    for i, length in enumerate(lengths):
        own = [point for point in found if point.length == length]
        parts.append(f'<g transform="translate(0 {PANEL * i})">')
        parts += _frame(f"{length // 1024}K: points against dense; speed of {case} over {PEER}")
        parts += [line for at, point in enumerate(own) for line in _mark(point, names, at)]
        parts.append("</g>")
    body = "\n".join(parts)
    size = f'width="{WIDTH}" height="{PANEL * len(lengths)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n{body}\n</svg>\n'


def _place(speed: float, mean: float) -> tuple[float, float]:
    across, up = speed / FASTEST, (mean - WORST) / (BEST - WORST)
    return LEFT + across * (WIDTH - LEFT - RIGHT), PANEL - BOTTOM - up * (PANEL - TOP - BOTTOM)


def _frame(title: str) -> list[str]:
    parts = [plots._text(LEFT, 20, title, size=14)]
    for value in range(int(WORST), int(BEST) + 1, 5):
        y = _place(0, value)[1]
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{"#d0d7de" if value else "#57606a"}"/>')
        parts.append(plots._text(LEFT - 6, y + 4, f"{value}", anchor="end"))
    for times_as_fast in range(int(FASTEST) + 1):
        x = _place(times_as_fast, WORST)[0]
        parts.append(plots._text(x, PANEL - BOTTOM + 18, f"{times_as_fast} x", anchor="middle"))
    return parts


def _mark(point: Point, names: list[str], at: int) -> list[str]:
    base, _, asked = point.name.partition("@")
    colour = plots.style(names.index(base))[0]
    x, y = _place(point.speed, point.mean)
    ends = [_place(point.speed, max(WORST, min(BEST, value)))[1] for value in (point.low, point.high)]
    disc = f'r="5" stroke="{colour}" stroke-width="2" fill="{"white" if asked else colour}"'
    beside = TOP + 18 * at
    return [
        f'<path d="M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}" stroke="{colour}" stroke-opacity=".35"/>',
        f'<circle cx="{x:.1f}" cy="{y:.1f}" {disc}><title>{point.name}</title></circle>',
        f'<circle cx="{WIDTH - RIGHT + 30}" cy="{beside}" {disc}/>',
        plots._text(WIDTH - RIGHT + 42, beside + 4, f"{point.name}: {point.mean:+.1f}, {point.speed:.1f} x"),
    ]


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    sys.exit(main())
