"""A capacity plan from measured rows: capacity.py prints the tables of capacity.md.

Model of one GPU: the time of a prefill of L tokens is a L + c_s L^2 + b_s L, in milliseconds, with a (everything but
attention) from the rows of an engine whose attention was left out, and b_s, c_s of each system by least squares over
its own rows. The fleet is simulated: requests arrive at random, wait for a prefill GPU, hand their KV over, and then
decode on other GPUs until they end. Everything random has a seed, so the same records give the same page.
"""

from __future__ import annotations

import csv
import heapq
import random
from dataclasses import dataclass
from pathlib import Path

RECORD = Path(__file__).parents[1] / "tests/bench/record/h100/2026-11-22-vllm.csv"
# One chunk of one layer by context, the same heads; nothing of it is in the model.
KERNELS = RECORD.with_name("2026-11-22-long.csv")
CHUNK, LAYERS = 1024, 32
SYSTEMS = {"engine": "dense", "default": "sparse .35", "0.17": "sparse .17", "0.10": "sparse .10"}

# Llama-3.1-8B in bf16, the record's model: 2 tensors x 32 layers x 8 KV heads x 128 x 2 bytes.
KV_BYTES_A_TOKEN = 2 * 32 * 8 * 128 * 2
WEIGHT_GB, GPU_GB, USABLE = 16.1, 80.0, 0.90


@dataclass(frozen=True)
class Speed:
    """Milliseconds of a prefill as linear and squared terms of its tokens."""

    linear: float
    squared: float

    def ms(self, tokens: float) -> float:
        """Of one prompt on one GPU."""
        return self.linear * tokens + self.squared * tokens * tokens


def speeds() -> tuple[dict[str, Speed], dict[tuple[str, int], float]]:
    """Fitted systems, and the measured means they are fitted to, in milliseconds by (system, tokens)."""
    rows: dict[tuple[str, int], list[float]] = {}
    with RECORD.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if (row["what"], row["budget"]) == ("ttft", "8192"):
                rows.setdefault((row["system"], int(row["tokens"])), []).append(float(row["ms"]))
    means = {key: sum(all_ms) / len(all_ms) for key, all_ms in rows.items()}
    a = besides(means)
    fitted = {}
    for system in SYSTEMS:
        own = [(tokens, ms) for (name, tokens), ms in means.items() if name == system]
        fitted[system] = _fit([(tokens, ms - a * tokens, ms) for tokens, ms in own], a)
    return fitted, means


def besides(means: dict[tuple[str, int], float]) -> float:
    """Milliseconds a token of everything but attention."""
    rows = [(tokens, ms) for (system, tokens), ms in means.items() if system == "nothing"]
    # Relative errors count, so that a short prompt weighs as much as a long one.
    return sum(tokens / ms for tokens, ms in rows) / sum(tokens**2 / ms**2 for tokens, ms in rows)


def _fit(rows: list[tuple[int, float, float]], a: float) -> Speed:
    """b, c of attention = b L + c L^2, errors relative to the whole time."""
    ll = sum(x * x / t**2 for x, _, t in rows)
    lq = sum(x**3 / t**2 for x, _, t in rows)
    qq = sum(x**4 / t**2 for x, _, t in rows)
    ly = sum(x * y / t**2 for x, y, t in rows)
    qy = sum(x * x * y / t**2 for x, y, t in rows)
    det = ll * qq - lq * lq
    return Speed(a + (ly * qq - qy * lq) / det, (qy * ll - ly * lq) / det)


def kernels(density: str) -> list[tuple[int, float]]:
    """Context and milliseconds of attend for one chunk of one layer, a list for each query head."""
    with KERNELS.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["system"], row["density"]) == ("ours-head", density)]
    return sorted((int(row["case"].rpartition("kv")[2]), float(row["ms_median"])) for row in rows)


def whole(rows: list[tuple[int, float]], tokens: int) -> float:
    """Seconds of attend over all chunks and layers of a prompt: straight lines between the rows, and from nothing."""
    total, before = 0.0, (0, 0.0)
    for context, ms in rows:
        if context <= tokens:
            total += (before[1] + ms) / 2 * (context - before[0]) / CHUNK * LAYERS
            before = (context, ms)
    return total / 1e3


@dataclass(frozen=True)
class Fleet:
    """A service with disaggregated prefill."""

    prefill_gpus: int
    decode_gpus: int
    # Between them, for a request's KV.
    link_gb_s: float = 25.0
    # Of one decode step with everybody in it.
    step_ms: float = 25.0
    answer_tokens: int = 400


# Tokens of a prompt and how often: a code assistant's mix.
MIX = ((8_192, 0.40), (32_768, 0.35), (65_536, 0.15), (131_072, 0.10))


