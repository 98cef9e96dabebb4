"""Two tensor-parallel ranks for minutes: an engine's life in miniature, an all-reduce after each layer; two GPUs.

    python3 tests/gpu/ranks.py --library L --seconds 600 [--seed N] [--duty 0.3] [--shared 0] [--json FILE]
    python3 tests/gpu/ranks.py --device cpu --seconds 10        # gloo and the CPU context, in miniature

Each rank has half of the heads and its own keys, values and queries, in the last layer the other's; both draw one
schedule from the seed (ranks_engine.py). Every 16 steps they compare their counters and digests, every 64 steps tokens
of one layer are held against plain attention in float64 over what their lists name. ``--duty``: the share of the time
that GPUs are busy. ``--shared RANK``: somebody else uses that rank's GPU too, whose free memory then says nothing; what
torch and the library hold there is judged all the same, the latter by a driver that counts (ranks_memory.py) and must
be there. Exit code 1 if the ranks disagree, an answer is wrong, memory grows, or a rank makes no step for 60 s.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from ranks_engine import SPOILS  # noqa: E402
from ranks_report import Report, say, verdict  # noqa: E402


def main() -> int:
    """Exit code."""
    given = arguments()
    if given.library:
        # The package of this tree, with that library; else the installed one.
        sys.path.insert(0, str(ROOT / "python_plugin"))
        given.library = str(Path(given.library).absolute())
    with tempfile.TemporaryDirectory() as folder:
        reports, faults, steps = watch(given, str(Path(folder) / "meeting"))
    if not faults:
        faults = verdict(given, reports)
    found = {
        "faults": faults,
        "machine": machine(given),
        "repeat": repeat(given, steps + bool(faults)),
        "ranks": reports,
    }
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    say(found)
    return 1 if faults else 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--library")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--steps", type=int, default=0, help="at most so many; 0 = as many as there is time for")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--duty", type=float, default=1.0)
    parser.add_argument("--shared", type=int, action="append", default=[], metavar="RANK")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--hang", type=float, default=60, help="seconds without a step that are a hang")
    parser.add_argument("--spoil", choices=SPOILS, help="does wrong on rank 1, to see it found (ranks_engine.py)")
    return parser.parse_args()


@dataclass
class Child:
    """A rank's process, as the parent sees it."""

    process: BaseProcess
    pipe: Connection
    # Steps; and what it does: 3 * layer + 0 to 2, -1 between steps.
    progress: Any
    steps: int = -1
    since: float = field(default_factory=time.monotonic)

    def still(self) -> float:
        """Seconds since its last step."""
        if self.progress[0] != self.steps:
            self.steps, self.since = self.progress[0], time.monotonic()
        return time.monotonic() - self.since

    def where(self) -> str:
        """What it is at."""
        layer, what = divmod(self.progress[1], 3)
        part = ("attention", "all-reduce", "reference")[what]
        return f"{self.progress[0]} steps launched, " + (
            f"in layer {layer}'s {part}" if layer >= 0 else "between steps"
        )


def watch(given: argparse.Namespace, meeting: str) -> tuple[list[Report], list[str], int]:
    """Starts the ranks and hears them out: reports in order; what went wrong, after which all are ended; steps."""
    from ranks_rank import RANKS, Asked

    fixed = (given.library, given.device, given.seconds, given.steps, given.seed, given.duty)
    asked = Asked(*fixed, meeting, given.spoil, tuple(given.shared))
    children = [start(rank, asked) for rank in range(RANKS)]
    reports: dict[int, Report] = {}
    faults: list[str] = []
    begun = told = time.monotonic()
    while len(reports) < RANKS and not faults:
        time.sleep(0.05)
        if time.monotonic() - told > 60:
            told = time.monotonic()
            print(f"{told - begun:.0f} s: {', '.join(child.where() for child in children)}", flush=True)
        for rank, child in enumerate(children):
            if rank not in reports and (report := heard(child)):
                reports[rank] = report
        faults = [f"rank {rank}: {report['fault']}" for rank, report in reports.items() if "fault" in report]
        faults = faults or hung(given, [child for rank, child in enumerate(children) if rank not in reports], children)
    if faults:
        # What the other rank says at once about the same; then it may wait for this one for ever.
        time.sleep(0.5)
        late = {rank: heard(child) for rank, child in enumerate(children) if rank not in reports}
        faults += [f"rank {rank}: {report['fault']}" for rank, report in late.items() if report and "fault" in report]
        # A rank that stops cuts off the other, whose traceback says less, whoever is heard first.
        faults.sort(key=lambda fault: "Traceback" in fault)
    faults = faults or [f"rank {rank}: HANG: reports, and does not end" for rank in left(children, 60)]
    codes = {rank: child.process.exitcode for rank, child in enumerate(children)}
    faults = faults or [f"rank {rank}: reports, and ends with code {code}" for rank, code in codes.items() if code]
    for rank in left(children, 0):
        children[rank].process.kill()
        children[rank].process.join()
    return [reports[rank] for rank in sorted(reports)], faults, max(child.progress[0] for child in children)


