"""attend on the GPU against fp64 over pages, layouts, groups, ragged lengths and densities; prints each failure.

P and O are rounded to bf16, by up to 2^-8 of a power of two: 1.6e-3 rms each, 2.3e-3 together; bound 4e-3. fp16 has
3 bits more: 5e-4. lse is fp32 throughout: 2^-22 of exponentials, and 2^-23 of logits up to 100; bound 1e-4, and 1e-6 of
greater ones. Both runs of a case must give the same bits.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from attend_case import ARCHS, NAMES, Case, Kernels, Shape

BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 5e-4}
LSE_BOUND = 1e-4
RAGGED = ((200, 1000), (1, 517), (513, 0), (63, 4096), (7, 129), (128, 128))


def cases() -> Iterator[Shape]:
    """Shapes for every kernel."""
    yield from list_cases()
    yield from length_cases()
    yield from loud_cases()


def loud_cases() -> Iterator[Shape]:
    """Maxima that grow late in a stream. fp16's bound leaves logits of a few hundred at most."""
    requests = ((200, 3000), (1, 2000), (130, 1500))
    for loud, dtype in ((64.0, torch.bfloat16), (16.0, torch.float16)):
        for density, num_ctas in ((1.0, 132), (0.4, 132), (1.0, 7)):
            yield Shape(requests, density=density, num_ctas=num_ctas, dtype=dtype, loud=loud)


def list_cases() -> Iterator[Shape]:
    """Pages, layouts, and how lists are shared."""
    for page, layout in itertools.product((16, 32, 64, 128, 256), ("NHD", "HND", "interleaved")):
        for block in (64, 128, 256):
            yield Shape(RAGGED, page_size=page, block_size=block, layout=layout, density=0.4)
    for group in (1, 2, 3, 5, 6, 7, 8, 16, 32):
        yield Shape(RAGGED, group=group, page_size=16, block_size=64, density=0.7)
    for group, heads in ((4, 1), (5, 1), (4, 3), (5, 2), (5, 3), (7, 2), (7, 3), (64, 48)):
        for span in (0, 192):
            yield Shape(RAGGED, group=group, heads_per_list=heads, list_span=span, block_size=64, spread=0.5)
    for page, group in itertools.product((16, 256), (1, 3, 4)):
        yield Shape(RAGGED, group=group, page_size=page, dtype=torch.float16, spread=0.5)
    yield Shape(RAGGED, page_size=8, block_size=64)
    yield Shape(RAGGED, page_size=16, holes=True)


def length_cases() -> Iterator[Shape]:
    """Ragged ends, and where items are cut."""
    for density in (0.0, 0.05, 1.0):
        yield Shape(RAGGED, density=density, page_size=64)
    for chunk, past in itertools.product((1, 31, 32, 33, 127, 257), (0, 1, 127, 128, 129, 1000)):
        yield Shape(((chunk, past),), page_size=16, block_size=64, density=0.5)
    for num_ctas, spread in itertools.product((1, 2, 7, 131, 132, 264, 500), (0.0, 0.8)):
        yield Shape(RAGGED, page_size=32, density=0.5, spread=spread, num_ctas=num_ctas)
        yield Shape(RAGGED, page_size=32, density=0.5, spread=spread, num_ctas=num_ctas, whole_items=True)
    for num_ctas in (3, 40, 132):
        yield Shape(((5, 20000),), kv_heads=1, group=8, density=1.0, num_ctas=num_ctas)
    yield Shape(((300, -170), (5, 40), (64, -63)), page_size=32)
    yield Shape(((300, -170), (5, -5), (64, -63)), page_size=32, list_span=64, heads_per_list=3)
    yield Shape(tuple((100 + 37 * i, 300 * i) for i in range(20)), kv_heads=4, density=0.3)


def sm90_cases(head_dim: int) -> Iterator[Shape]:
    """All of them."""
    yield from (replace(shape, head_dim=head_dim) for shape in cases())


def sm80_cases(head_dim: int) -> Iterator[Shape]:
    """What only the sm_80 kernel takes: small boxes, any stride; and a few of the others for each head_dim."""
    few = [s for i, s in enumerate(cases()) if i % 7 == 3 or s.holes or s.dtype == torch.float16]
    yield from (replace(shape, head_dim=head_dim) for shape in (few if head_dim != 128 else cases()))
    for page, block in ((16, 1), (256, 1), (64, 2), (16, 4), (1, 1), (2, 64), (4, 256), (8, 8)):
        for dtype in BOUNDS:
            ragged = Shape(RAGGED[:5], page_size=page, block_size=block, dtype=dtype, head_dim=head_dim)
            yield ragged
            yield replace(ragged, layout="padded", heads_per_list=3, holes=True, list_span=96)


def main() -> int:
    """Checks each case; the number that fail."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cubins", type=Path)
    parser.add_argument("--arch", choices=list(ARCHS), default="sm90")
    parser.add_argument("--head-dims", type=int, nargs="*", help="without: all that the kernels of `arch` serve")
    parser.add_argument("--stride", type=int, default=1, help="checks one case of so many")
    parser.add_argument("--loud", action="store_true", help="only those whose maxima grow late")
    args = parser.parse_args()
    failures = 0
    for head_dim in args.head_dims or ARCHS[args.arch]:
        kernels = {dtype: Kernels(args.cubins, args.arch, dtype, head_dim) for dtype in NAMES}
        shapes = sm90_cases(head_dim) if args.arch == "sm90" else sm80_cases(head_dim)
        if args.loud:
            shapes = (shape for shape in shapes if shape.loud > 1)
        failures += check(kernels, itertools.islice(shapes, 0, None, args.stride), f"{args.arch} d{head_dim}")
    return failures


def check(kernels: dict[torch.dtype, Kernels], shapes: Iterator[Shape], name: str) -> int:
    """Runs each shape twice; the number that fail."""
    worst, failures, count = 0.0, 0, 0
    for seed, shape in enumerate(shapes):
        case = Case(shape, seed, scale=(0.3, 1.0, 2.0)[seed % 3])
        case.launch(kernels[shape.dtype])
        torch.cuda.synchronize()
        error, lse_error = case.errors()
        faults = case.plan_faults()
        first = case.out.clone()
        case.launch(kernels[shape.dtype])
        if not torch.equal(first, case.out):
            faults.append("other bits the second time")
        count += 1
        worst = max(worst, error)
        if faults or not (error < BOUNDS[shape.dtype] and lse_error < LSE_BOUND):
            failures += 1
            print(f"FAIL {error:.2e} lse {lse_error:.2e} {', '.join(faults)} {shape}", flush=True)
    print(f"{name}: {count - failures} of {count} cases right, worst relative error {worst:.2e}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
