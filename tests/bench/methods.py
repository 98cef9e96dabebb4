"""CompactAttention's methods in the chunked prefill of module.py, each made to read a wanted share of the past.

Weights and hidden states are random there, so a method's own setting would say nothing. A method that decides a list
at once is told the share (`keep` density). One that decides row by row and unites keeps its own rule, and the rule's
number is found by bisection on the last chunk until the union reads the share: what a row asked for is then known too.
(attn_gate's threshold is absolute and would read most of short contexts: its rows are told a share.)
"""

from __future__ import annotations

import functools
import json
import math
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import module
import torch
from shapes import Shape

# Preset and changes; what keeps by row is calibrated, the others are told.
METHODS: dict[str, tuple[str, str]] = {
    "dense": ("mode", "dense"),
    "ours": ("mode", "compactattn"),
    "pooled_mass": ("of", "pooled_mass"),
    "two_level": ("of", "two_level"),
    "flashprefill-union": ("mode", "paper"),
    "flashprefill-block_sparse": ("mode", "block_sparse"),
    "xattention": ("of", "xattention"),
    "attn_gate": ("of", "attn_gate"),
    "quoka": ("of", "quoka"),
}
# Selectors that score by block means.
READ_MEANS = ("flashprefill", "pooled_mass", "two_level")
# Of a rule's number: the least that is tried, and how near the share must come.
LEAST, NEAR = 1e-7, 0.002
PROBES = 40


def build(package: Any, method: str, density: float) -> Ours:
    """A method that reads `density` of the past; ValueError for one that nobody knows."""
    if method not in METHODS:
        raise ValueError(f"no method {method!r}: {', '.join(METHODS)}")
    by, name = METHODS[method]
    settings = getattr(package.Settings, by)(name)
    if method == "dense":
        return Ours("ours-dense", package, settings, None)
    settings = settings.replace(max_density=1.0, min_density=0.0)
    label = f"ours-op-{density:.2f}" if method == "ours" else f"{method}-{density:.2f}"
    if method == "attn_gate":
        settings = settings.replace(keep="density")
    if settings.keep_at == "row":
        return Ours(label, package, settings, density)
    return Ours(label, package, settings.replace(keep="density", keep_value=density), None)


