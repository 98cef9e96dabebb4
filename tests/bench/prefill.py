"""A whole chunked prefill through one attention module, every chunk timed, summed: the published protocol, swept.

python3 tests/bench/prefill.py --out build/bench --library libcompactattn.so
python3 tests/bench/prefill.py --out build/bench --repro 'h32k8_d128_b1_q1024_kv131072,ours-op-0.17'
python3 tests/bench/prefill.py --out build/bench --ranks 2 --seconds 100

CUDA events stand around each chunk's module and between its parts: QKV projection with RoPE, cache write (of
FlashAttention 2 its copies), attention with everything that selects, output projection; with ranks the sum over them,
which the module's time leaves out as the published one does. One prefill warms up, then RUNS are timed, and a row is
the run in the middle; one more runs under the profiler for what each kernel adds. Weights and hidden states are random,
so sparse rows are made to read a share of the blocks before the chunk (methods.py): their name says which, the density
column what was read. Nothing is said of accuracy here; that the path is right is checked by the same settings keeping
everything, against fp64.

Wanted: torch with CUDA; for FlashAttention 3 `pip install vllm`. Writes prefill.csv, prefill.md and prefill-*.svg below
--out: rows as they come, the most important first; what is missing has its reason. A row of ranks is the slower one's.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import check
import methods
import module
import prefill_report
import stages
import tensor_parallel
import torch
from prefill_report import Gap, Measured
from sweep import PEERS, Pace, Row, Sweep, repeated
from timing import NAP_CYCLES, Marks

RUNS = 3
# One GPU of two that share Llama-3.1-8B's heads over a batch of 8, and a whole one with one request.
WHOLE, HALF = "h32k8_d128_b1", "h16k4_d128_b8"
# The published lengths first.
CONTEXTS = [131072, 65536, 32768, 262144, 16384, 8192]
CHUNKS = [1024, 512, 2048]
# Shares of the context that published sparse systems read.
DENSITIES = [0.17, 0.30]
# Naps of timing.py before a prefill: the host is some chunks ahead from the start.
FIRST_NAPS = 10
# Of --seconds: ranks that are still running so long after it hang.
OVERRUN_SECONDS = 30.0


def main() -> int:
    """Exit code 0: every row is there; 3: some are not, for a reason; 1: a wrong answer or a lost rank; 2: no GPU."""
    args = _arguments()
    if not torch.cuda.is_available():
        print("prefill.py: torch sees no GPU, and times are taken on nothing else", file=sys.stderr)
        return 2
    if torch.cuda.device_count() < args.ranks:
        print(f"prefill.py: {args.ranks} ranks want as many GPUs, not {torch.cuda.device_count()}", file=sys.stderr)
        return 2
    from systems.ours import package

    if args.library:
        package().load_library(args.library.absolute())
    group = tensor_parallel.Group.from_env()
    rows = _rows(args)
    if group.size > 1:
        _measure_all(rows, args, group)
        group.close()
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    prefill_report.Book(args.out).open(keep=args.resume)
    failure = ""
    if args.ranks > 1:
        spent = time.monotonic() - args.started
        limit = args.seconds - spent + OVERRUN_SECONDS if args.seconds else args.limit
        command = [sys.executable, *sys.argv, "--started", str(args.started)]
        failure = tensor_parallel.launch(command, args.ranks, limit)
    else:
        _measure_all(rows, args, group)
    book = prefill_report.Book(args.out)
    report = prefill_report.write(book, rows, str(__doc__), _repro(args), failure, args.ranks)
    print(*report.notes, sep="\n")
    return 1 if report.wrong or failure else 3 if report.gaps else 0


def _measure_all(rows: list[Row], args: argparse.Namespace, group: tensor_parallel.Group) -> None:
    from systems.ours import package

    if group.size > 1:
        module.DEVICE = group.device
    book, pace = prefill_report.Book(args.out), Pace(args.seconds)
    known = {(it.case, it.system) for it in book.rows() if it.ranks == group.size}
    layer: module.Module | None = None
    for row in (row for row in rows if row.key not in known):
        begin = time.monotonic()
        if group.any(not pace.fits(row, begin - args.started)):
            continue
        if layer is None or layer.shape != row.shape:
            layer = None
            layer = module.Module(row.shape, seed=1, group=group)
        lines = _lines(layer, row, package())
        for line in lines if group.rank == 0 else []:
            book.add(line)
            print(line, flush=True)
        torch.cuda.empty_cache()
        pace.learn(row, time.monotonic() - begin)


def _lines(layer: module.Module, row: Row, package: Any) -> list[Measured | Gap]:
    """What one row earns: numbers, or the reason why there are none. Ranks go on together or not at all."""
    attention: module.Attention | None = None
    problem, error = Gap("", *row.key, ""), 0.0
    try:
        attention = _attention(row, package)
        error = _worst_error(layer, attention)
    except Exception as reason:  # a peer may fail in any way; the others still answer
        problem = Gap("missing", *row.key, f"{type(reason).__name__}: {reason}")
    if problem.kind and layer.group.rank > 0:
        # Only the first one's reason comes into the report.
        print(f"rank {layer.group.rank}: {problem}", file=sys.stderr, flush=True)
    everyone = layer.group.rows([float(bool(problem.kind)), error])
    wrong = [f"relative error {e:.2e} on rank {r}" for r, (_, e) in enumerate(everyone) if not e <= check.TOLERANCE]
    if wrong:
        return [Gap("wrong", *row.key, ", ".join(wrong))]
    if any(failed for failed, _ in everyone) or attention is None:
        return [problem if problem.kind else Gap("missing", *row.key, "another rank could not")]
    if layer.group.size > 1:
        # What fails now fails in the middle of a sum: the process ends, and the launcher ends the others.
        return _measured(layer, attention, row)
    try:
        return _measured(layer, attention, row)
    except Exception as reason:
        return [Gap("missing", *row.key, f"{type(reason).__name__}: {reason}")]


def _attention(row: Row, package: Any) -> module.Attention:
    if row.method in PEERS:
        return {"vllm-fa3": module.VllmFa3, "fa2-copies": module.Fa2WithCopies}[row.method]()
    return methods.build(package, row.method, row.density)


@dataclass(frozen=True)
class _Parts:
    """Milliseconds of one prefill, each summed over its chunks."""

    values: tuple[float, ...]

    @property
    def module(self) -> float:
        return sum(self.values[: module.PARTS.index("reduce")])


def _measured(layer: module.Module, attention: module.Attention, row: Row) -> list[Measured | Gap]:
    _prefill(layer, attention)
    inflation = None
    if isinstance(attention, methods.Ours):
        if attention.calibrate():
            _prefill(layer, attention)
            if attention.calibrate():
                # What is timed has run once before, as every other.
                _prefill(layer, attention)
        inflation = attention.inflation()
    runs = [_prefill(layer, attention) for _ in range(RUNS)]
    by_stage, unseen = _stages(layer, attention)
    density = attention.density() if isinstance(attention, methods.Ours) else 1.0
    # The check before was of other settings: here of those that were timed, all sums of the ranks included.
    last = layer.forward(attention, layer.shape.context - layer.shape.chunk, lambda: None)
    if not bool(last.isfinite().all()):
        return [Gap("wrong", *row.key, "what was timed is not finite")]
    own = [*(ms for run in runs for ms in run.values), *(by_stage.get(it, 0.0) for it in stages.STAGES), density]
    everyone = layer.group.rows(own)
    sums, parts, slower = _middle([[_Parts(run) for run in _cut(numbers)] for numbers in everyone])
    left = everyone[slower][-len(stages.STAGES) - 1 :]
    measured = Measured(
        case=str(row.shape),
        system=row.system,
        page=attention.page_size,
        density=left[-1],
        ms=parts.module,
        ms_min=min(sums),
        ms_max=max(sums),
        inflation=inflation,
        ranks=layer.group.size,
        parts=dict(zip(module.PARTS, parts.values, strict=True)),
        stages=dict(zip(stages.STAGES, left[:-1], strict=True)),
    )
    return [measured, *([Gap("missing", *row.key, f"its stages: {unseen}")] if unseen else [])]


def _cut(numbers: list[float]) -> list[tuple[float, ...]]:
    """Of a rank's numbers the parts of each run, which come first."""
    width = len(module.PARTS)
    return [tuple(numbers[run * width : (run + 1) * width]) for run in range(RUNS)]


