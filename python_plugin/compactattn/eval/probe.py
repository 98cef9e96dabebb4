"""What each method's lists miss, layer by layer, where dense attention is the model: captured mass and output error.

Every method meets the same queries and the same KV. Captured mass is exp(lse - dense lse): the share of the softmax
that the blocks read hold; output error is |out - dense out| / |dense out|, squares summed over tokens and heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch  # type: ignore[import-not-found, unused-ignore]

from ..batch import Batch
from ..settings import Settings
from .engine import Engine, Probe
from .folder import Record, rounded
from .methods import Method, log_odds, odds_value
from .model import Subject
from .prefill import NO_ROW, Limits, Prefill, work_of
from .tasks import Context


def probe(subject: Subject, contexts: list[Context], rows: list[Method], limits: Limits, length: int) -> list[Record]:
    """One line a row: density, executed share, and lists of each layer's ``mass`` and ``error``.

    Looks at every EVERY-th chunk that is long enough to be sparse. A row that the device does not serve has no line.
    """
    engine = subject.engine
    rows = [row for row in rows if _served(subject, contexts, row, limits)]
    settings = [row.settings.replace(dense_below_kv_len=limits.dense_below) for row in rows]
    layers = subject.model.config.num_hidden_layers
    looks = [_Look(engine, one, layers) for one in dict.fromkeys(settings)]
    before = {look.settings: engine.stats(look.settings) for look in looks}
    chunks = [first for first in range(0, max(len(one.ids) for one in contexts), limits.chunk)]
    sparse = [first for first in chunks if first + limits.chunk >= limits.dense_below and first]
    # The last ones are as long as prompts come.
    wanted = set(sparse[::-1][::EVERY])

    def of_chunk(first: int) -> Probe | None:
        return (lambda *told: [look.at(*told) for look in looks]) if first in wanted else None

    Prefill(subject, contexts, Settings.of("dense"), limits).contexts(of_chunk)
    lines = []
    for row, one in zip(rows, settings, strict=True):
        look = next(look for look in looks if look.settings == one)
        stats, old = engine.stats(one), before[one]
        work = work_of(contexts, one, limits)
        work.selected, work.candidates = stats.selected - old.selected, stats.candidates - old.candidates
        numbers = {"density": work.density, "executed": work.executed, "keep_value": row.settings.keep_value}
        head = {"length": length, "method": row.name, "contexts": len(contexts)}
        lines.append(head | {name: rounded(value) for name, value in numbers.items()} | look.found())
    return lines


def rungs(method: Method) -> list[Method]:
    """The method at several numbers of its keep rule, without floor, cap and guard: a curve of error over density."""
    odds, rises = log_odds(method.settings.keep_value), -1 if method.settings.keep == "threshold" else 1
    values = [odds_value(odds + rises * step) for step in _STEPS]
    found = [method.at(value, 0.0) for value in values]
    return [replace(one, name=f"{method.name}~{i}") for i, one in enumerate(found)]


class _Look:
    """One settings' sums over the chunks that were looked at."""

    def __init__(self, engine: Engine, settings: Settings, layers: int) -> None:
        self._engine, self.settings = engine, settings
        # Of each layer: squares of the difference, of dense attention's output; mass; how often it was looked at.
        self._sums = torch.zeros((layers, 4), dtype=torch.float64, device=engine.device)

    def at(self, layer: int, batch: Batch, scaling: float, dense: Any, dense_lse: Any) -> None:
        """Adds a layer of a chunk."""
        out, lse = torch.empty_like(dense), torch.empty_like(dense_lse)
        self._engine.forward(batch, self.settings, scaling, out, lse)
        difference = (out.float() - dense.float()).square().sum(dtype=torch.float64)
        whole = dense.float().square().sum(dtype=torch.float64)
        if self.settings.mean_correction:
            # The means' own part is in that lse; the lists are the same without it.
            plain = self.settings.replace(mean_correction=False)
            self._engine.forward(batch, plain, scaling, out, lse)
        mass = (lse - dense_lse).clamp(max=0).exp().mean(dtype=torch.float64)
        self._sums[layer] += torch.stack([difference, whole, mass, torch.ones_like(mass)])

    def found(self) -> Record:
        """``error`` and ``mass``, a number a layer."""
        difference, whole, mass, times = self._sums.cpu().unbind(1)
        error = (difference / whole).sqrt().tolist()
        return {"error": [rounded(x) for x in error], "mass": [rounded(x) for x in (mass / times).tolist()]}


def _served(subject: Subject, contexts: list[Context], row: Method, limits: Limits) -> bool:
    if row.missing:
        return False
    try:
        # The shortest prefill that selects.
        some = [replace(contexts[0], ids=contexts[0].ids[: limits.dense_below + 2 * limits.chunk])]
        Prefill(subject, some, row.settings, limits).contexts()
    except NO_ROW:
        return False
    return True


# Of chunks, those looked at.
EVERY = 3
# In log-odds of the keep rule's number, towards reading more.
_STEPS = (2.0, 1.0, 0.0, -0.75, -1.5, -2.5, -3.5)
