"""The methods that are compared, as settings; and the bisection that gives two of them the same density."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace

from ..settings import Settings


@dataclass(frozen=True)
class Method:
    """A row of the tables: its name and its settings; ``missing`` says why it cannot be run at all."""

    name: str
    settings: Settings
    missing: str | None = None

    def at(self, keep_value: float, target: float) -> Method:
        """The same method asked for a density: its own rule with another number, no floor, no cap, no guard."""
        free = {"keep_value": keep_value, "min_density": 0.0, "max_density": 1.0, "density_guard": 1.0}
        return replace(self, name=f"{self.name}@{target:g}", settings=self.settings.replace(**free))


def methods(wanted: Iterable[str] = (), gates: bool = False) -> dict[str, Method]:
    """All of them, each as it is published or, for ours, shipped. Needs the native library. ``gates``: there are some.

    And those of ``wanted`` that change another's settings: ``default:query_span=512+sample_rows=64``. ValueError for a
    setting that there is not.
    """
    ours = Settings.mode("compactattn")
    paper, by_span = Settings.mode("paper"), Settings.mode("block_sparse")
    table = {
        "dense": Settings.of("dense"),
        # sampled_exact, a list per query head and chunk.
        "default": ours,
        "flashprefill-union": paper,
        "flashprefill-block_sparse": by_span,
        "xattention": Settings.of("xattention"),
        "xattention-union": Settings.of("xattention").replace(heads_per_list=0),
        "quoka": Settings.of("quoka"),
        "streaming": Settings.of("streaming"),
        "oracle": Settings.of("oracle"),
        "oracle-group": Settings.of("oracle").replace(heads_per_list=0),
        "two_level": Settings.of("two_level"),
        "two_level-group": Settings.of("two_level").replace(heads_per_list=0),
    }
    for selector in ("sampled_exact", "pooled_mass"):
        for scope, heads in (("head", 1), ("group", 0)):
            for suffix, correction in (("", False), ("-mean", True)):
                settings = Settings.of(selector).replace(heads_per_list=heads, mean_correction=correction)
                table[f"{selector}-{scope}{suffix}"] = settings
    found = {name: Method(name, settings) for name, settings in table.items()}
    reason = None if gates else "its gates are weights of a model, and --gates named none"
    found["attn_gate"] = Method("attn_gate", Settings.of("attn_gate"), reason)
    for name in wanted:
        base, _, changes = name.partition(":")
        if changes and base in found:
            found[name] = replace(found[base], name=name, settings=_changed(found[base].settings, changes))
    return found


def _changed(settings: Settings, changes: str) -> Settings:
    types = {field.name: field.type for field in fields(Settings)}
    readers: dict[str, Callable[[str], object]] = {"int": int, "float": float, "bool": _truth}
    values: dict[str, object] = {}
    for change in changes.split("+"):
        name, _, text = change.partition("=")
        if name not in types:
            raise ValueError(f"{change}: wanted NAME=VALUE of {', '.join(types)}")
        values[name] = readers.get(str(types[name]), str)(text)
    return settings.replace(**values)


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"{text}: wanted true or false")
    return text == "true"


def find_keep_value(
    method: Method, target: float, density_at: Callable[[float], float], probes: int = 10
) -> tuple[float, float]:
    """The number of the method's keep rule whose density is nearest to ``target``, and that density.

    Searches in the log-odds of the number, from the method's own: densities fall with a threshold and rise with a mass
    or a share. Steps out until the target lies between two, then interpolates; ends within 3 % of the target.
    """
    rises = -1 if method.settings.keep == "threshold" else 1
    odds = log_odds(method.settings.keep_value)
    below: tuple[float, float] | None = None
    above: tuple[float, float] | None = None
    best = (math.inf, 0.0, 0.0)
    for _ in range(probes):
        value = odds_value(odds)
        density = density_at(value)
        gap = math.log(max(density, 1e-6) / target)
        best = min(best, (abs(gap), value, density))
        if abs(gap) <= 0.03:
            break
        if gap < 0:
            below = (odds, gap)
        else:
            above = (odds, gap)
        if below and above:
            # Never nearer to an end than an eighth: a curve would be crept along.
            share = min(0.875, max(0.125, below[1] / (below[1] - above[1])))
            odds = below[0] + share * (above[0] - below[0])
        else:
            further = _clamp(odds + rises * math.copysign(_STEP, -gap))
            if further == odds:
                break
            odds = further
    return best[1], best[2]


def log_odds(value: float) -> float:
    """Of a number in (0, 1], as far as it is searched."""
    return _clamp(math.log(value / (1 - value))) if value < 1 else _ODDS


def odds_value(odds: float) -> float:
    """The number of these log-odds."""
    return 1 / (1 + math.exp(-_clamp(odds)))


def _clamp(odds: float) -> float:
    return max(-_ODDS, min(_ODDS, odds))


# Numbers from 0.0001 to 0.9999.
_ODDS = 9.2
_STEP = 1.5