class Ours(module.Paged):
    """compactattn.forward, all stages, with one plan for all chunks."""

    def __init__(self, name: str, package: Any, settings: Any, target: float | None) -> None:
        self.name, self._package, self._settings, self._target = name, package, settings, target
        self.dense = settings.selector == "dense"
        self._calibrated = False
        self._plan: Any = None
        self._last: Any = None

    def keeping_all(self) -> Ours:
        """The same stages from the first token on, with nothing left out."""
        everything = self._settings.replace(keep="density", keep_value=1.0, dense_below_kv_len=0)
        return Ours(self.name, self._package, everything, None)

    def start(self, shape: Shape) -> None:
        """A plan for this shape; kept between prefills."""
        fresh = getattr(self, "width", None) is None or self.width[0] != shape
        super().start(shape)
        if fresh:
            self.out = torch.empty(shape.batch * shape.chunk, shape.num_q_heads, shape.head_dim, device=module.DEVICE)
            self.out = self.out.bfloat16()
            self._make(self._settings)

    def attend(self, q: torch.Tensor, past: int) -> torch.Tensor:
        """Every stage."""
        self._last = self._batch(q.flatten(0, 1))
        self._forward(self._plan, self._last)
        return self.out.view_as(q)

    def calibrate(self) -> bool:
        """After a prefill: finds the number with which the last chunk's lists read the target, and takes it.

        Chunks before the last may read another share: called again after one more prefill, it corrects for that.
        Returns whether there was anything to find.
        """
        if self._target is None or self._density_now(self._settings) is None:
            return False
        wanted = self._target * (self._target / self.density() if self._calibrated else 1.0)
        self._calibrated = True
        # Keeping by mass a larger number keeps more, by threshold less. The search is for the logarithm: thresholds lie
        # anywhere between a share of one block and 1.
        rises = self._settings.keep != "threshold"
        low, high = math.log(LEAST), 0.0
        settings = self._settings
        for _ in range(PROBES):
            middle = (low + high) / 2
            settings = self._settings.replace(keep_value=math.exp(middle))
            got = self._density_now(settings)
            if got is None or abs(got - wanted) <= NEAR:
                break
            low, high = (low, middle) if (got > wanted) == rises else (middle, high)
        self._make(settings)
        return True

    def density(self) -> float:
        """Share of blocks before their chunks that lists read, over all calls so far."""
        stats = self._plan.stats()
        # A refused request costs nothing, and would be timed as a fast one.
        assert stats.refused == 0, stats
        share = stats.density
        return 1.0 if share is None else float(share)

    def inflation(self) -> float | None:
        """What the last chunk's lists read over what one head's 128 queries asked for; None where nothing is united."""
        if self._settings.keep_at != "row" or self.dense:
            return None
        alone = self._density_now(self._settings.replace(heads_per_list=1, query_span=128))
        united = self._density_now(self._settings)
        return united / alone if united and alone else None

    def _density_now(self, settings: Any) -> float | None:
        """Of the last chunk once more, under other settings; None where all of it is dense."""
        plan = self._planned(settings)
        self._forward(plan, self._last)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        share = plan.stats().density
        return None if share is None else float(share)

    def _forward(self, plan: Any, batch: Any) -> None:
        if self._settings.selector not in READ_MEANS:
            plan.forward(batch, self.out)
            return
        # The first time of all blocks; from then on a step itself makes anew what it completes.
        summaries = self._means.summaries or self._means.update(batch)
        plan.forward(batch, self.out, summaries=summaries)

    def _make(self, settings: Any) -> None:
        self._settings = settings
        self._plan = self._planned(settings)
        self._means = self._package.BlockMeans(self._plan)

    def _planned(self, settings: Any) -> Any:
        ours, shape = self._package, self.shape
        gate: dict[str, Any] = {}
        if settings.selector == "attn_gate":
            half = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
            rates = tuple((module.ROPE_THETA**-half).tolist())
            gate = {"gate_weights_path": random_gate(shape.num_q_heads, shape.head_dim), "rope_inv_freq": rates}
        desc = ours.PlanDesc(
            num_q_heads=shape.num_q_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            page_size=module.PAGE_SIZE,
            dtype="bf16",
            max_num_reqs=shape.batch,
            max_total_q=shape.batch * shape.chunk,
            max_kv_len=shape.context,
            settings=settings,
            **gate,
        )
        return ours.Plan(desc, self._batch(self.out).home.context())

    def _batch(self, q: torch.Tensor) -> Any:
        return self._package.Batch.of(q, self.k, self.v, self.block_table, self.seq_lens, self.cu_seqlens_q)


def builders(package: Any, method: str, densities: list[float]) -> list[Callable[[], Ours]]:
    """One for each density; dense has none."""
    return [functools.partial(build, package, method, at) for at in (densities[:1] if method == "dense" else densities)]


@functools.cache
def random_gate(num_q_heads: int, head_dim: int) -> str:
    """A safetensors file of one layer's gate, in the published form that projects keys alone: a time needs no more."""
    rng = torch.Generator().manual_seed(5)
    weights = torch.randn(num_q_heads, 3 * head_dim, head_dim, generator=rng) * head_dim**-0.5
    data = weights.numpy().tobytes()
    key = "model.layers.0.self_attn.attn_gate.mask_linear_k.weight"
    head = json.dumps({key: {"dtype": "F32", "shape": list(weights.shape), "data_offsets": [0, len(data)]}}).encode()
    path = Path(tempfile.mkdtemp(prefix="gate-")) / "gate.safetensors"
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)
    return str(path)