def simulate(fleet: Fleet, speed: Speed, rate: float, seconds: float = 3600.0) -> dict[str, float]:
    """Requests at `rate` a second for so long: percentiles of the first token's seconds, busy share, decoders' KV."""
    random_ = random.Random(20261122)
    free = [0.0] * fleet.prefill_gpus
    heapq.heapify(free)
    now, busy, ttft = 0.0, 0.0, []
    ends: list[tuple[float, int]] = []
    held = most = 0
    while now < seconds:
        now += random_.expovariate(rate)
        tokens = random_.choices([length for length, _ in MIX], [share for _, share in MIX])[0]
        start = max(now, heapq.heappop(free))
        took = speed.ms(tokens) / 1e3
        heapq.heappush(free, start + took)
        busy += took
        moved = tokens * KV_BYTES_A_TOKEN / (fleet.link_gb_s * 1e9)
        first = start + took + moved
        ttft.append(first - now)
        while ends and ends[0][0] <= first:
            held -= heapq.heappop(ends)[1]
        heapq.heappush(ends, (first + fleet.answer_tokens * fleet.step_ms / 1e3, tokens))
        held += tokens
        most = max(most, held)
    ttft.sort()
    return {
        "p50": ttft[len(ttft) // 2],
        "p99": ttft[int(0.99 * len(ttft))],
        "busy": busy / (seconds * fleet.prefill_gpus),
        "decode_gpus": most * KV_BYTES_A_TOKEN / ((GPU_GB * USABLE - WEIGHT_GB) * 1e9),
    }


def needed(speed: Speed, rate: float, p99_s: float) -> tuple[int, dict[str, float]]:
    """The fewest prefill GPUs whose 99th percentile is within the limit; 0 where one prompt alone is not."""
    for gpus in range(1, 129):
        result = simulate(Fleet(gpus, 1), speed, rate)
        if result["p99"] <= p99_s:
            return gpus, result
    return 0, result


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def main() -> None:
    """Prints the page's tables."""
    fitted, means = speeds()
    print("### The model against its rows (seconds: measured, fitted)\n")
    lengths = sorted({tokens for _, tokens in means})
    rows = [
        [label, *(f"{means[name, n] / 1e3:.2f}, {fitted[name].ms(n) / 1e3:.2f}" for n in lengths)]
        for name, label in SYSTEMS.items()
    ]
    print(table(["", *(f"{n // 1024}K" for n in lengths)], rows))

    print("\n### Longer prompts (seconds to prefill, GPUs that the KV of one such request takes)\n")
    far = [131_072, 262_144, 524_288, 1_048_576]
    rows = [[label, *(f"{fitted[name].ms(n) / 1e3:.1f}" for n in far)] for name, label in SYSTEMS.items()]
    kv = [n * KV_BYTES_A_TOKEN / 1e9 for n in far]
    rows.append(["KV in GB, bf16", *(f"{gb:.0f}" for gb in kv)])
    rows.append(["GPUs of 80 GB to hold it", *(str(_gpus(gb)) for gb in kv)])
    print(table(["one GPU's time", *(f"{n // 1024}K" for n in far)], rows))

    print("\n### The extrapolation against kernels (seconds of attention in a whole prefill at density .10, one GPU)\n")
    rows_at = kernels("0.1000")
    rows = [["attend alone, by its rows", *(f"{whole(rows_at, n):.1f}" for n in far)]]
    rows.append(
        ["the model, selection in it", *(f"{(fitted['0.10'].ms(n) - besides(means) * n) / 1e3:.1f}" for n in far)]
    )
    print(table(["", *(f"{n // 1024}K" for n in far)], rows))

    print("\n### A fleet: prefill GPUs for 2 requests a second\n")
    rows = []
    for name, label in SYSTEMS.items():
        gpus, result = needed(fitted[name], 2.0, 15.0)
        rate = 2.0 / gpus
        rows.append([label, str(gpus), f"{rate:.2f}", f"{result['p50']:.1f}", f"{result['p99']:.1f}",
                     f"{result['busy']:.0%}", f"{result['decode_gpus']:.1f}"])  # fmt: skip
    head = ["", "prefill GPUs", "requests/s a GPU", "p50 s", "p99 s", "busy", "GPUs' worth of KV that decodes"]
    print(table(head, rows))


def _gpus(kv_gb: float) -> int:
    """GPUs over which the heads are split, weights with them: 1, 2, 4 or 8."""
    return next((n for n in (1, 2, 4, 8) if kv_gb + WEIGHT_GB <= n * GPU_GB * USABLE), 0)


if __name__ == "__main__":
    main()
