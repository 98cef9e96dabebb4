"""A whole chunked prefill through one attention module, every chunk timed, summed: the published protocol.

python3 tests/bench/prefill.py --out build/bench --library libcompactattn.so

CUDA events stand around each chunk's module: QKV projection, RoPE, cache write, attention with everything that selects,
output projection. One prefill warms up, then RUNS are timed; the mean and the spread of their sums are given. Weights
and hidden states are random, so sparse rows read a forced share of the blocks before the chunk: their name says which,
the density column what was read. Nothing is said of accuracy here; that the path is right is checked by the same
settings keeping everything, against fp64. Writes prefill.csv and prefill.txt below --out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import check
import module
import torch
from report import environment
from shapes import Shape

RUNS = 3
# One GPU of two that share Llama-3.1-8B's heads over a batch of 8, and a whole one with one request.
SHAPES = ["h32k8_d128_b1_q1024_kv{}", "h16k4_d128_b8_q1024_kv{}"]
CONTEXTS = [32768, 65536, 131072]
# Shares of the context that published sparse systems read.
DENSITIES = [0.17, 0.30]


def main() -> int:
    """Exit code 0: every row is there; 3: a system is missing; 1: an answer was wrong; 2: no GPU."""
    args = _arguments()
    if not torch.cuda.is_available():
        print("prefill.py: torch sees no GPU, and times are taken on nothing else", file=sys.stderr)
        return 2
    from systems.ours import package

    if args.library:
        package().load_library(args.library.absolute())
    args.out.mkdir(parents=True, exist_ok=True)
    rows, gaps, wrong = ["question,case,system,page,density,ms_mean,ms_stdev"], [], []
    for shape in [Shape.parse(name.format(context)) for name in args.shapes for context in args.contexts]:
        layer = module.Module(shape, seed=1)
        for build in _systems(package()):
            attention = build()
            book, line = _measured(layer, attention, (rows, gaps, wrong))
            book.append(line)
            print(line, flush=True)
            del attention
            torch.cuda.empty_cache()
        (args.out / "prefill.csv").write_text("\n".join(rows) + "\n")
    lines = [str(__doc__), *environment(), "", f"warm-up 1 prefill, then {RUNS}"]
    lines += ["", "Wrong:", *(wrong or ["none"]), "", "Not measured:", *(gaps or ["nothing"])]
    (args.out / "prefill.txt").write_text("\n".join(lines) + "\n")
    return 1 if wrong else 3 if gaps else 0


def _systems(ours: Any) -> list[Callable[[], module.Attention]]:
    sparse = ours.Settings.mode("compactattn").replace(keep="density", max_density=1.0)

    def at(density: float) -> Callable[[], module.Attention]:
        return lambda: module.Ours(f"ours-op-{density:.2f}", ours, sparse.replace(keep_value=density))

    dense = ours.Settings.mode("dense")
    return [
        module.Fa2WithCopies,
        module.VllmFa3,
        lambda: module.Ours("ours-dense", ours, dense),
        *map(at, DENSITIES),
    ]


def _measured(
    layer: module.Module, attention: module.Attention, books: tuple[list[str], list[str], list[str]]
) -> tuple[list[str], str]:
    """The line that one system earns, and the book it belongs into: rows, gaps or wrong answers."""
    rows, gaps, wrong = books
    try:
        error = _worst_error(layer, attention)
        if not error <= check.TOLERANCE:
            return wrong, f"{attention.name}, {layer.shape}: relative error {error:.2e}"
        return rows, _row(layer, attention)
    except Exception as reason:  # a peer may fail in any way; the others still answer
        return gaps, f"{attention.name}, {layer.shape}: {type(reason).__name__}: {reason}"


def _row(layer: module.Module, attention: module.Attention) -> str:
    sums = []
    for run in range(1 + RUNS):
        ms = _prefill(layer, attention)
        if run > 0:
            sums.append(ms)
    density = attention.density() if isinstance(attention, module.Ours) else 1.0
    page = module.PAGE_SIZE if isinstance(attention, module.Paged) else 0
    shape = layer.shape
    spread = statistics.pstdev(sums)
    return f"prefill,{shape},{attention.name},{page},{density:.4f},{statistics.mean(sums):.3f},{spread:.3f}"


def _prefill(layer: module.Module, attention: module.Attention) -> float:
    attention.start(layer.shape)
    events = []
    for past in range(0, layer.shape.context, layer.shape.chunk):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        layer.forward(attention, past)
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in events)


def _worst_error(layer: module.Module, attention: module.Attention) -> float:
    """Of the third chunk's attention, rows and heads sampled; sparse settings keep everything here."""
    if isinstance(attention, module.Ours):
        attention = attention.keeping_all()
    shape, past = layer.shape, 0
    attention.start(shape)
    keys, values = [], []
    for past in range(0, 3 * shape.chunk, shape.chunk):
        q, k, v = layer.project(layer.hidden[past // shape.chunk % 2], past)
        out = attention.attend(q, k, v, past)
        keys.append(k)
        values.append(v)
    k, v = torch.cat(keys, dim=1), torch.cat(values, dim=1)
    worst = 0.0
    for row in (0, shape.chunk // 2, shape.chunk - 1):
        # FlashAttention 2 sees the whole chunk (module.Fa2WithCopies).
        seen = past + (shape.chunk if isinstance(attention, module.Fa2WithCopies) else row + 1)
        for head in (0, shape.num_q_heads - 1):
            at = (shape.batch - 1, slice(seen), head // shape.group_size)
            logits = k[at].double() @ q[shape.batch - 1, row, head].double() * shape.head_dim**-0.5
            right = logits.softmax(0) @ v[at].double()
            got = out[shape.batch - 1, row, head].double()
            worst = max(worst, float((got - right).norm() / right.norm()))
    return worst


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for what is written")
    parser.add_argument("--library", type=Path, help="libcompactattn.so, instead of the installed package's")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="{} stands for a context")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