def left(children: list[Child], seconds: float) -> list[int]:
    """Ranks that still run after so long."""
    until = time.monotonic() + seconds
    for child in children:
        child.process.join(max(0, until - time.monotonic()))
    return [rank for rank, child in enumerate(children) if child.process.is_alive()]


def start(rank: int, asked: Any) -> Child:
    """A rank in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    progress = context.Array("q", 2, lock=False)
    process = context.Process(target=live, args=(rank, asked, progress, theirs), daemon=True)
    process.start()
    theirs.close()
    return Child(process, ours, progress)


def live(rank: int, asked: Any, progress: Any, pipe: Connection) -> None:
    """A rank's process."""
    # Linux ends it with its parent, whatever ends that.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # Multicast over NVLink is a machine's to allow, and nothing here needs it.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    if asked.library:
        sys.path.insert(0, str(ROOT / "python_plugin"))
    import torch
    from ranks_rank import Rank
    from ranks_reference import Wrong

    torch.set_num_threads(1)
    try:
        pipe.send(Rank(rank, asked, progress).live())
    except Wrong as wrong:
        pipe.send({"fault": f"step {progress[0]}: {wrong}", "steps": progress[0]})
    except Exception:
        pipe.send({"fault": f"step {progress[0]}: {traceback.format_exc()[-3000:]}", "steps": progress[0]})
    pipe.close()
    if torch.distributed.is_initialized():
        # After a fault the other rank may be within a collective: no destructor here shall wait for it.
        sys.stdout.flush()
        os._exit(1)


def heard(child: Child) -> Report | None:
    """A rank's report, if there is one."""
    try:
        if child.pipe.poll():
            report: Report = child.pipe.recv()
            return report
    except EOFError:
        child.process.join(5)
        return {"fault": f"ended with code {child.process.exitcode}, {child.where()}", "steps": child.progress[0]}
    return None


def hung(given: argparse.Namespace, waited: list[Child], children: list[Child]) -> list[str]:
    """One line a rank if one has made no step for too long; starting up may take longer."""
    limits = [given.hang if child.progress[0] > 0 else max(given.hang, START_SECONDS) for child in waited]
    if not any(child.still() > limit for child, limit in zip(waited, limits, strict=True)):
        return []
    return [f"rank {r}: HANG: no step for {c.still():.0f} s; {c.where()}" for r, c in enumerate(children)]


def machine(given: argparse.Namespace) -> list[str]:
    """What it ran on."""
    import compactattn
    import torch

    compactattn.load_library(given.library)
    lines = [f"torch {torch.__version__}", compactattn.build_info()]
    if given.device == "cuda":
        lines[0] += f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines() + lines
    return lines


def repeat(given: argparse.Namespace, steps: int) -> str:
    """The command that does the same steps again."""
    line = f"python3 tests/gpu/ranks.py --seed {given.seed} --seconds 100000 --steps {steps} --device {given.device}"
    line += f" --library {Path(given.library).name}" if given.library else ""
    return line + (f" --spoil {given.spoil}" if given.spoil else "")


# For imports, contexts, kernels and NCCL.
START_SECONDS = 240
PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    sys.exit(main())
