"""Time to first token, and between the tokens of others: vLLM with the backend against vLLM's own FlashAttention 3.

    python tests/vllm/gpu_times.py --out DIR [--ttft] [--itl] [--lengths 8192,...] [--graphs] [--one]

Two engines in one process, Llama-3.1-8B's shapes with random weights, systems in random turn, prompts of random tokens.
Random weights have no structure that selection could find, so densities are asked for: ``default`` is what the default
settings come to (their cap), the others are budgets. ``nothing`` leaves attention out: no backend could be faster.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_engine import Engines, choose, scheduler

STREAMS = 8


@dataclass
class Bench:
    """Both engines, what was measured, and how much time is left."""

    # None: the engine with the backend is both, and splits no step where it is `engine`.
    stock: Any
    ours: Any
    engines: Engines
    until: float
    systems: list[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    seed: int = 1000

    def prompt(self, count: int) -> Any:
        """One that no engine has seen."""
        self.seed += 1
        return self.engines.prompt(self.seed, count)

    def ttft(self, llm: Any, count: int) -> float:
        """Milliseconds from handing a prompt over to its first token."""
        prompt = self.prompt(count)
        start = time.perf_counter()
        self.add(llm, "long", prompt, 1)
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
        return (time.perf_counter() - start) * 1e3

    def add(self, llm: Any, name: str, prompt: Any, tokens: int) -> None:
        """A greedy request."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        llm.llm_engine.add_request(name, prompt, params)

    def between(self, llm: Any, count: int) -> tuple[list[float], float]:
        """Milliseconds between tokens of streams that decode while a prompt of ``count`` prefills; its own first."""
        endless = 300 if self.engines.cpu else 30_000
        for i in range(STREAMS):
            self.add(llm, f"stream{i}", self.prompt(self.engines.tokens(1024)), endless)
        told = dict.fromkeys((f"stream{i}" for i in range(STREAMS)), 0)
        while min(told.values()) < 10:
            told |= {out.request_id: len(out.outputs[0].token_ids) for out in llm.llm_engine.step()}
        self.add(llm, "long", self.prompt(count), 1)
        start = time.perf_counter()
        last: dict[str, float] = {}
        gaps: list[float] = []
        first = None
        while first is None:
            if self.late:
                raise TimeoutError("the long prompt was not served in time")
            outputs = llm.llm_engine.step()
            now = time.perf_counter()
            for out in outputs:
                if out.request_id == "long":
                    first = (now - start) * 1e3
                elif out.request_id in last:
                    gaps.append((now - last[out.request_id]) * 1e3)
                last[out.request_id] = now
        llm.llm_engine.abort_request(list(told))
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
        return gaps, first

    @contextlib.contextmanager
    def system(self, name: str) -> Iterator[Any]:
        """The engine that a system runs on, set up for it; then what it selected goes to ``self.density``."""
        if self.stock is not None and name == "engine":
            self.density = None
            yield self.stock
            return
        before = choose(name)
        try:
            yield self.ours
        finally:
            after = choose("default")
        candidates = after[1] - before[1]
        self.density = (after[0] - before[0]) / candidates if candidates else None

    def note(self, what: str, count: int, budget: int, name: str, **numbers: Any) -> None:
        """One measurement."""
        row = {"what": what, "tokens": count, "budget": budget, "system": name, "density": self.density} | numbers
        self.rows.append(row)
        texts = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
        print(" ".join(f"{key}={text}" for key, text in texts.items()))
        sys.stdout.flush()

    def set_budget(self, budget: int) -> int:
        """Tokens of a step, in both engines, which were made for the largest."""
        for llm in filter(None, (self.stock, self.ours)):
            scheduler(llm).max_num_scheduled_tokens = self.engines.tokens(budget)
        return self.engines.tokens(budget)

    @property
    def late(self) -> bool:
        """Whether what is left of the time is for the summary."""
        return time.perf_counter() > self.until


def first_tokens(bench: Bench, lengths: list[int], budget: int, rounds: int) -> None:
    """TTFT of every length by every system, in random turn."""
    turns, used = random.Random(0), bench.set_budget(budget)
    for system in bench.systems:
        with bench.system(system) as llm:
            bench.ttft(llm, bench.engines.tokens(20000))
    for number in range(rounds):
        for count in lengths:
            systems = [name for name in bench.systems if number == 0 or name != "nothing"]
            for system in turns.sample(systems, len(systems)):
                if bench.late:
                    return
                with bench.system(system) as llm:
                    took = bench.ttft(llm, bench.engines.tokens(count))
                bench.note("ttft", bench.engines.tokens(count), used, system, ms=took)


