"""What every system offers to the bench."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from problem import Problem
from timing import Runner


class Refused(Exception):
    """The system cannot do the cell; the text says why, and is reported."""


@dataclass(frozen=True)
class Prepared:
    """A runner, and what its answer should be."""

    runner: Runner
    # Bottom-right causal; False = every query attends to the whole context.
    causal: bool = True
    # Lists a request that it reads by; 0 = it reads everything, or chooses by itself.
    lists: int = 0
    # Query tokens that share lists; 0 = the chunk does.
    span: int = 0
    # Its answer is attention over what it was told to read, to rounding; else it may differ by max_rel_err.
    exact: bool = True
    # The call gives no attention (a single stage); the text says what was checked instead.
    unchecked: str = ""
    # What a call returns as [total_q, num_q_heads, d].
    rows: Callable[[torch.Tensor], torch.Tensor] = lambda out: out
    # Share of the context that it read, where it chose by itself; asked after a call.
    density: Callable[[], float | None] = lambda: None


class System(ABC):
    """One implementation of attention, or one way to call it."""

    name: str
    # Reads the paged pool; else contiguous K and V, whatever the cell's page size.
    paged: bool = True
    # Reads the whole context, whatever share of it the cell's lists read: answers once a shape and page size.
    reads_all: bool = False

    @abstractmethod
    def missing(self) -> str | None:
        """Why it cannot run on this machine; None if it can."""

    @abstractmethod
    def prepare(self, problem: Problem) -> Prepared:
        """Everything that is no part of the timed call; raises Refused for a cell it cannot do."""
