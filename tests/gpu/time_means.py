"""Times plan and attend with mean correction beside the same lists without it: graph replays, medians, in turn.

Both are checked against fp64 first, on every density; what the correction adds is printed as a share.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from attend_case import ARCHS, NAMES, SPAN_INTS, TOKENS, Case, Kernels, Shape
from driver import Kernel, tensor_map
from params import Means
from time_attend import graph, times_ms

PAST = 5  # of a span's numbers
MEAN_TOKENS = 512  # that share a mean


class Corrected:
    """A case with means of every whole past block, in summaries that are NaN elsewhere, and bits of its lists."""

    # [list rows, rows]: what kernels count.
    skipped: torch.Tensor

    def __init__(self, case: Case) -> None:
        self.case, s = case, case.shape
        past = torch.tensor([past for _, past in s.requests])
        self.blocks = [int(n) // s.block_size for n in past]
        spans = case.list_spans.view(-1, SPAN_INTS)
        spans[:, PAST] = past.to("cuda", torch.int32)[spans[:, 0].long()]
        width = max(len(table) for table in case.block_tables)
        self.table = torch.full((len(s.requests), width), -1, device="cuda", dtype=torch.int32)
        for row, pages in zip(self.table, case.block_tables, strict=True):
            row[: len(pages)] = pages
        self.bits = self._bits()
        self.k_mean, self.v_mean, self.means = self._summaries()
        self.run = MEAN_TOKENS // s.block_size  # blocks of a mean
        rows = -(-max(1, *self.blocks) // (TOKENS * self.run)) * TOKENS
        shape = (len(s.requests), s.kv_heads, rows, s.head_dim)
        self.k, self.v = (torch.full(shape, math.nan, device="cuda", dtype=s.dtype) for _ in range(2))
        self._encode(rows)

    def _bits(self) -> torch.Tensor:
        """[list rows, words], from the slots that the lists read."""
        case, s = self.case, self.case.shape
        words = -(-max(case.kv_lens) // s.block_size + 31) // 32 + 1
        bits = torch.zeros(len(case.slots), words * 32, device="cuda", dtype=torch.int64)
        for row, slots in enumerate(case.slots):
            table = case.block_tables[case.spans[row // (s.kv_heads * s.parts)].request]
            logical = torch.empty(case.num_pages, device="cuda", dtype=torch.int64)
            logical[table] = torch.arange(len(table), device="cuda")
            tokens = logical[slots // s.page_size] * s.page_size + slots % s.page_size
            bits[row, tokens // s.block_size] = 1
        shifted = bits.view(len(case.slots), words, 32) << torch.arange(32, device="cuda")
        return shifted.sum(-1).to(torch.uint32)

    def _summaries(self) -> tuple[torch.Tensor, torch.Tensor, list[list[torch.Tensor]]]:
        """Summaries of keys and values, and per request the means [blocks, kv_heads, head_dim] in fp64."""
        case, s = self.case, self.case.shape
        slots = max(1, s.page_size // s.block_size)
        full = (case.num_pages * slots, s.kv_heads, s.head_dim)
        summaries = [torch.full(full, math.nan, device="cuda") for _ in range(2)]
        means: list[list[torch.Tensor]] = []
        for table, count in zip(case.block_tables, self.blocks, strict=True):
            block = torch.arange(count, device="cuda")
            token = block[:, None] * s.block_size + torch.arange(s.block_size, device="cuda")
            page = table[token // s.page_size]
            slot = page[:, -1] * slots + block % slots
            means.append([pool[page, token % s.page_size].double().mean(1) for pool in (case.k, case.v)])
            for into, mean in zip(summaries, means[-1], strict=True):
                into[slot] = mean.float()
        return summaries[0], summaries[1], means

    def _encode(self, rows: int) -> None:
        case, s = self.case, self.case.shape
        step = case.step
        step.batch.block_table, step.batch.table_stride = self.table.data_ptr(), self.table.stride(0)
        step.layout.log2_page_tokens = int(math.log2(s.page_size))
        step.layout.log2_block_tokens = int(math.log2(s.block_size))
        self.skipped = torch.full((len(case.slots), rows), 0xFF, device="cuda", dtype=torch.uint8)
        pointers = (self.k, self.v, self.skipped, self.k_mean, self.v_mean, case.list_spans, self.bits)
        lists = s.kv_heads * s.parts
        block = step.layout.log2_block_tokens
        extents = (rows, s.kv_heads, s.head_dim, lists, self.bits.shape[1], block, self.run.bit_length() - 1)
        self.params = Means(*[t.data_ptr() for t in pointers], *extents)
        self.maps = []
        tokens = ARCHS["sm90"][s.head_dim].map_tokens if case.maps else 0
        for pool in (self.k, self.v) if tokens else ():
            sizes = (64, rows, s.head_dim // 64, s.kv_heads, len(s.requests))
            strides = (s.head_dim, 64, pool.stride(1), pool.stride(0))
            self.maps.append(tensor_map(pool, sizes, strides, (64, tokens, 1, 1, 1)))
        # One parameter.
        both = b"".join(bytes(one) for one in self.maps)
        self.maps = [(ctypes.c_uint8 * len(both)).from_buffer_copy(both)] if both else []

    def launch(self, kernels: CorrectedKernels) -> None:
        """As Case.launch."""
        case, plain = self.case, kernels.plain
        kernels.plan.launch((kernels.plan_ctas, 1), 1024, [case.step, self.params])
        maps = [*case.maps, *self.maps] if plain.traits.map_tokens else []
        kernels.attend.launch((case.shape.num_ctas, 1), plain.traits.threads, [*maps, case.params, self.params])

    def expected(self) -> Iterator[tuple[slice, int, torch.Tensor, torch.Tensor]]:
        """As Case.expected, with a mean for each run of past blocks of which a list leaves some out."""
        case, s = self.case, self.case.shape
        heads = s.kv_heads * s.group
        for i, (tokens, head, out, lse) in enumerate(Case.expected(case)):
            span, kv_head = i // heads, head // s.group
            row = (span * s.kv_heads + kv_head) * s.parts + head % s.group // s.list_heads
            request = case.spans[span].request
            block = torch.arange(self.blocks[request], device="cuda")
            is_out = (self.bits[row].to(torch.int64)[block // 32] >> block % 32 & 1) == 0
            left_out = torch.stack([run.sum() for run in is_out.split(self.run)])
            k, v = (self._of_runs(mean[:, kv_head])[left_out > 0] for mean in self.means[request])
            weight = (1.5 * left_out[left_out > 0].double() * s.block_size).log()
            logits = case.q[tokens, head].double() @ k.T * case.scale + weight
            both = torch.cat([lse[:, None], logits], 1)
            total = torch.logsumexp(both, 1)
            weights = (both - total[:, None]).exp().nan_to_num_(nan=0.0)
            yield tokens, head, weights[:, :1] * out + weights[:, 1:] @ v, total

    def _of_runs(self, means: torch.Tensor) -> torch.Tensor:
        """Means [blocks, head_dim] of blocks to those of runs."""
        return torch.stack([run.mean(0) for run in means.split(self.run)])

    def errors(self) -> tuple[float, float]:
        """As Case.errors."""
        self.case.expected = self.expected
        try:
            return self.case.errors()
        finally:
            del self.case.expected


class CorrectedKernels:
    """plan and attend that correct; what they share with `plain`."""

    def __init__(self, folder: Path, arch: str, plain: Kernels, dtype: torch.dtype, head_dim: int) -> None:
        name = f"{NAMES[dtype]}_d{head_dim}"
        entry = f"compactattn_attend_{arch[:4]}_{name}_means"
        self.plain = plain
        self.plan = Kernel(folder / "work.cubin", f"compactattn_plan_work_means_{NAMES[dtype]}", 0)
        self.attend = Kernel(folder / f"{arch}_{name}.cubin", entry, plain.traits.shared_bytes)
        self.plan_ctas = torch.cuda.get_device_properties(0).multi_processor_count


def time_density(shape: Shape, kernels: CorrectedKernels, repeats: int) -> None:
    """Checks, then prints the medians of both and what the correction adds."""
    pairs = [(case, Corrected(case)) for case in (Case(shape, seed) for seed in range(2))]
    errors = []
    for launch, check in ((Case.launch, Case.errors), (None, None)):
        case, corrected = pairs[0]
        case.out.fill_(math.nan)
        if launch and check:
            launch(case, kernels.plain)
            errors.append(check(case)[0])
        else:
            corrected.launch(kernels)
            errors.append(corrected.errors()[0])
    plain = itertools.cycle([graph(lambda case=case: case.launch(kernels.plain)) for case, _ in pairs])
    means = itertools.cycle([graph(lambda corrected=corrected: corrected.launch(kernels)) for _, corrected in pairs])
    off, on = times_ms([lambda: next(plain).replay(), lambda: next(means).replay()], repeats)
    lists = "group" if shape.list_heads == shape.group else f"{shape.list_heads} head"
    where = f"d{shape.head_dim} page {shape.page_size:3d} {lists:6s} lists, density {shape.density:4.2f}"
    print(f"{where}: off {off:6.4f} ms, on {on:6.4f} ms, +{100 * (on / off - 1):4.1f} %", end="; ")
    print(f"errors {errors[0]:.1e} {errors[1]:.1e}", flush=True)


def main() -> None:
    """Times what the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cubins", type=Path)
    parser.add_argument("--arch", choices=list(ARCHS), default="sm90")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--context", type=int, default=131072)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pages", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--heads", type=int, nargs=2, default=[8, 4], help="KV heads, query heads of each")
    parser.add_argument("--heads-per-list", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    plain = Kernels(args.cubins, args.arch, head_dim=args.head_dim)
    kernels = CorrectedKernels(args.cubins, args.arch, plain, torch.bfloat16, args.head_dim)
    requests = ((args.chunk, args.context - args.chunk),) * args.batch
    for heads, page, density in itertools.product(args.heads_per_list, args.pages, args.densities):
        shape = Shape(requests, *args.heads, page, args.block_size, "NHD", density, head_dim=args.head_dim)
        ctas = shape.num_ctas * plain.traits.ctas_per_sm
        time_density(dataclasses.replace(shape, heads_per_list=heads, num_ctas=ctas), kernels, args.repeats)


if __name__ == "__main__":
    main()
