"""What each method's lists miss, layer by layer, where dense attention is the model: captured mass and output error.

Every method meets the same queries and the same KV. Captured mass is exp(lse - dense lse): the share of the softmax
that the blocks read hold; output error is |out - dense out| / |dense out|, squares summed over tokens and heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch  # type: ignore[import-not-found, unused-ignore]

from ..batch import Batch
from ..settings import Settings
from .engine import Probe
from .folder import Record, rounded
from .methods import Method, log_odds, odds_value
from .model import Subject
from .prefill import Limits, Prefill, Work, work_of
from .tasks import Context


@dataclass(frozen=True)
class _Call:
    """One layer of one chunk, as dense attention has answered it; the KV is in the pool."""

    layer: int
    batch: Batch
    scaling: float
    out: Any
    lse: Any


class Sample:
    """A dense prefill of some contexts, of which every EVERY-th chunk that is long enough to be sparse is kept.

    It lives in the engine's pool: until that is used for something else.
    """

    def __init__(self, subject: Subject, contexts: list[Context], limits: Limits) -> None:
        self._engine, self._contexts, self._limits = subject.engine, contexts, limits
        self._layers = subject.model.config.num_hidden_layers
        self._calls: list[_Call] = []
        longest = max(len(one.ids) for one in contexts)
        chunks = range(0, longest - limits.chunk + 1, limits.chunk)
        sparse = [first for first in chunks if first and first + limits.chunk >= limits.dense_below]
        if not sparse:
            raise ValueError(f"no chunk of {limits.chunk} of {longest} tokens is long enough to be sparse")
        # The last ones are as long as prompts come.
        kept = set(sparse[::-1][::EVERY])

        def of_chunk(first: int) -> Probe | None:
            return self._keep if first in kept else None

        Prefill(subject, contexts, Settings.of("dense"), limits).contexts(of_chunk)

    def density(self, settings: Settings) -> float:
        """The share of past blocks that the settings read."""
        found = self._work(settings, lambda: [self._run(call, settings) for call in self._calls])
        return 1.0 if found.density is None else found.density

    def line(self, row: Method) -> Record:
        """Density, executed share of the whole contexts, and of each layer ``mass`` and ``error``."""
        # Of each layer: squares of the difference, of dense attention's output; mass; how often it was looked at.
        sums = torch.zeros((self._layers, 4), dtype=torch.float64, device=self._engine.device)

        def look() -> None:
            for call in self._calls:
                self._add(sums[call.layer], call, row.settings)

        work = self._work(row.settings, look)
        numbers = {"density": work.density, "executed": work.executed, "keep_value": row.settings.keep_value}
        difference, whole, mass, times = sums.cpu().unbind(1)
        layers = {"error": (difference / whole).sqrt(), "mass": mass / times}
        told = {"method": row.name, "contexts": len(self._contexts), "mean_correction": row.settings.mean_correction}
        found = told | {n: rounded(x) for n, x in numbers.items()}
        return found | {name: [rounded(x) for x in values.tolist()] for name, values in layers.items()}

    def _keep(self, *told: Any) -> None:
        self._calls.append(_Call(*told))

    def _work(self, settings: Settings, look: Callable[[], object]) -> Work:
        settings = self._limited(settings)
        before = self._engine.stats(settings)
        look()
        work = work_of(self._contexts, settings, self._limits)
        # The chunks kept are whole ones: what they have to choose from is as their pairs.
        work.read(before, self._engine.stats(settings))
        return work

    def _add(self, sums: Any, call: _Call, settings: Settings) -> None:
        out, lse = self._run(call, settings)
        difference = (out.float() - call.out.float()).square().sum(dtype=torch.float64)
        whole = call.out.float().square().sum(dtype=torch.float64)
        if settings.mean_correction:
            # The means' own part is in that lse; the lists are the same without it.
            _, lse = self._run(call, settings.replace(mean_correction=False))
        mass = (lse - call.lse).clamp(max=0).exp().mean(dtype=torch.float64)
        sums += torch.stack([difference, whole, mass, torch.ones_like(mass)])

    def _run(self, call: _Call, settings: Settings) -> tuple[Any, Any]:
        out, lse = torch.empty_like(call.out), torch.empty_like(call.lse)
        self._engine.forward(call.batch, self._limited(settings), call.scaling, out, lse, layer=call.layer)
        return out, lse

    def _limited(self, settings: Settings) -> Settings:
        return settings.replace(dense_below_kv_len=self._limits.dense_below)


def rungs(method: Method) -> Iterator[Method]:
    """The method at several numbers of its keep rule, without floor, cap and guard: a curve of error over density."""
    odds, rises = log_odds(method.settings.keep_value), -1 if method.settings.keep == "threshold" else 1
    for i, step in enumerate(_STEPS):
        yield replace(method.at(odds_value(odds + rises * step), 0.0), name=f"{method.name}~{i}")


# Of chunks, those kept.
EVERY = 3
# In log-odds of the keep rule's number, towards reading more.
_STEPS = (2.0, 1.0, 0.0, -0.75, -1.5, -2.5, -3.5)
