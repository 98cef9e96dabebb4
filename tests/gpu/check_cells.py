"""Summaries and the selectors that work by cells on the GPU against f64; prints each failure.

A score is a mean of shares 2^(cell - total), so its relative error is ln 2 times that of the two exponents. A logit's
products of 16-bit elements are exact; a tensor core adds 16 of them to an f32 and may truncate: head_dim / 16 steps of
2^-22 of sum |q k| at most (`reach`, in units of log2). Scale, maximum and cell are each rounded once (2^-24 of at most
`reach` + 12, the log2 of a block's or a row's sum). Sums of n positive terms add n 2^-24 at most, here of up to 64
(lane) + 64 (samples) and what is left of them; ex2 and lg2 add 2^-22 each. Mean keys are of the queries' dtype, and
products with them exact too. All of it twice, for cell and total.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from cells_case import UNTOUCHED, Case, Data, Expected, Kernels, Shape

RAGGED = ((200, 1000), (1, 517), (130, 0), (63, 2100), (7, 129), (70, -30), (128, 128))
EXACT, POOLED, TWO_LEVEL = "exact", "pooled", "two_level"
SM90 = " by sm_90a"
PAIRS = " of two spans by sm_90a"
HELD = " from registers"


def cases() -> Iterator[Shape]:
    """Every shape to check."""
    for page, block in itertools.product((16, 32, 64, 128, 256), (16, 32, 64, 128, 256)):
        layout = ("NHD", "HND", "interleaved")[(page // 16 + block // 16) % 3]
        yield Shape(RAGGED, page=page, block=block, layout=layout, dense=(3,))
    for head_dim, dtype in itertools.product((64, 96, 128, 256), (torch.bfloat16, torch.float16)):
        for layout in ("NHD", "HND", "interleaved"):
            yield Shape(RAGGED, head_dim=head_dim, dtype=dtype, layout=layout, block=32, sample_rows=32)
    for group, rows in itertools.product((1, 3, 4, 7, 16, 64), (0, 1, 5, 32)):
        yield Shape(RAGGED, group=group, kv_heads=1 if group > 7 else 2, sample_rows=rows, dense=(0,))
    for span, rows, group in itertools.product((64, 128), (0, 1, 5, 32), (3, 4)):
        yield Shape(RAGGED, query_span=span, sample_rows=rows, group=group, block=16, dense=(6,))
    yield from cases_of_spans()
    for scale in (0.2, 3.0):
        yield Shape(RAGGED, scale=scale, dtype=torch.float16)
    yield Shape(((40, 9000), (1, 33000)), block=16, kv_heads=1)
    yield Shape(((1500, 700),), sample_rows=32, block=256)
    yield Shape(((1500, 700),), sample_rows=32, block=256, query_span=128)
    for share in (0.01, 1.0):
        yield Shape(RAGGED, candidate_share=share, block=16)
    yield Shape(RAGGED, nan_key=(0, 700, 1), candidate_share=0.1, block=16)


def cases_of_spans() -> Iterator[Shape]:
    """Requests of up to nine spans, some of them dense, whose last blocks not all see."""
    requests = ((530, 1500), (1, 2000), (256, 640), (130, 0), (200, 3333), (64, 700))
    dtypes = (torch.bfloat16, torch.float16)
    for i, (block, head_dim) in enumerate(itertools.product((16, 32, 64, 128, 256), (64, 128, 256))):
        span = (64, 128)[i % 2]
        base = Shape(requests, block=block, head_dim=head_dim, query_span=span, sample_rows=32, dtype=dtypes[i % 2])
        # Rows of both halves of a span, then of one; every second, third or fourth span is dense.
        yield Shape(**{**vars(base), "dense_every": (0, 2, 3)[i % 3], "page": (16, 64, 256)[i % 3]})
        yield Shape(**{**vars(base), "sample_rows": 9, "dense_every": (4, 0, 3)[i % 3], "dense": (4,)})
    yield Shape(((2100, 9000),), kv_heads=1, query_span=512, sample_rows=64, block=32)
    yield Shape(((1040, 9000),), kv_heads=8, query_span=512, sample_rows=32, block=32)


def bound(shape: Shape, reach: float) -> float:
    """Largest relative error of a score; the module says why."""
    logit = shape.head_dim / 16 * 2**-22 * reach + 3 * 2**-24 * (reach + 12)
    return 2 * math.log(2) * logit + 2 * (128 * 2**-24 + 2 * 2**-22)


def reset(case: Case) -> None:
    """Poisons what a launch must write before it reads, and marks what it must leave alone."""
    case.scores.fill_(UNTOUCHED)
    case.cells.fill_(math.nan)


def run(kernels: Kernels, case: Case, what: str, x: int = 0) -> None:
    """All launches of a selector."""
    reset(case)
    own = "_pairs_sm90" if what.endswith(PAIRS) else "_sm90" if what.endswith(SM90) else ""
    if what.startswith(EXACT):
        kernels.score(case, "cells_read" + own, "mass_lists" if what.endswith(HELD) else "cells_mass", x)
        return
    kernels.score(case, "cells_pool", x=x)
    if what.startswith(TWO_LEVEL):
        case.ranked = case.scores.clone()
        kernels.two_level(case, own, "mass_lists listed" if what.endswith(HELD) else "two_level_mass", x)


def score_faults(case: Case, what: str) -> Iterator[str]:
    """Where scores are wrong."""
    shape = case.data.shape
    bits = case.bits() if what.startswith(TWO_LEVEL) else None
    for s, span in enumerate(case.spans):
        for kv_head in range(shape.kv_heads):
            got = case.scores[s, kv_head * shape.group : (kv_head + 1) * shape.group]
            past = 0 if span.dense else span.past // shape.block
            if not bool((got[:, past:] == UNTOUCHED).all()):
                yield f"span {s}: wrote more than {past} past blocks"
            if past == 0:
                continue
            expected = Expected(case, span, kv_head)
            cells = expected.exact if what.startswith(EXACT) else expected.pooled
            chosen = torch.ones(past, dtype=torch.bool, device="cuda")
            if bits is not None:
                chosen = bits[s, kv_head, :past]
                yield from candidate_faults(case, s, kv_head, chosen)
                every = torch.nn.functional.pad(chosen, (0, expected.blocks - past), value=True)
                cells = torch.where(every, expected.exact, expected.pooled)
            want = expected.mass(cells)
            want = torch.where(chosen | want.isnan(), want, 0.0)
            error = (got[:, :past].double() - want).abs() / (want + 1e-30)
            most = bound(shape, expected.reach)
            if not bool((got[:, :past].isnan() == want.isnan()).all()):
                yield f"span {s} head {kv_head}: NaN {int(got[:, :past].isnan().sum())}, not {int(want.isnan().sum())}"
            worst = float(error.nan_to_num(0.0).max())
            case.worst = max(case.worst, worst / most)
            if worst > most:
                yield f"span {s} head {kv_head}: error {worst:.2e}, at most {most:.2e}"


def candidate_faults(case: Case, s: int, kv_head: int, chosen: torch.Tensor) -> Iterator[str]:
    """Candidates must be exactly those of the f32 sums that they were ranked by (rust/select/two_level.rs)."""
    shape, n = case.data.shape, len(chosen)
    share = torch.tensor(shape.candidate_share, dtype=torch.float32).double().item()
    wanted = n if share >= 1 else min(n, math.ceil(share * n * (1 - 2**-23)))
    sums = torch.zeros(n, device="cuda")
    for head in range(kv_head * shape.group, (kv_head + 1) * shape.group):
        sums += case.ranked[s, head, :n].nan_to_num(0.0)
    rank = [(not (j < 1 or n - j <= 1), -x, j) for j, x in enumerate(sums.tolist())]
    want = {j for _, _, j in sorted(rank)[: max(wanted, min(n, 2))]}
    got = set(chosen.nonzero().flatten().tolist())
    if got != want:
        yield f"span {s} head {kv_head}: candidates {sorted(got)[:9]}, not {sorted(want)[:9]}"


def summary_faults(kernels: Kernels, case: Case) -> Iterator[str]:
    """Means of completed blocks, then of all; f64 sums make them the nearest f32 but for a rare tie of bf16."""
    shape = case.data.shape
    for which in (0, 1):
        want_k, want_v = torch.full_like(case.k_mean, math.nan), torch.full_like(case.v_mean, math.nan)
        for req in case.requests:
            q_len, kv_len = len(case.data.q[req]), len(case.data.k[req])
            first = 0 if which else max(0, kv_len - q_len) // shape.block
            for block in range(first if q_len else 1 << 30, kv_len // shape.block):
                tokens = slice(block * shape.block, (block + 1) * shape.block)
                page = case.data.tables[req][(tokens.stop - 1) // shape.page]
                slot = page * case.slots + block % case.slots
                want_k[slot] = case.data.k[req][tokens].double().mean(0).float()
                want_v[slot] = case.data.v[req][tokens].double().mean(0).float()
        for x, with_v in ((0, True), (3, which == 0)):
            case.k_mean.fill_(math.nan)
            case.v_mean.fill_(math.nan)
            kernels.summaries(case, which, x, with_v)
            pairs = [(case.k_mean, want_k), (case.v_mean, want_v if with_v else torch.full_like(want_v, math.nan))]
            for got, want in pairs:
                if not bool(torch.isclose(got, want, rtol=2**-23, atol=0, equal_nan=True).all()):
                    yield f"summaries {which}, grid {x}: {int((got != want).sum() - want.isnan().sum())} other means"


def refusal_faults(kernels: Kernels) -> Iterator[str]:
    """Lengths and pages out of range are skipped; the other requests' means are there."""
    data = Data(Shape(((64, 64), (64, 64), (64, 64), (64, 64)), block=32), 5)
    case = Case(data, [0, 1, 2, 3])
    case.seq[0], case.seq[1] = -5, 1 << 30
    case.table[2, 6] = data.num_pages
    kernels.summaries(case, 1, 4)
    # Blocks 0..3 of request 3, and of request 2 all but block 3, which holds tokens 96..128.
    written = int((~case.k_mean[:, 0, 0].isnan()).sum())
    if written != 7:
        yield f"refusals: {written} blocks written, not 7"


