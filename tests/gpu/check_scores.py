"""The scorers on the GPU against fp64 over layouts, groups, pages, blocks and ragged requests; prints each failure.

A score may differ by its reference's bound, relatively; what no kernel may write must still hold UNTOUCHED. Both runs
of a case, and each request alone, must give the same bits.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from driver import Kernel, check, cuda, tensor_map
from params import Span
from score_case import UNTOUCHED, Case, Gate, Shape
from score_reference import GateCase, attn_gate, flashprefill, xattention

RAGGED = ((200, 1000), (1, 517), (300, 90), (63, 1300), (70, 2049), (128, 256))
Reference = Callable[[Case, Span], tuple[torch.Tensor, float]]


class Kernels:
    """Every entry of the cubins in a folder, loaded when first launched."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.loaded = folder, {}

    def launch(self, name: str, grid: tuple[int, ...], block: int, shared: int, *args: ctypes._SimpleCData) -> None:
        """`name`: file/entry."""
        file, entry = name.split("/")
        if name not in self.loaded:
            self.loaded[name] = Kernel(self.folder / f"{file}.cubin", f"compactattn_{entry}", 100_000)
        kernel = self.loaded[name]
        check(cuda().cuFuncSetAttribute(kernel.function, 8, max(shared, 1)))
        pointers = (ctypes.c_void_p * len(args))(*[ctypes.addressof(arg) for arg in args])
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        extents = (*grid, 1, 1)[:3]
        check(cuda().cuLaunchKernel(kernel.function, *extents, block, 1, 1, shared, stream, pointers, None))


def suffix(shape: Shape) -> str:
    """Of kernel names."""
    return "bf16" if shape.dtype == torch.bfloat16 else "fp16"


