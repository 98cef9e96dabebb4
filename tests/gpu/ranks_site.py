"""A rank's memory and what it does in a step: pools, noise, plans; a layer's forward, then the ranks' sum of it."""

from __future__ import annotations

from collections.abc import Callable

import compactattn
import torch
import torch.distributed as dist
from compactattn import Batch, Plan, PlanDesc, Settings, Stats
from ranks_engine import MODES, RUN, Scale, Step
from ranks_reference import Given, judge, pages_of
from torch import Tensor


class Noise:
    """Keys, values and queries ``[tokens, heads, dim]`` bf16, that a request's tokens are cut from.

    Every tenth run of tokens has keys that queries look for, so that there is something to select: their logits are
    higher by ``LOUD``.
    """

    def __init__(self, scale: Scale, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        tokens, heads, dim = scale.noise, scale.num_kv_heads, scale.head_dim

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        sought = normal(heads, dim)
        loud = (torch.rand(tokens // RUN, generator=generator) < 1 / 10).repeat_interleave(RUN)
        keys = normal(tokens, heads, dim) + loud[:, None, None] * sought * (LOUD / dim**0.5)
        group = scale.num_q_heads // heads
        queries = normal(tokens, scale.num_q_heads, dim) + sought.repeat_interleave(group, dim=0)
        self.keys, self.queries = keys.bfloat16().to(device), queries.bfloat16().to(device)
        self.values = normal(tokens, heads, dim).bfloat16().to(device)


class Site:
    """All of it; results of a step lie in ``digest`` and ``bad`` on the device until :meth:`found` fetches them."""

    def __init__(self, scale: Scale, rank: int, seed: int, device: torch.device) -> None:
        self.scale, self.rank, self.device = scale, rank, device
        pool = (scale.num_layers, scale.num_pages, scale.page_size, scale.num_kv_heads, scale.head_dim)
        # What nobody has written is NaN, before a page's first owner and after each.
        self.k, self.v = (torch.full(pool, torch.nan, dtype=torch.bfloat16, device=device) for _ in range(2))
        own, alike = Noise(scale, 2 * seed + 2 + rank, device), Noise(scale, -1 - seed, device)
        # The last layer has the same keys, values and queries on both ranks.
        self.noise = [own] * (scale.num_layers - 1) + [alike]
        rows = (scale.max_total_q, scale.num_q_heads, scale.head_dim)
        self.q, self.out, self.sum = (torch.zeros(rows, dtype=torch.bfloat16, device=device) for _ in range(3))
        self.lse = torch.zeros(scale.num_q_heads * scale.max_total_q, device=device)
        self.context = compactattn.Context(str(device))
        self.plans = {mode: self.plan(mode) for mode in MODES}
        # Of every layer's sum; of the first layer's output, and of the last's.
        self.digest = torch.zeros(scale.num_layers + 2, dtype=torch.int64, device=device)
        # Steps with an output that is not finite; sums of the last layer that are not twice the rank's own.
        self.bad = torch.zeros(2, dtype=torch.int64, device=device)
        self.spoil: str | None = None

    def plan(self, mode: str) -> Plan:
        """A new one."""
        scale, settings = self.scale, Settings.mode(mode)
        if mode != "dense":
            settings = settings.replace(**scale.changes)
        limits = (scale.max_num_reqs, scale.max_total_q, scale.max_kv_len)
        shape = (scale.num_q_heads, scale.num_kv_heads, scale.head_dim, scale.page_size)
        return Plan(PlanDesc(*shape, "bf16", *limits, settings=settings, num_layers=scale.num_layers), self.context)

    def step(self, step: Step, judged: bool, at: Callable[[int, int], None]) -> float | None:
        """All layers; the share of KV that was read, where one is ``judged``.

        ``at(layer, what)`` hears what comes next: attention 0, the all-reduce 1, the reference 2.
        """
        freed = self._send(torch.tensor(step.freed, dtype=torch.int64))
        for pool in (self.k, self.v):
            pool.index_fill_(1, freed, torch.nan)
        tensors = self._describe(step)
        slots, source = self._places(step)
        share = None
        for layer in range(self.scale.num_layers):
            at(layer, 0)
            given = self._forward(step, layer, tensors, (slots, source))
            at(layer, 1)
            self._sum(step.total_q, layer)
            if judged and layer == step.judged[1]:
                at(layer, 2)
                share = judge(given, step.judged[0], step.judged[2])
        return share

    def _describe(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """block_table, seq_lens, cu_seqlens_q; entries beyond a request's pages are -1."""
        table = torch.full((len(step.chunks), self.scale.width), -1, dtype=torch.int32)
        for row, chunk in zip(table, step.chunks, strict=True):
            used = -(-chunk.end // self.scale.page_size)
            row[:used] = pages_of(chunk)[:used]
            if self.spoil == "table" and used > 8:
                row[[0, 8]] = row[[8, 0]]
        lens = torch.tensor([chunk.end for chunk in step.chunks], dtype=torch.int32)
        starts = torch.tensor([*(chunk.row for chunk in step.chunks), step.total_q], dtype=torch.int32)
        return self._send(table), self._send(lens), self._send(starts)

    def _places(self, step: Step) -> tuple[Tensor, Tensor]:
        """Of each of the step's tokens: its slot in the pool, and where in the noise it is cut from."""
        slots, source, page = [], [], self.scale.page_size
        for chunk in step.chunks:
            places = torch.arange(chunk.first, chunk.end)
            slots.append(pages_of(chunk)[places // page] * page + places % page)
            source.append(places + chunk.request.origin)
        return self._send(torch.cat(slots)), self._send(torch.cat(source))

    def _send(self, tensor: Tensor) -> Tensor:
        """To the device, without waiting for it."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _forward(
        self, step: Step, layer: int, tensors: tuple[Tensor, Tensor, Tensor], places: tuple[Tensor, Tensor]
    ) -> Given:
        scale, noise, total_q = self.scale, self.noise[layer], step.total_q
        slots, source = places
        # Layers of one noise differ in where they begin in it.
        source = (source + layer * 7 * RUN) % scale.noise
        k, v = self.k[layer], self.v[layer]
        keys = noise.keys[source]
        if self.spoil == "keys" and layer == scale.num_layers - 1:
            keys[0] += 1
        k.flatten(0, 1).index_copy_(0, slots, keys)
        v.flatten(0, 1).index_copy_(0, slots, noise.values[source])
        q, out = self.q[:total_q], self.out[:total_q]
        lse = self.lse[: total_q * scale.num_q_heads].view(scale.num_q_heads, total_q)
        torch.index_select(noise.queries, 0, source, out=q)
        plan, batch = self.plans[step.mode], Batch.of(q, k, v, *tensors)
        plan.forward(batch, out, lse, layer=layer)
        if self.spoil == "twice" and layer == 0:
            plan.forward(batch, out, lse, layer=layer)
        if self.spoil == "answer" and layer < scale.num_layers - 1:
            out *= 1.1
        return Given(scale, plan, batch, layer, q, k, v, out, lse, step.chunks)

    def _sum(self, total_q: int, layer: int) -> None:
        """The all-reduce; what it says about both ranks goes to ``digest`` and ``bad``."""
        out, total, last = self.out[:total_q], self.sum[:total_q], self.scale.num_layers - 1
        total.copy_(out)
        dist.all_reduce(total)
        if self.spoil == "sum" and layer == 1:
            total[0, 0, 0] += 1
        self._digest(layer, total)
        self.bad[0] += ~torch.isfinite(out.sum(dtype=torch.float32))
        if layer == 0:
            self._digest(last + 1, out)
        if layer == last:
            self._digest(last + 2, out)
            # Doubling is exact.
            self.bad[1] += (total != 2 * out).any()

    def _digest(self, i: int, tensor: Tensor) -> None:
        # Integers wrap alike on all devices, and their sum has no order.
        words = tensor.view(torch.int32).sum(dtype=torch.int64)
        self.digest[i].mul_(1_000_003).add_(words)

    def stats(self) -> dict[tuple[str, int], Stats]:
        """What each mode has counted in each layer; right once the device is done."""
        layers = range(self.scale.num_layers)
        return {(mode, layer): plan.stats(layer) for mode, plan in self.plans.items() for layer in layers}

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()


# Added to a logit: e^6 times the weight.
LOUD = 6.0