def batch_faults(kernels: Kernels, case: Case, what: str) -> Iterator[str]:
    """A request alone, under other maxima, gets the bits it gets in the batch."""
    for at in range(len(case.requests)):
        alone = Case(case.data, [case.requests[at]], extra_blocks=37)
        if not alone.spans:
            continue
        kernels.summaries(alone, 1, 50)
        run(kernels, alone, what)
        mine = [s for s, span in enumerate(case.spans) if span.req == at]
        for s, other in zip(mine, range(len(alone.spans)), strict=True):
            past = case.spans[s].past // case.data.shape.block
            pair = (case.scores[s, :, :past], alone.scores[other, :, :past])
            if not torch.equal(*[x.contiguous().view(torch.int32) for x in pair]):
                yield f"span {s}: other bits when alone"


def pair_faults(kernels: Kernels, case: Case) -> Iterator[str]:
    """Keys read once for two spans fill the same cells with the same bits, and no others, by any number of CTAs."""
    for tile in range(case.tiles):
        case.cells.fill_(math.nan)
        kernels.cells(case, "cells_read_sm90", tile)
        want = case.cells.clone()
        for x in (0, 1, 7, 16):
            case.cells.fill_(math.nan)
            kernels.cells(case, "cells_read_pairs_sm90", tile, x)
            other = int((case.cells.view(torch.int32) != want.view(torch.int32)).sum())
            if other:
                yield f"tile {tile}: {other} other cells by {x or 132} CTAs"
        if tile == 0 and bool(want.isnan().all()):
            yield "no cells at all"


