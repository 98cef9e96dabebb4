"""Greedy decoding of many sequences at once, dense; on a GPU one step is a CUDA graph, as a small model is launches."""

from __future__ import annotations

import sys
from typing import Any

import torch  # type: ignore[import-not-found, unused-ignore]

from ..settings import Settings
from .engine import Engine
from .pool import PAGE, Sequence, Step

# Steps between looks at what was said: each look waits for the device.
_LOOK = 8


def greedy(engine: Engine, sequences: list[Sequence], tokens: list[int], steps: list[int]) -> list[list[int]]:
    """What each sequence says behind its token, at least as many as its ``steps`` or up to an end of text.

    The sequences' pages have room for the most steps and two tokens more.
    """
    step = Step.of([(one, [token]) for one, token in zip(sequences, tokens, strict=True)], engine.device)
    loop = engine.loops.get(key := tuple(step.table.shape))
    if loop is None:
        loop = engine.loops[key] = _Loop(engine, step)
    else:
        loop.load(step)
    ends = ends_of(engine.model)
    said: list[list[int]] = [[] for _ in sequences]
    while not all(_done(one, want, ends) for one, want in zip(said, steps, strict=True)):
        some = [loop.next() for _ in range(min(_LOOK, max(steps) - len(said[0])))]
        for one, more in zip(said, torch.stack(some, 1).tolist(), strict=True):
            one += more
    return said


def ends_of(model: Any) -> set[int]:
    """The tokens that end a text."""
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}


def _done(said: list[int], want: int, ends: set[int]) -> bool:
    return len(said) >= want or any(token in ends for token in said)


class _Loop:
    """A decode step over tensors that stay where they are, moved on by itself."""

    def __init__(self, engine: Engine, step: Step) -> None:
        self._engine, self._step, self._best = engine, step, step.ids[0].clone()
        self._dense, self._graph, self._loads = Settings.of("dense"), None, 0

    def load(self, step: Step) -> None:
        """Begins anew with another step of the same shape."""
        for name, mine in vars(self._step).items():
            if name != "spans":
                mine.copy_(getattr(step, name))
        self._loads += 1
        if self._loads == 1 and self._engine.device.type == "cuda":
            self._capture()

    def next(self) -> Any:
        """The likeliest token of each sequence, ``[num_reqs]``; the step is then the one behind it."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._once()
        return self._best.clone()

    def _once(self) -> None:
        step = self._step
        self._best.copy_(self._engine.run(step, self._dense).argmax(-1))
        step.ids[0].copy_(self._best)
        step.positions.add_(1)
        step.seq_lens.add_(1)
        pages = step.table.gather(1, (step.positions[0] // PAGE)[:, None])[:, 0]
        step.slots.copy_(pages.long() * PAGE + step.positions[0] % PAGE)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                self._once()
            self._graph = graph
        except RuntimeError as error:
            # Slower, and the same: some models look at their positions on the host.
            print(f"decode is not captured: {error}", file=sys.stderr)
