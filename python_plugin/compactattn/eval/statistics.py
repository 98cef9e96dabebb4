"""Statistics of paired outcomes: exact McNemar, bootstrap intervals over contexts. Plain enough to check by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb

import numpy as np

RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """A mean and where 95 % of its bootstrap means lie."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.4g} [{self.low:+.4g}, {self.high:+.4g}]"


def mcnemar(lost: int, won: int) -> float:
    """Two-sided exact p that ``lost`` and ``won`` discordant pairs come from a fair coin; 1 where there are none.

    ``lost``: right under dense and wrong here; ``won``: the other way round. Pairs that agree say nothing.
    """
    pairs = lost + won
    tail = sum(comb(pairs, k) for k in range(min(lost, won) + 1))
    # Whole numbers: a float holds no 2^1024.
    p: float = 2 * tail / 2**pairs
    return min(1.0, p)


def paired_interval(
    differences: Sequence[float], contexts: Sequence[object], resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The mean of paired differences and its 95 % percentile interval, whole contexts resampled.

    Items of one context share their prompt and are not independent: they stay together. ``contexts`` names each
    item's.
    """
    sums, counts = _by_context(differences, contexts)
    drawn = _drawn(len(sums), resamples, seed)
    means = (drawn @ sums) / (drawn @ counts)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high))


@lru_cache(maxsize=8)
def _drawn(contexts: int, resamples: int, seed: int) -> np.ndarray:
    """How often each resample has each context, ``[resamples, contexts]``: the same for all rows of a table."""
    even = np.full(contexts, 1 / contexts)
    return np.random.default_rng(seed).multinomial(contexts, even, resamples).astype(float)


def _by_context(values: Sequence[float], contexts: Sequence[object]) -> tuple[np.ndarray, np.ndarray]:
    totals: dict[object, tuple[float, int]] = {}
    for value, context in zip(values, contexts, strict=True):
        total, count = totals.get(context, (0.0, 0))
        totals[context] = total + value, count + 1
    if not totals:
        raise ValueError("no items: nothing to take a mean of")
    sums, counts = zip(*totals.values(), strict=True)
    return np.array(sums, float), np.array(counts, float)
