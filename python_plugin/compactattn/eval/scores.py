"""How expected answers fare under a model's logits: likelihood, distance from dense attention, the first miss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch  # type: ignore[import-not-found, unused-ignore]

# Positions at a time: a vocabulary's f32 numbers for each, several times over.
_SLICE = 1024


@dataclass(frozen=True)
class Scores:
    """One answer's: nats a token, mean KL from dense, share of likeliest tokens that differ from dense's."""

    nll: float
    kl: float
    flips: float
    # Where the likeliest token first is another than expected, and which; None: nowhere.
    miss: tuple[int, int] | None


def score(logits: Any, dense: Any, answers: list[tuple[int, ...]]) -> list[Scores]:
    """``logits``, ``dense [positions, vocabulary]``: at the tokens of all ``answers``, one after the other."""
    expected = torch.tensor([token for answer in answers for token in answer], device=logits.device)
    parts = [_of(*some) for some in zip(*(x.split(_SLICE) for x in (logits, dense, expected)), strict=True)]
    nll, kl, flips, best = (torch.cat(part).tolist() for part in zip(*parts, strict=True))
    found, at = [], 0
    for answer in answers:
        here = slice(at, at + len(answer))
        at += len(answer)
        said = [int(token) for token in best[here]]
        miss = next(((i, one) for i, (one, want) in enumerate(zip(said, answer, strict=True)) if one != want), None)
        means = [sum(x[here]) / len(answer) for x in (nll, kl, flips)]
        found.append(Scores(means[0], means[1], means[2], miss))
    return found


def _of(logits: Any, dense: Any, expected: Any) -> tuple[Any, ...]:
    log_p, log_dense = logits.float().log_softmax(-1), dense.float().log_softmax(-1)
    kl = (log_dense.exp() * (log_dense - log_p)).sum(-1)
    best = log_p.argmax(-1)
    nll = -log_p.gather(1, expected[:, None])[:, 0]
    return nll, kl, (best != log_dense.argmax(-1)).float(), best.double()
