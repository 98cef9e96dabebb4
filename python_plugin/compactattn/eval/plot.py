"""Accuracy lost over executed density as SVG by hand, in the look of tests/bench/plots.py: nothing to install."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 820, 420, 64, 310, 40, 48
# fmt: off
COLOURS = (
    "#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#0a7ea4", "#bf3989", "#57606a", "#bc4c00", "#4d2d00",
    "#000000", "#6cb6ff", "#ff9492", "#57d364", "#e3b341", "#c297ff", "#2ad4c9", "#ff7ae0", "#0a3069", "#8fa300",
)
# fmt: on
# Around (0, 0): a disc, a square, a triangle.
OUTLINES = ("M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0Z", "M-4.5 -4.5H4.5V4.5H-4.5Z", "M0 -6L5.5 4.5H-5.5Z")


@dataclass(frozen=True)
class Point:
    """A row: percent of causal pairs that it executes, points against dense on the items that it has, 95 %."""

    name: str
    items: int
    executed: float
    mean: float
    low: float
    high: float


def scatter(title: str, points: list[Point]) -> str:
    """Rows by number, with their intervals: full at their own default, hollow at a density that was asked for (@)."""
    floor = 5 * int(min((p.low for p in points), default=0.0) / 5 - 1)
    ceiling = 5 * max(1, -int(-max((p.mean for p in points), default=0.0) // 5))

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = x / 100, (y - floor) / (ceiling - floor)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [
        _text(LEFT, 20, title, size=15),
        _text(8, TOP - 8, "points against dense on the same items (so many)", size=11),
    ]
    for value in range(floor, ceiling + 1, 5):
        y = at(0, value)[1]
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{"#57606a" if value == 0 else "#d0d7de"}"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{value:g}", anchor="end"))
    for share in range(0, 101, 20):
        parts.append(_text(at(share, floor)[0], HEIGHT - BOTTOM + 18, f"{share}", anchor="middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(_text(middle, HEIGHT - 8, "executed, % of causal query-key pairs", anchor="middle"))
    bases = list(dict.fromkeys(point.name.partition("@")[0] for point in points))
    for i, point in enumerate(points):
        base, _, asked = point.name.partition("@")
        colour, outline = style(bases.index(base))
        mark = f'{outline} stroke="{colour}" stroke-width="2" fill="{"white" if asked else colour}"'
        x, y = at(point.executed, point.mean)
        ends = [at(point.executed, value)[1] for value in (point.low, min(point.high, ceiling))]
        parts.append(f'<path d="M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}" stroke="{colour}" stroke-opacity=".35"/>')
        title = f"<title>{escape(point.name)}</title>"
        parts.append(f'<path transform="translate({x:.1f} {y:.1f})" {mark}>{title}</path>')
        parts.append(_text(x + 7, y - 5, str(i + 1), size=9))
        # Names beside the plot: points may lie on one another.
        beside = TOP + 18 * i
        parts.append(f'<path transform="translate({WIDTH - RIGHT + 46} {beside})" {mark}/>')
        parts.append(_text(WIDTH - RIGHT + 36, beside + 4, str(i + 1), anchor="end"))
        parts.append(_text(WIDTH - RIGHT + 58, beside + 4, f"{point.name} ({point.items})"))
    body = "\n".join(parts)
    font = 'font-family="sans-serif" font-size="12"'
    height = max(HEIGHT, TOP + 18 * len(points) + 8)
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" {font}>\n{body}\n</svg>\n'


def style(i: int) -> tuple[str, str]:
    """Colour and outline (`d`) of the i-th method's mark: no colour twice in 20 methods, no pair twice in 60."""
    return COLOURS[i % len(COLOURS)], f'd="{OUTLINES[i % len(OUTLINES)]}"'


def stacked(drawings: list[str]) -> str:
    """Drawings one below the other."""
    heights = [int(one.partition('height="')[2].partition('"')[0]) for one in drawings]
    placed = [one.replace("<svg ", f'<svg y="{sum(heights[:i])}" ', 1) for i, one in enumerate(drawings)]
    size = f'width="{WIDTH}" height="{sum(heights)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{"".join(placed)}</svg>\n'


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