def _middle(ranks: list[list[_Parts]]) -> tuple[list[float], _Parts, int]:
    """Each run's time on its slower rank; then the run of the middle time, whole (its parts add up), and its rank."""
    slower = [max(range(len(ranks)), key=lambda rank, run=run: ranks[rank][run].module) for run in range(len(ranks[0]))]
    sums = [ranks[rank][run].module for run, rank in enumerate(slower)]
    run = sums.index(statistics.median_low(sums))
    return sums, ranks[slower[run]][run], slower[run]


def _stages(layer: module.Module, attention: module.Attention) -> tuple[dict[str, float], str]:
    """Milliseconds by stage, and why there are none: a profiler may fail where the times themselves are good."""
    if not torch.cuda.is_available():
        return {}, "no GPU"
    try:
        return stages.measure_stages(lambda: _prefill(layer, attention)), ""
    except (RuntimeError, AttributeError, AssertionError) as reason:
        return {}, f"{type(reason).__name__}: {reason}"


def _prefill(layer: module.Module, attention: module.Attention) -> _Parts:
    attention.start(layer.shape)
    layer.group.barrier()
    chunks: list[Marks] = []
    for past in range(0, layer.shape.context, layer.shape.chunk):
        _nap(chunks, alone=layer.group.size == 1)
        chunks.append(Marks(torch.cuda.is_available()))
        layer.forward(attention, past, chunks[-1].mark)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return _Parts(tuple(sum(part) for part in zip(*(chunk.gaps() for chunk in chunks), strict=True)))


