"""Accuracy over executed density as SVG by hand, in the look of tests/bench/plots.py: nothing to install."""

from __future__ import annotations

from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 64, 250, 40, 48
COLOURS = ["#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#0a7ea4", "#bf3989", "#57606a", "#bc4c00", "#4d2d00"]


def scatter(title: str, points: list[tuple[str, float, float]]) -> str:
    """The drawing of ``(method, executed %, accuracy %)``, both axes in percent."""
    floor = 10 * int(min((y for _, _, y in points), default=0.0) / 10)
    floor = min(floor, 90)

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = x / 100, (y - floor) / (100 - floor)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [_text(LEFT, 22, title, size=15), _text(8, TOP - 6, "accuracy %")]
    for i in range(6):
        value = floor + (100 - floor) * i / 5
        y = at(0, value)[1]
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#d0d7de"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{value:g}", anchor="end"))
        parts.append(_text(at(20 * i, floor)[0], HEIGHT - BOTTOM + 18, f"{20 * i}", anchor="middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(_text(middle, HEIGHT - 8, "executed, % of causal query-key pairs", anchor="middle"))
    for i, (name, x, y) in enumerate(points):
        colour, place = COLOURS[i % len(COLOURS)], at(x, y)
        parts.append(f'<circle cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="5" fill="{colour}"/>')
        # Names beside the plot: points may lie on one another.
        beside = TOP + 18 * i
        parts.append(f'<circle cx="{WIDTH - RIGHT + 22}" cy="{beside}" r="5" fill="{colour}"/>')
        parts.append(_text(WIDTH - RIGHT + 38, beside + 4, name))
    body = "\n".join(parts)
    style = 'font-family="sans-serif" font-size="12"'
    height = max(HEIGHT, TOP + 18 * len(points) + 8)
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" {style}>\n{body}\n</svg>\n'


def stacked(drawings: list[str]) -> str:
    """Drawings one below the other."""
    heights = [int(one.partition('height="')[2].partition('"')[0]) for one in drawings]
    placed = [one.replace("<svg ", f'<svg y="{sum(heights[:i])}" ', 1) for i, one in enumerate(drawings)]
    size = f'width="{WIDTH}" height="{sum(heights)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{"".join(placed)}</svg>\n'


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