def small_faults(kernels: Kernels, case: Case) -> Iterator[str]:
    """Keys and means in pieces fill the same cells with the same bits as whole ones, and no others."""
    run(kernels, case, POOLED)
    kernels.candidates(case)
    candidates = case.cells[case.num_cells :].clone()
    for name, tile in itertools.product(("cells_read", "cells_read_candidates", "cells_pool"), range(case.tiles)):
        case.cells.fill_(math.nan)
        case.cells[case.num_cells :] = candidates
        kernels.cells(case, name, tile)
        want = case.cells.clone()
        if tile == 0 and bool(want[: case.num_cells].isnan().all()):
            yield f"{name}: no cells at all"
        for x in (0, 1, 7):
            case.cells[: case.num_cells] = math.nan
            kernels.cells(case, name + "_small", tile, x)
            other = int((case.cells.view(torch.int32) != want.view(torch.int32)).sum())
            if other:
                yield f"{name}_small, tile {tile}: {other} other cells by {x or 'the usual'} CTAs"


def can_hold(case: Case) -> bool:
    """Whether mass_lists takes the case and each of its requests alone: 32 rows of 4096 blocks."""
    longest = max(span.len for span in case.spans)
    return case.tiles == 1 and min(case.data.shape.sample_rows or longest, longest) <= 32 and case.max_blocks <= 4000


