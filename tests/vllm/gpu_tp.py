"""The backend on several GPUs of one host: the engine's own numbers, and a batch of long prompts beside its FA3.

    python tests/vllm/gpu_tp.py --out DIR [--tp 2] [--checks] [--batch 8] [--prompt 131072] [--chunk 1024] [--cpu]
    python tests/vllm/gpu_tp.py --out DIR --model qwen3moe ...

``--checks``: two layers, against an engine without the backend. Else the case of CompactAttention (arXiv 2605.16839):
all prompts at once, ``chunk`` tokens of each a step, Llama-3.1-8B's shapes with random weights, forced densities. One
engine is all systems: as ``engine`` it splits no step, so that attention is vLLM's FlashAttention 3 alone. Times are
taken at each quarter of the prompts, so that a run that ``--seconds`` cuts off still says something. Exit code 1 if a
check fails.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_checks import answers, distance, generate
from gpu_engine import KEEP_ALL, LLAMA, QWEN3_MOE, Engines, choose_in, scheduler, unmake

QUARTERS = 4


@dataclass
class Batch:
    """The timed engine and what it took."""

    llm: Any
    engines: Engines
    given: argparse.Namespace
    until: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    seed: int = 5000

    def choose(self, name: str) -> tuple[int, int]:
        """In all ranks; KV blocks selected so far and candidates, of the first."""
        return self.llm.collective_rpc(choose_in, args=(name,))[0]

    def prefill(self, requests: int, count: int) -> dict[str, Any]:
        """Seconds to each quarter of the prompts' tokens, and to first tokens: of the first request, the mean, all."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
        engine, here, names = self.llm.llm_engine, scheduler(self.llm), [f"p{self.seed + i}" for i in range(requests)]
        for name in names:
            self.seed += 1
            engine.add_request(name, self.engines.prompt(self.seed, count), params)
        start, quarters, firsts = time.perf_counter(), [], []
        while engine.has_unfinished_requests() and time.perf_counter() < self.until:
            done = engine.step()
            now = time.perf_counter() - start
            firsts += [now] * len(done)
            tokens = len(firsts) * count + sum(request.num_computed_tokens for request in here.requests.values())
            while len(quarters) < QUARTERS and tokens >= requests * count * (len(quarters) + 1) / QUARTERS:
                quarters.append(now)
        if engine.has_unfinished_requests():
            engine.abort_request(names)
            firsts = []
        ends = {"first": min(firsts), "mean": sum(firsts) / len(firsts), "all": max(firsts)} if firsts else {}
        return {f"s_{i + 1}_of_{QUARTERS}": quarter for i, quarter in enumerate(quarters)} | ends

    def system(self, name: str) -> None:
        """One system's batch, into ``rows``."""
        before = self.choose(name)
        self.prefill(1, self.engines.tokens(20000))
        found = self.prefill(self.given.batch, self.engines.tokens(self.given.prompt))
        after = self.choose("default")
        candidates = after[1] - before[1]
        density = (after[0] - before[0]) / candidates if candidates else None
        self.rows.append({"system": name, "density": density} | found)
        print(self.rows[-1], flush=True)


def check(engines: Engines, given: argparse.Namespace) -> None:
    """An engine without the backend, then one with it: unsplit to the bit, keep-all to the engine's own rounding."""
    long = [engines.prompt(100 + i, engines.tokens(n)) for i, n in enumerate((16000, 700, 9000, 40))]
    short = [engines.prompt(200 + i, engines.tokens(20 + 37 * i)) for i in range(24)]
    at = {"pool_tokens": 60_000, "max_model_len": engines.tokens(32768), "tensor_parallel_size": given.tp, **QUIET}
    at["max_num_batched_tokens"] = engines.tokens(4096)
    stock = make(engines, None, at)
    wanted, long_wanted = answers(generate(stock, short)), generate(stock, long, logprobs=20)
    scheduler(stock).kv_cache_manager.reset_prefix_cache()
    noise = distance(long_wanted, [generate(stock, [prompt], logprobs=20)[0] for prompt in long])
    unmake(stock)
    asked = KEEP_ALL | {"min_chunk_tokens": engines.tokens(256), "min_kv_tokens": engines.tokens(1024), "strict": True}
    ours = make(engines, asked, at)
    ours.collective_rpc(choose_in, args=("engine",))
    equal = sum(a == b for a, b in zip(answers(generate(ours, short)), wanted, strict=True))
    print(f"unsplit: {equal} of {len(short)} prompts, tokens and log probabilities identical", flush=True)
    # What is not split on a CPU is the library's dense attention (compactattn.vllm.cpu).
    assert engines.cpu or equal == len(short)
    ours.collective_rpc(choose_in, args=("default",))
    scheduler(ours).kv_cache_manager.reset_prefix_cache()
    far = distance(generate(ours, long, logprobs=20), long_wanted)
    ranks = ours.collective_rpc(counters_of)
    print(f"keep-all: log probabilities off by {far:.4f}, the engine from itself {noise:.4f}; ranks {ranks}")
    assert far <= 2 * noise + 1e-3
    assert len(ranks) == given.tp
    assert all(rank["our_tokens"] > engines.tokens(20000) and rank["fallbacks"] == {} for rank in ranks)
    unmake(ours)


