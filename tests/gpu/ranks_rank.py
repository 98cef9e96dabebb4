"""One rank's life: steps until the time is up, checks with the other rank on the way, what it saw at the end."""

from __future__ import annotations

import ctypes
import gc
import os
import time
import zlib
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import compactattn
import torch
import torch.distributed as dist
from ranks_engine import CPU, CUDA, MODES, Schedule, Step
from ranks_memory import WANTED, held
from ranks_reference import Wrong
from ranks_site import Site

# Steps from one check with the other rank to the next; from one judged step to the next.
CHECKED = 16
JUDGED = 64
# Of Stats: what no data decides, and so is the same on all ranks; what keys and queries decide.
COMMON = ("calls", "lists", "candidates", "forced", "dense", "refused")
OF_DATA = ("selected", "guarded")


@dataclass(frozen=True)
class Asked:
    """What a rank is told; ``steps`` 0 = as many as there is time for."""

    library: str | None
    device: str
    seconds: float
    steps: int
    seed: int
    duty: float
    # A file that the ranks meet at.
    meeting: str
    spoil: str | None
    # Ranks on whose GPU others are too.
    shared: tuple[int, ...]


@dataclass(frozen=True)
class Level:
    """What a leak would show in.

    ``device_used`` is everybody's on that GPU; in this process ``reserved`` is torch's, ``held`` the library's where a
    driver counts it.
    """

    second: float
    device_used: int
    reserved: int
    held: int | None
    resident: int
    files: int


@dataclass
class Seen:
    """What a rank counted."""

    steps: int = 0
    all_reduces: int = 0
    checks: int = 0
    judged: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MODES, 0))
    # The smallest share of visible KV that a judged chunk's tokens read.
    least_read: float = 1.0
    # Seconds within steps; without --duty those of the host alone.
    busy: float = 0.0
    levels: list[Level] = field(default_factory=list)