def run_flashprefill(kernels: Kernels, case: Case, only: int | None) -> list[int]:
    """Scores the case; the spans that were in the step."""
    s, tiles = case.shape, -(-case.shape.max_blocks // 128)
    capacity = len(case.scores)
    case.cells = torch.empty(capacity * s.heads * 8 * tiles, device="cuda")
    step, spans = case.step(only)
    shared = 256 * (2 * s.dim + 16)
    kernels.launch(f"flashprefill/flashprefill_{suffix(s)}", (capacity, s.kv_heads, tiles), 128, shared, step)
    kernels.launch("flashprefill/flashprefill_relate", (capacity, s.heads), 256, 0, step)
    return spans


def run_flashprefill_sm90(kernels: Kernels, case: Case, only: int | None) -> list[int]:
    """The same by warpgroup products, for head_dim 64 and 128."""
    s, tiles = case.shape, -(-case.shape.max_blocks // 128)
    capacity = len(case.scores)
    case.cells = torch.empty(capacity * s.heads * 8 * tiles, device="cuda")
    step, spans = case.step(only)
    sizes, (token, head, _) = (64, s.heads, len(case.q), s.dim // 64), case.q.stride()
    rows = tensor_map(case.q, sizes, (head, token, 64), (64, 1, 64, 1))
    name = f"flashprefill_sm90/flashprefill_sm90_{suffix(s)}_d{s.dim}"
    ctas = torch.cuda.get_device_properties(0).multi_processor_count
    kernels.launch(name, (ctas,), 512, 1024 * s.dim + 1024, rows, step)
    kernels.launch("flashprefill/flashprefill_relate", (capacity, s.heads), 256, 0, step)
    return spans


def run_xattention(kernels: Kernels, case: Case, only: int | None) -> list[int]:
    """Scores the case; the spans that were in the step."""
    s, capacity = case.shape, len(case.scores)
    cells = s.max_blocks * max(1, s.block // s.stride // 128)
    case.cells = torch.empty(capacity * s.heads * -(-s.span // s.stride) * cells, device="cuda")
    step, spans = case.step(only)
    tiles = -(-s.max_kv_len // (128 * s.stride))
    kernels.launch(f"xattention/xattention_{suffix(s)}", (capacity, tiles, s.kv_heads), 256, 110592, step)
    kernels.launch(f"xattention/xattention_mass_{suffix(s)}", (capacity, s.heads), 256, 0, step)
    return spans


def run_attn_gate(kernels: Kernels, case: Case, only: int | None, gate: Gate) -> list[int]:
    """Scores the case; the spans that were in the step."""
    s, capacity = case.shape, len(case.scores)
    case.cells = torch.empty(len(s.requests) * s.max_blocks * gate.k_heads * gate.gate_dim, device="cuda")
    step, spans = case.step(only)
    name, grid = f"attn_gate/attn_gate_keys_{suffix(s)}", (-(-s.max_blocks // 16), s.kv_heads, capacity)
    kernels.launch(name, grid, 256, 192 * s.dim, step, gate)
    shared = 4 * ((s.group if gate.by_group else 1) + 3) * s.dim + 8 * gate.gate_dim
    kernels.launch(f"attn_gate/attn_gate_{suffix(s)}", (capacity, s.heads), 256, shared, step, gate)
    return spans


def run_fill(kernels: Kernels, case: Case, only: int | None) -> list[int]:
    """Scores the case; the spans that were in the step."""
    step, spans = case.step(only)
    grid = (len(case.scores), case.shape.heads)
    kernels.launch("plain/fill_scores", grid, 256, 0, step, ctypes.c_float(0.25))
    return spans


def fill(case: Case, span: Span) -> tuple[torch.Tensor, float]:
    """The constant, exactly."""
    past = span.past // case.shape.block
    return torch.full((case.shape.heads, past), 0.25, dtype=torch.float64, device="cuda"), 0.0


def faults(case: Case, reference: Reference, run: Callable[[int | None], list[int]]) -> Iterator[str]:
    """What is wrong with a case's scores."""
    run(None)
    got = case.scores.clone()
    run(None)
    if not torch.equal(got.view(torch.int32), case.scores.view(torch.int32)):
        yield "other bits the second time"
    wanted = torch.full_like(got, UNTOUCHED, dtype=torch.float64)
    bounds = torch.zeros(len(got), 1, 1, dtype=torch.float64, device="cuda")
    for i, span in enumerate(case.spans):
        if not span.dense:
            scores, bounds[i] = reference(case, span)
            wanted[i, :, : scores.shape[1]] = scores
    # Weights below 2^-126 are 0.
    off = (got.double() - wanted).abs() / (wanted.abs() + 1e-37)
    off = torch.where(got.isnan() & wanted.isnan(), torch.zeros_like(off), off)
    bad = ~((off <= bounds) | ((wanted.abs() < 1e-36) & (got.abs() < 1e-36)))
    case.worst, case.bound = off.nan_to_num(nan=0).max().item(), bounds.max().item()
    if bad.any():
        at = bad.nonzero()[0].tolist()
        yield f"{int(bad.sum())} of {bad.numel()} off: {at} {got[tuple(at)]} not {wanted[tuple(at)]}"
        yield f"worst {case.worst:.1e}, bound {case.bound:.1e}"
    for req in range(len(case.shape.requests)):
        rows = run(req)
        if not torch.equal(got[rows].view(torch.int32), case.scores[: len(rows)].view(torch.int32)):
            yield f"other bits for request {req} alone"


def shapes() -> Iterator[Shape]:
    """Every shape that all selectors see."""
    for page, block in itertools.product((16, 32, 64, 128, 256), (16, 64, 128, 256)):
        layout = ("NHD", "HND", "interleaved")[(page + block) // 16 % 3]
        yield Shape(RAGGED, (3,), page=page, block=block, layout=layout, query_span=128 * (block > 64))
    for dim, dtype, group in itertools.product((64, 96, 128, 256), (torch.bfloat16, torch.float16), (1, 3, 4, 7)):
        layout = ("NHD", "HND", "interleaved")[group % 3]
        yield Shape(RAGGED, (0,), dim=dim, dtype=dtype, group=group, block=32 + 32 * (group > 3), layout=layout)
    for chunk, past in itertools.product((1, 17, 128, 255, 700), (0, 127, 128, 129, 1000)):
        yield Shape(((chunk, past),), query_span=256, block=128, relative_to_past=chunk % 2 == 1)
    yield Shape(((40, 9000), (1024, 5000)), block=64, page=64)
    yield Shape(((300, 700), (20, 900)), block=64, nan_keys=((0, 130), (1, 910)))
    yield Shape(RAGGED, group=64, kv_heads=1, block=32)
    yield Shape(RAGGED, scale=4.0, dim=64, relative_to_past=True)


def flashprefill_shapes() -> Iterator[Shape]:
    """Beside the common ones several tiles of blocks, the last of any width, and requests that share a CTA."""
    yield from shapes()
    for past in (2000, 3000, 5000, 5400, 9000):
        yield Shape(((300, past), (9, 700), (1024, 4100)), kv_heads=4, block=16, dim=64)
    yield Shape(tuple((1 + 7 * i, 100 + 61 * i) for i in range(40)), (3, 4, 17), kv_heads=1, block=32)
    yield Shape(((1024, 33000), (200, 9000)), kv_heads=8, block=64, page=64, query_span=128)


def xattention_shapes() -> Iterator[Shape]:
    """Strides beside the common shapes."""
    yield from shapes()
    for stride, block in itertools.product((1, 2, 4, 8, 16, 32, 64, 128, 256), (16, 64, 256)):
        if stride <= block:
            page = 16 if block == 64 else 16 << stride % 5
            yield Shape(RAGGED, (3,), stride=stride, block=block, page=page, query_span=128)


def gate_problems() -> Iterator[tuple[Shape, str, int, bool]]:
    """(shape, form, gate_dim, interleaved)."""
    for i, shape in enumerate(shapes()):
        form = ("keys", "both", "group")[i % 3]
        yield shape, form, shape.dim if form == "keys" else (shape.dim, 32, 288)[i // 3 % 3], i % 2 == 1


def main(cubins: str) -> int:
    """Checks each case; the number that fail."""
    kernels, failed = Kernels(Path(cubins)), 0

    def judge(name: str, case: Case, reference: Reference, run: Callable[[int | None], list[int]]) -> bool:
        wrong = list(faults(case, reference, run))
        if wrong:
            print(f"FAIL {name} {case.shape}:", "; ".join(wrong))
        return not wrong

    by_warpgroups = (shape for shape in flashprefill_shapes() if shape.dim in (64, 128))
    simple = (
        ("flashprefill", flashprefill, run_flashprefill, flashprefill_shapes()),
        ("flashprefill_sm90", flashprefill, run_flashprefill_sm90, by_warpgroups),
        ("xattention", xattention, run_xattention, xattention_shapes()),
        ("fill", fill, run_fill, itertools.islice(shapes(), 3)),
    )
    for name, reference, run, all_shapes in simple:
        results, worst = [], (0.0, 0.0)
        for seed, shape in enumerate(all_shapes):
            if name == "xattention":
                shape = dataclasses.replace(shape, stride=min(shape.stride, shape.block))
            case = Case(shape, seed)
            results.append(judge(name, case, reference, lambda only, c=case, r=run: r(kernels, c, only)))
            worst = max(worst, (case.worst / (case.bound or 1), case.worst))
        print(f"{name}: {sum(results)} of {len(results)} right; worst {worst[0]:.2f} of its bound ({worst[1]:.1e})")
        failed += len(results) - sum(results)
    results, worst = [], (0.0, 0.0)
    for seed, (shape, form, gate_dim, interleaved) in enumerate(gate_problems()):
        case = Case(shape, seed)
        gate = GateCase.random(case, form, gate_dim, interleaved)
        struct = gate.struct()
        name = f"attn_gate {form} {gate_dim}"
        results.append(
            judge(
                name,
                case,
                lambda c, span, g=gate: attn_gate(c, span, g),
                lambda only, c=case, g=struct: run_attn_gate(kernels, c, only, g),
            )
        )
        worst = max(worst, (case.worst / case.bound, case.worst) if case.bound else (0.0, 0.0))
    print(f"attn_gate: {sum(results)} of {len(results)} right; worst {worst[0]:.2f} of its bound ({worst[1]:.1e})")
    return failed + len(results) - sum(results)


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1]) else 0)