def make(engines: Engines, asked: dict[str, Any] | None, at: dict[str, Any]) -> Any:
    """An engine whose workers, on a CPU, are told by the environment what lies in the engine's slot."""
    if engines.cpu:
        os.environ["COMPACTATTN_MODE"] = "dense" if asked is None else "compactattn"
    return engines.make(asked, **at)


def counters_of(worker: Any) -> dict[str, Any]:
    """A rank's."""
    from compactattn.vllm import counters

    return {name: counters()[name] for name in ("pid", "split_steps", "our_tokens", "fallbacks", "plans")}


def times(engines: Engines, given: argparse.Namespace, until: float) -> None:
    """All systems, as far as the time goes."""
    prompt = engines.tokens(given.prompt)
    at = {
        # A little more than the prompts, as first tokens count.
        "pool_tokens": given.batch * (given.prompt + 64) + 4096,
        "max_model_len": prompt + engines.tokens(1024),
        "max_num_batched_tokens": given.batch * engines.tokens(given.chunk),
        "long_prefill_token_threshold": engines.tokens(given.chunk),
        "max_num_seqs": max(given.batch, 8),
        "tensor_parallel_size": given.tp,
        **QUIET,
    }
    asked = {"min_kv_tokens": engines.tokens(8192), "min_chunk_tokens": engines.tokens(256)} if given.cpu else {}
    start = time.perf_counter()
    batch = Batch(make(engines, asked, at), engines, given, until)
    print(f"ready after {time.perf_counter() - start:.1f} s", flush=True)
    while given.gate and not given.gate.exists() and time.perf_counter() < until:
        time.sleep(0.1)
    try:
        for name in given.systems.split(","):
            if time.perf_counter() < until:
                batch.system(name)
    finally:
        summary(batch)
    print(batch.llm.collective_rpc(counters_of)[0])


def summary(batch: Batch) -> None:
    """A table, and the same as CSV: seconds, and how many times as fast as the engine."""
    given = batch.given
    columns = [*(f"s_{i + 1}_of_{QUARTERS}" for i in range(QUARTERS)), "first", "mean", "all"]
    shapes = f"{given.model}, {given.layers} layers, TP {given.tp}, {given.batch} prompts of {given.prompt}"
    print(f"\n{shapes}, {given.chunk} tokens of each a step; seconds (times as fast as the engine)")
    print(f"{'system':8} {'density':>8} " + " ".join(f"{name:>15}" for name in columns))
    base = next((row for row in batch.rows if row["system"] == "engine"), {})
    for row in batch.rows:
        texts = [f"{row[name]:7.2f}" + _times(base, row, name) if name in row else "" for name in columns]
        density = "" if row["density"] is None else f"{row['density']:.3f}"
        print(f"{row['system']:8} {density:>8} " + " ".join(f"{text:>15}" for text in texts))
    with (given.out / f"tp{given.tp}-{given.model}.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["system", "density", *columns])
        table.writeheader()
        table.writerows(batch.rows)


def _times(base: dict[str, Any], row: dict[str, Any], name: str) -> str:
    return f" ({base[name] / row[name]:4.2f}x)" if name in base else ""


def main() -> int:
    """Exit code."""
    start = time.perf_counter()
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--model", choices=SHAPES, default="llama")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--checks", action="store_true")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=131072)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--systems", default="0.17,engine,0.30")
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--gate", type=Path, help="a file to wait for before anything is measured")
    parser.add_argument("--graphs", action="store_true", help="the engine's defaults: torch.compile and CUDA graphs")
    parser.add_argument("--cpu", action="store_true")
    given = parser.parse_args()
    given.layers = given.layers or (2 if given.checks else {"llama": 32, "qwen3moe": 48}[given.model])
    with tempfile.TemporaryDirectory() as folder:
        shapes = SHAPES[given.model]
        engines = Engines(Path(folder), given.layers, cpu=given.cpu, graphs=given.graphs, shapes=shapes)
        try:
            check(engines, given) if given.checks else times(engines, given, start + given.seconds)
        except Exception:
            print(f"FAIL\n{traceback.format_exc()[-4000:]}", flush=True)
            return 1
    return 0


SHAPES = {"llama": LLAMA, "qwen3moe": QWEN3_MOE}
# What would need memory shared by multicast, or a search for it at start; steps of 8192 tokens are NCCL's in any case.
QUIET = {"disable_custom_all_reduce": True}
os.environ |= {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}

if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Engines of one process do not end in every order; all is written.
    os._exit(code)