class Rank:
    """A rank and its half of the heads; ``progress``: its steps and what it does, for the parent to watch."""

    def __init__(self, rank: int, asked: Asked, progress: Any) -> None:
        self.rank, self.asked, self.progress = rank, asked, progress
        on_cuda = asked.device == "cuda"
        self.device = torch.device("cuda", rank) if on_cuda else torch.device("cpu")
        if on_cuda:
            torch.cuda.set_device(self.device)
        compactattn.load_library(asked.library)
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            init_method=f"file://{asked.meeting}",
            rank=rank,
            world_size=RANKS,
            timeout=timedelta(minutes=5),
            device_id=self.device if on_cuda else None,
        )
        scale = CUDA if on_cuda else CPU
        self.schedule = Schedule(asked.seed, scale)
        self.site = Site(scale, rank, asked.seed, self.device)
        self.seen, self.tables = Seen(), 0
        self.open: list[int] = []
        self.kept: list[tuple[compactattn.Plan | None, torch.Tensor]] = []

    def live(self) -> dict[str, Any]:
        """Steps until the time is up on any rank; raises Wrong."""
        if self.device.type == "cuda":
            self._sees_a_plan()
        self.start = time.monotonic()
        over = False
        while not over:
            self._step()
            last = self.seen.steps == self.asked.steps
            if self.seen.steps % CHECKED == 0 or last:
                over = self._check() or last
                # Not within the check, whose tensors would be in the way.
                self._sample(over)
        dist.destroy_process_group()
        stats = {f"{mode} {layer}": asdict(stats) for (mode, layer), stats in self.site.stats().items()}
        told = asdict(self.schedule.told) | {"num_pages": self.site.scale.num_pages}
        return asdict(self.seen) | {"engine": told, "stats": stats, "seconds": time.monotonic() - self.start}

    def _sees_a_plan(self) -> None:
        """The counting driver, which a shared GPU's rank must have, sees a plan come and go."""
        before = held()
        if before is None:
            if self.rank in self.asked.shared:
                raise Wrong(f"--shared {self.rank}, and nothing judges what the library holds: {WANTED}")
            return
        plan = self.site.plan(MODES[0])
        during = held()
        del plan
        after = held()
        if not before == after < (during or 0):
            raise Wrong(f"a plan came and went, and was counted as {before}, {during}, {after} bytes")

    def _step(self) -> None:
        begun = time.monotonic()
        if self.asked.spoil and self.rank == 1 and self.seen.steps >= SPOILED:
            self._spoil()
        step, seen = self.schedule.step(), self.seen
        self._note(step)
        share = self.site.step(step, seen.steps % JUDGED == 0, self._at)
        if share is not None:
            seen.judged[step.mode] += 1
            seen.least_read = min(seen.least_read, share)
        seen.steps += 1
        seen.all_reduces += self.site.scale.num_layers
        self.progress[0] = seen.steps
        self.progress[1] = BETWEEN
        if self.asked.duty < 1:
            # Only here, and for a neighbour's sake: neither library nor ranks need the host to wait.
            self.site.wait()
        took = time.monotonic() - begun
        seen.busy += took
        if self.asked.duty < 1:
            # The first step waits for kernels to be loaded: an idle rank must not look like a hang.
            time.sleep(min(1.0, took / self.asked.duty - took))

    def _at(self, layer: int, what: int) -> None:
        self.progress[1] = 3 * layer + what

    def _note(self, step: Step) -> None:
        """The schedule so far, as one number."""
        for chunk in step.chunks:
            about = (step.mode, chunk.first, chunk.end, chunk.request.origin)
            self.tables = zlib.crc32(chunk.request.pages, zlib.crc32(repr(about).encode(), self.tables))

    def _spoil(self) -> None:
        if self.asked.spoil == "stall":
            time.sleep(1e6)
        if self.asked.spoil == "files":
            self.open.append(os.dup(0))
        if self.asked.spoil == "memory":
            # The driver that counts has room for 4096 allocations.
            plan = self.site.plan(MODES[0]) if self.seen.steps % 16 == 0 else None
            self.kept.append((plan, torch.ones(1 << 20, device=self.device)))
        self.site.spoil = self.asked.spoil

    def _check(self) -> bool:
        """Whether both ranks have counted and computed the same; true if the time is up on one."""
        self.site.wait()
        over = time.monotonic() - self.start >= self.asked.seconds
        mine = self._facts()
        facts = torch.tensor([over, *mine.values()], dtype=torch.int64, device=self.device)
        both = [torch.zeros_like(facts) for _ in range(RANKS)]
        dist.all_gather(both, facts)
        (over_a, *a), (over_b, *b) = (each.tolist() for each in both)
        self.seen.checks += 1
        self._compare(dict(zip(mine, zip(a, b, strict=True), strict=True)))
        return bool(over_a or over_b)

    def _facts(self) -> dict[str, int]:
        site, last = self.site, self.site.scale.num_layers - 1
        facts = {"schedule and block tables": self.tables}
        digest = site.digest.tolist()
        facts |= {f"sum of layer {layer}": digest[layer] for layer in range(last + 1)}
        facts |= {APART: digest[last + 1], f"output of layer {last}, alike": digest[last + 2]}
        facts |= dict(zip(NEVER, site.bad.tolist(), strict=True))
        for (mode, layer), stats in site.stats().items():
            names = COMMON + OF_DATA if layer == last else COMMON
            facts |= {f"{mode}, layer {layer}: {name}": getattr(stats, name) for name in names}
            facts[f"{mode}, layer {layer}: refused"] = stats.refused
        return facts

    def _compare(self, facts: dict[str, tuple[int, int]]) -> None:
        faults = [f"{name}: {a} and {b}" for name, (a, b) in facts.items() if a != b and name != APART]
        faults += [f"{name}: {max(facts[name])} times" for name in NEVER if any(facts[name])]
        faults += [f"{name}: {a}" for name, (a, b) in facts.items() if name.endswith("refused") and a]
        faults += [f"layer {layer}: {calls} calls" for layer, calls in self._calls() if calls not in self._counted()]
        if facts[APART][0] == facts[APART][1]:
            faults.append("the ranks' own data are the same: nothing was compared")
        if faults:
            raise Wrong("; ".join(faults[:8]))

    def _calls(self) -> list[tuple[int, int]]:
        """Of each layer, in both modes."""
        stats = self.site.stats()
        return [(i, sum(stats[mode, i].calls for mode in MODES)) for i in range(self.site.scale.num_layers)]

    def _counted(self) -> range:
        """How many there may be: one a step; on CUDA the stages of a judged step count as another."""
        return range(self.seen.steps, self.seen.steps + sum(self.seen.judged.values()) + 1)

    def _sample(self, over: bool) -> None:
        """What memory is in use, once in a while and at the end."""
        second, levels = time.monotonic() - self.start, self.seen.levels
        if levels and not over and not self._due(second - levels[-1].second):
            return
        gc.collect()
        # What the C library and torch keep of freed memory is no leak.
        LIBC.malloc_trim(0)
        used = reserved = 0
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info()
            used, reserved = total - free, torch.cuda.memory_reserved()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
        files = len(list(Path("/proc/self/fd").iterdir()))
        levels.append(Level(second, used, reserved, held() if used else None, resident, files))

    def _due(self, seconds: float) -> bool:
        """Whether it is time for another sample: so long after the last one, or by steps where they are given."""
        steps, now = self.asked.steps, self.seen.steps
        return (
            now * LEVELS // steps > (now - CHECKED) * LEVELS // steps
            if steps
            else seconds >= self.asked.seconds / LEVELS
        )


RANKS = 2
# Facts that must differ between ranks; that must be 0.
APART = "output of layer 0, apart"
NEVER = ("not finite", "a sum that is not twice the output of ranks that are alike")
# In ``progress``: not within a step.
BETWEEN = -1
# Samples of memory in a run; the step from which on a spoilt run is spoilt.
LEVELS = 60
SPOILED = 20
LIBC = ctypes.CDLL(None)