def _nap(chunks: list[Marks], *, alone: bool) -> None:
    """Between chunks, where the device has caught up with the host: launch gaps are not what is measured.

    Ranks nap before the first chunk only: later one would wait for the other's nap.
    """
    if not torch.cuda.is_available():
        return
    if not chunks:
        torch.cuda._sleep(FIRST_NAPS * NAP_CYCLES)
    elif alone and chunks[-1].begun():
        torch.cuda._sleep(NAP_CYCLES)


def _worst_error(layer: module.Module, attention: module.Attention) -> float:
    """Of the third chunk's attention (the last, of fewer), rows and heads sampled; sparse settings keep everything."""
    attention = attention.keeping_all()
    shape, past = layer.shape, 0
    attention.start(shape)
    keys, values = [], []
    for past in range(0, min(3 * shape.chunk, shape.context), shape.chunk):
        q, k, v = layer.project(layer.hidden[past // shape.chunk % 2], past)
        attention.write(k, v, past)
        out = attention.attend(q, past)
        keys.append(k)
        values.append(v)
    k, v = torch.cat(keys, dim=1), torch.cat(values, dim=1)
    errors = []
    for row in (0, shape.chunk // 2, shape.chunk - 1):
        # FlashAttention 2 sees the whole chunk (module.Fa2WithCopies), but for the first, which has a mask.
        blind = isinstance(attention, module.Fa2WithCopies) and past > 0
        seen = past + (shape.chunk if blind else row + 1)
        for head in (0, shape.num_q_heads - 1):
            at = (shape.batch - 1, slice(seen), head // shape.group_size)
            logits = k[at].double() @ q[shape.batch - 1, row, head].double() * shape.head_dim**-0.5
            right = logits.softmax(0) @ v[at].double()
            got = out[shape.batch - 1, row, head].double()
            errors.append(float((got - right).norm() / right.norm()))
    # A NaN must not vanish in a maximum.
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _rows(args: argparse.Namespace) -> list[Row]:
    if args.repro:
        return repeated(args.repro)
    families = args.shapes or ([HALF] if args.ranks > 1 else [WHOLE, HALF])
    return Sweep(families, args.contexts, args.chunks, args.methods, args.densities).rows()


def _repro(args: argparse.Namespace) -> str:
    """The command that repeats one row, but for the row."""
    return "python3 tests/bench/prefill.py --out DIR" + (f" --ranks {args.ranks}" if args.ranks > 1 else "")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for what is written")
    parser.add_argument("--library", type=Path, help="libcompactattn.so, instead of the installed package's")
    parser.add_argument("--methods", nargs="+", default=list(methods.METHODS), choices=methods.METHODS)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="the most important first")
    parser.add_argument("--chunks", type=int, nargs="+", default=CHUNKS, help="likewise")
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--shapes", nargs="+", help=f"of one rank, such as {WHOLE} (heads, head_dim, batch)")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs that share a layer's heads, a process each")
    parser.add_argument("--seconds", type=float, help="begin no row that should not end in time")
    parser.add_argument(
        "--limit", type=float, default=3600.0, help="seconds after which ranks are ended, without --seconds"
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out has, measure those it lacks")
    # Ranks count from their launcher's start, on the one clock of the machine.
    parser.add_argument("--started", type=float, default=time.monotonic(), help=argparse.SUPPRESS)
    parser.add_argument("--repro", metavar="CASE,SYSTEM", help="one row again, and the two peers of its ratios")
    args = parser.parse_args()
    if args.repro and args.resume:
        parser.error("--repro measures a row again, --resume keeps it: one of them")
    return args


if __name__ == "__main__":
    sys.exit(main())
