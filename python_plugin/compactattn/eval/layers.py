"""Tables of what was probed: captured mass and output error of each layer, and density at equal output error."""

from __future__ import annotations

import csv
import math
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from .folder import Record

# Whose curve, against whose rows.
OURS, FAITHFUL = "default", "flashprefill-union"
# The same lists, with what is not read answered for by its mean.
OURS_WITH_MEANS = "sampled_exact-head-mean"


def tables(probes: list[Record], length: int) -> list[str]:
    """Markdown lines of one length."""
    own = [line for line in probes if line["length"] == length]
    if not own:
        return []
    told = f"{own[0]['contexts']} contexts that are no items; every method on dense attention's own queries and KV"
    lines = [f"## {length} tokens, lists and layers", "", f"{told}. Rows `~`: a method's rule at other numbers.", ""]
    lines += [*_HEAD, *(_line(line) for line in own), ""]
    equal = [_equal_line(at, line) for line in own if _family(line) == FAITHFUL and (at := ours_at(own, line["error"]))]
    if equal:
        lines += [f"`{OURS}`'s curve at the output error of `{FAITHFUL}`'s rows, interpolated:", ""]
        lines += [*_EQUAL_HEAD, *equal, ""]
    shares = [_share_line(line, share) for line in own if (share := share_of_union(own, line)) is not None]
    if shares:
        lines += [f"Pages for the same output error, of those that `{FAITHFUL}`'s curve reads there:", ""]
        lines += [*_SHARE_HEAD, *shares, ""]
    return lines


def share_of_union(probes: list[Record], line: Record) -> float | None:
    """A row's density over the one at which the curve of FAITHFUL has its output error; None outside of the curve.

    None for FAITHFUL's own rows and for points of curves too. Density is taken as linear in the error between points.
    """
    if _family(line) == FAITHFUL or "~" in line["method"]:
        return None
    error = mean_error(line["error"])
    for (low, from_density, _), (high, to_density, _) in pairwise(_curve(probes, FAITHFUL)):
        if low <= error <= high and low < high:
            theirs = from_density + (error - low) / (high - low) * (to_density - from_density)
            return float(line["density"] / theirs)
    return None


def ours_at(probes: list[Record], errors: list[float]) -> tuple[float, float] | None:
    """(density, executed) where the curve of OURS has that output error; None outside of the curve."""
    error = mean_error(errors)
    for (low, *at_low), (high, *at_high) in pairwise(_curve(probes, OURS)):
        if 0 < low <= error <= high and low < high:
            share = math.log(error / low) / math.log(high / low)
            density, executed = (a + share * (b - a) for a, b in zip(at_low, at_high, strict=True))
            return density, executed
    return None


def mean_error(errors: list[float]) -> float:
    """Over layers."""
    return fmean(errors)


def write(probes: list[Record], path: Path) -> None:
    """A line a layer: ``length, method, density, executed, layer, mass, error``."""
    head = ("length", "method", "density", "executed")
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*head, "layer", "mass", "error"])
        for line in probes:
            for layer, pair in enumerate(zip(line["mass"], line["error"], strict=True)):
                writer.writerow([*(line[name] for name in head), layer, *pair])


def _line(line: Record) -> str:
    mass, error = line["mass"], line["error"]
    low, high = mass.index(min(mass)), error.index(max(error))
    cells = [line["method"], f"{line['keep_value']:.5g}", f"{line['density']:.3f}", f"{line['executed']:.3f}"]
    cells += [
        f"{fmean(mass):.4f}",
        f"{mass[low]:.4f} ({low})",
        f"{mean_error(error):.4f}",
        f"{error[high]:.4f} ({high})",
    ]
    return f"| {' | '.join(cells)} |"


def _curve(probes: list[Record], method: str) -> list[tuple[float, float, float]]:
    """(output error, density, executed) of the method's rule at other numbers, by error."""
    free = [line for line in probes if line["method"].startswith(f"{method}~")]
    return sorted((mean_error(line["error"]), line["density"], line["executed"]) for line in free)


def _share_line(line: Record, share: float) -> str:
    mean = "yes" if corrects(line) else ""
    name = f"**{line['method']}**" if line["method"].partition("@")[0] in (OURS, OURS_WITH_MEANS) else line["method"]
    return f"| {name} | {mean} | {mean_error(line['error']):.4f} | {line['density']:.3f} | {share:.2f} |"


def corrects(line: Record) -> bool:
    """Whether the row has mean correction; of folders that did not say so, by its name."""
    name = line["method"].partition("@")[0]
    return bool(line.get("mean_correction", name.endswith("-mean")))


def _equal_line(at: tuple[float, float], line: Record) -> str:
    cells = [line["method"], f"{mean_error(line['error']):.4f}"]
    for name, ours in zip(("density", "executed"), at, strict=True):
        cells.append(f"{ours:.3f} / {line[name]:.3f} = {ours / line[name]:.2f}")
    return f"| {' | '.join(cells)} |"


def _family(line: Record) -> str:
    return str(line["method"]).partition("~")[0].partition("@")[0]


_HEAD = (
    "| method | number of its rule | density | executed | captured mass, mean of layers | lowest (layer) "
    "| output error, mean of layers | worst (layer) |",
    "|---|---|---|---|---|---|---|---|",
)
_EQUAL_HEAD = ("| row | output error | density, ours / its | executed, ours / its |", "|---|---|---|---|")
_SHARE_HEAD = (
    "| row | mean correction | output error | density | of the union's at that error |",
    "|---|---|---|---|---|",
)