def faults(kernels: Kernels, shape: Shape, seed: int, worst: list[float]) -> Iterator[str]:
    """All that is wrong with one case; its worst error, in bounds, goes to `worst`."""
    data = Data(shape, seed)
    case = Case(data, list(range(len(shape.requests))))
    if not shape.nan_key:
        yield from summary_faults(kernels, case)
    kernels.summaries(case, 1, 1000)
    own = (EXACT + SM90, TWO_LEVEL + SM90, EXACT + PAIRS) if kernels.has_sm90 else ()
    if own:
        yield from pair_faults(kernels, case)
    if kernels.has_small:
        yield from small_faults(kernels, case)
    held = (EXACT + HELD, TWO_LEVEL + HELD) if can_hold(case) else ()
    for what in (EXACT, POOLED, TWO_LEVEL, *own, *held):
        run(kernels, case, what)
        torch.cuda.synchronize()
        yield from (f"{what}: {fault}" for fault in score_faults(case, what))
        first = case.scores.clone()
        # By few CTAs, and on sm_90a also by so many that each reads one head of an only span.
        run(kernels, case, what, x=16 if what.endswith(SM90) and seed % 2 else 1 + seed % 3)
        if not torch.equal(first.view(torch.int32), case.scores.view(torch.int32)):
            yield f"{what}: other bits the second time"
        if seed % 4 == 0:
            yield from (f"{what}: {fault}" for fault in batch_faults(kernels, case, what))
    worst.append(case.worst)


def main(cubins: str, every: int = 1, head_dim: int = 0) -> int:
    """Checks each `every`-th case, of one head_dim if it is named; the number that fail."""
    loaded: dict[tuple[torch.dtype, int], Kernels] = {}
    failures = count = 0
    worst: list[float] = []
    wanted = [(seed, shape) for seed, shape in enumerate(cases()) if head_dim in (0, shape.head_dim)]
    for seed, shape in wanted[::every]:
        key = (shape.dtype, shape.head_dim)
        if key not in loaded:
            loaded[key] = Kernels(Path(cubins), *key)
        found = list(itertools.islice(faults(loaded[key], shape, seed, worst), 6))
        count += 1
        if found:
            failures += 1
            print(f"FAIL {shape}", *found, sep="\n  ", flush=True)
    for fault in refusal_faults(loaded[torch.bfloat16, 128]) if (torch.bfloat16, 128) in loaded else ():
        failures += 1
        print("FAIL", fault)
    print(f"{count - failures} of {count} cases right, worst error {max(worst, default=0.0):.2f} of its bound")
    return failures


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1], *map(int, sys.argv[2:])) else 0)
