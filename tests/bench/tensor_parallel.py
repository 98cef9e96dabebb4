"""Tensor parallelism for timings: one process a GPU, what they sum and agree on, and an end of all when one fails.

`launch` starts the processes and watches them; each finds itself by `Group.from_env`. A Group of one does nothing.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch
from torch import distributed

# A rank that waits longer than this for another gives up.
HANG_SECONDS = 90.0
# Between SIGTERM and SIGKILL.
GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Group:
    """One process among those that share a layer's heads."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @classmethod
    def from_env(cls, backend: str = "nccl") -> Group:
        """As `launch` has set it; a group of one without."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        rank = int(os.environ["RANK"])
        device = f"cuda:{rank}" if backend == "nccl" else "cpu"
        if backend == "nccl":
            torch.cuda.set_device(rank)
        distributed.init_process_group(backend, timeout=timedelta(seconds=HANG_SECONDS))
        return cls(rank, size, device)

    def barrier(self) -> None:
        """Returns when every rank has come here and its device has nothing left to do."""
        if self.size > 1:
            self.rows([0.0])

    def sum(self, partial: torch.Tensor) -> None:
        """In place, over ranks: what follows a projection whose inputs the ranks share."""
        if self.size > 1:
            distributed.all_reduce(partial)

    def rows(self, numbers: Sequence[float]) -> list[list[float]]:
        """Everybody's numbers, by rank."""
        own = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        if self.size == 1:
            return [own.tolist()]
        rows = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(rows, own)
        return [row.tolist() for row in rows]

    def any(self, mine: bool) -> bool:
        """Whether it holds for a rank: for decisions that all must take alike."""
        return any(row[0] > 0 for row in self.rows([float(mine)]))

    def close(self) -> None:
        """Leaves, together: who tears down first breaks the others' last sum."""
        if self.size > 1:
            self.barrier()
            distributed.destroy_process_group()


def launch(command: Sequence[str], count: int, limit_s: float) -> str:
    """Runs `count` of them, numbered in the environment; returns what went wrong, "" for nothing.

    When a rank ends with another status than 0, or all take longer than `limit_s`, the others are ended too.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    signal.signal(signal.SIGTERM, _leave)
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            ranks.append(subprocess.Popen(command, env={**os.environ, **common, "RANK": str(rank)}))
        return _watch(ranks, time.monotonic() + limit_s, limit_s)
    finally:
        _end(ranks)


def _watch(ranks: list[subprocess.Popen[bytes]], until: float, limit_s: float) -> str:
    while True:
        states = [rank.poll() for rank in ranks]
        for rank, state in enumerate(states):
            if state:
                return f"rank {rank} ended with status {state}: all were ended"
        if all(state == 0 for state in states):
            return ""
        if time.monotonic() > until:
            late = [rank for rank, state in enumerate(states) if state is None]
            return f"ranks {late} were still running after {limit_s:.0f} s: all were ended"
        time.sleep(0.1)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    until = time.monotonic() + GRACE_SECONDS
    for rank in ranks:
        try:
            rank.wait(max(until - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def _leave(number: int, _frame: FrameType | None) -> None:
    # Through `finally`, so that no rank is left behind.
    sys.exit(128 + number)