def between_tokens(bench: Bench, count: int, budget: int) -> None:
    """Gaps between tokens of eight streams while a long prompt prefills."""
    used = bench.set_budget(budget)
    systems = [name for name in bench.systems if name != "nothing"]
    for system in random.Random(1).sample(systems, len(systems)):
        if bench.late:
            return
        with bench.system(system) as llm:
            gaps, first = bench.between(llm, bench.engines.tokens(count))
        gaps.sort()
        at = {f"p{share}": gaps[min(len(gaps) - 1, len(gaps) * share // 100)] for share in (50, 90, 99)}
        bench.note("itl", bench.engines.tokens(count), used, system, ms=first, gaps=len(gaps), **at, max=gaps[-1])


def summary(bench: Bench) -> None:
    """Medians, and how many times as fast as the engine."""
    print(f"\n{'what':5} {'tokens':>7} {'budget':>6} {'system':8} {'density':>8} {'ms':>9} {'times':>6}  runs")
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in bench.rows:
        found.setdefault((row["what"], row["tokens"], row["budget"], row["system"]), []).append(row)
    for key, rows in sorted(found.items()):
        value = "p99" if key[0] == "itl" else "ms"
        base = [row[value] for row in found.get((*key[:3], "engine"), [])]
        median = statistics.median(row[value] for row in rows)
        times = f"{statistics.median(base) / median:6.2f}" if base else ""
        density = rows[0]["density"]
        text = f"{density:8.3f}" if density is not None else " " * 8
        print(f"{key[0]:5} {key[1]:7} {key[2]:6} {key[3]:8} {text} {median:9.1f} {times}  {len(rows)}")


def write(bench: Bench, out: Path) -> None:
    """All measurements."""
    names = list(dict.fromkeys(name for row in bench.rows for name in row))
    with (out / "vllm.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows(bench.rows)


def machine(engines: Engines) -> None:
    """Versions and device, for the record."""
    from importlib.metadata import version

    import compactattn
    import torch
    import vllm

    names = ", ".join(f"{name} {version(name)}" for name in ("transformers", "triton", "numpy"))
    print(f"vllm {vllm.__version__}, torch {torch.__version__}, {names}, Python {sys.version.split()[0]}")
    print(f"compactattn {compactattn.build_info()}")
    if not engines.cpu:
        query = "name,driver_version,clocks.max.sm,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        print(subprocess.run(command, text=True, capture_output=True, check=False).stdout)


def main() -> None:
    """Both engines, then what was asked for, within the time."""
    start = time.perf_counter()
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--ttft", action="store_true")
    parser.add_argument("--itl", action="store_true")
    parser.add_argument("--budgets", default="8192", help="tokens of a step where first tokens are timed")
    parser.add_argument("--itl-budgets", default="8192,2048")
    parser.add_argument("--lengths", default="8192,32768,65536,131072")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=130)
    parser.add_argument("--graphs", action="store_true", help="the engine's defaults: torch.compile and CUDA graphs")
    parser.add_argument("--one", action="store_true", help="one engine: `engine` is it with no step split")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--itl-tokens", type=int, default=65536)
    parser.add_argument("--gate", type=Path, help="a file to wait for before anything is measured")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engines = Engines(Path(folder), given.layers, cpu=given.cpu, graphs=given.graphs)
        lengths = [int(length) for length in given.lengths.split(",")]
        longest = max([*lengths, given.itl_tokens] if given.itl else lengths)
        at = {
            # The streams keep theirs while the long prompt waits for all of its own.
            "pool_tokens": longest + 4096 + (STREAMS * 4096 if given.itl and longest < 2 * given.itl_tokens else 0),
            "max_model_len": engines.tokens(longest + 2048),
            "max_num_batched_tokens": engines.tokens(8192),
            "max_num_seqs": 64,
        }
        asked = {"min_kv_tokens": engines.tokens(8192), "min_chunk_tokens": engines.tokens(256)} if given.cpu else {}
        stock = None if given.one else engines.make(None, **at)
        ours = engines.make(asked, **at)
        bench = Bench(stock, ours, engines, start + given.seconds, given.systems.split(","))
        print(f"ready after {time.perf_counter() - start:.1f} s", flush=True)
        while given.gate and not given.gate.exists() and not bench.late:
            time.sleep(0.1)
        machine(engines)
        try:
            for budget in map(int, given.budgets.split(",") if given.ttft else ()):
                first_tokens(bench, lengths, budget, given.rounds)
            for budget in map(int, given.itl_budgets.split(",") if given.itl else ()):
                between_tokens(bench, given.itl_tokens, budget)
        finally:
            write(bench, given.out)
            summary(bench)
        from compactattn.vllm import counters

        print(counters())
    sys.stdout.flush()
    # Engines of one process do not end in every order; all is written.
    os._exit(0)


SYSTEMS = ["engine", "default", "0.17", "0.10", "nothing"]

if __name__ == "__main__":
    main()
