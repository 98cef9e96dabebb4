"""Steps of many requests through a transformers model whose attention is the library's, over a paged pool.

The model's own code computes everything else; nothing is padded, and neighbours in a step do not see each other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch  # type: ignore[import-not-found, unused-ignore]
from torch.nn.functional import rms_norm
from transformers import AttentionInterface  # type: ignore[import-not-found, unused-ignore]

from .. import stages
from .._stats import Stats
from ..batch import Batch
from ..plan import Plan, PlanDesc
from ..selection import Summaries
from ..settings import Settings
from ..workspace import Borrowed
from . import quoka
from .pool import PAGE, Pool, Step, rounded

NAME = "compactattn_eval"
# Told of each layer's attention: (layer, batch, softmax scale, out, lse).
Probe = Callable[[int, Batch, float, Any, Any], None]


class Refused(Exception):
    """A model, or a method on this device, that is not served."""


class Engine:
    """One model, its pool, and a plan for each settings and size of step."""

    def __init__(self, model: Any, gates: Path | None = None) -> None:
        """``gates``: weights of selector attn_gate, of :mod:`compactattn.eval.gates`."""
        config = model.config
        if sliding := set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
            raise Refused(f"layers of kind {', '.join(sorted(sliding))}: only full attention is evaluated")
        self.model, self.device, self._gates = model, model.device, gates
        self.pool = Pool(config, model.device, model.dtype, 0)
        # What was captured over this pool: dropped with it.
        self.loops: dict[tuple[int, ...], Any] = {}
        self._plans: dict[tuple[Settings, tuple[int, int, int], float], Plan] = {}
        self._bytes: dict[Plan, int] = {}
        self._means: dict[Settings, Summaries] = {}
        # What torch has selected; and whether it is to on the CPU too.
        self._stood: dict[Settings, Stats] = {}
        self.torch_quoka = False
        # The last is the one in use; a captured graph goes on using an older one.
        self._scratch: list[Borrowed] = []
        AttentionInterface.register(NAME, _attention)
        _fuse_norms(model)

    def reserve(self, tokens: int) -> None:
        """An empty pool of at least so many tokens."""
        # Rounded up, as what was captured over the old one is lost.
        pages = rounded(-(-tokens // PAGE))
        if self.pool.pages < pages:
            self.loops, self._means = {}, {}
            # The old one goes first, so that both are never held.
            del self.pool
            self.pool = Pool(self.model.config, self.device, self.model.dtype, pages)
        self.pool.reset()

    def run(self, step: Step, settings: Settings, probe: Probe | None = None) -> Any:
        """Writes the step's KV and returns the logits ``[rows, vocabulary]`` that it asks for."""
        if self.model.config._attn_implementation != NAME:
            self.model.set_attn_implementation(NAME)
        asked = {"input_ids": step.ids, "position_ids": step.positions, "use_cache": False}
        with torch.no_grad():
            told = (self, step, settings, probe)
            return self.model(**asked, logits_to_keep=step.rows, compactattn=told).logits[0]

    def attend(self, layer: int, new: tuple[Any, Any, Any], scaling: float, told: tuple[Any, ...]) -> Any:
        """A layer of a step: ``new`` = q, k, v ``[heads, total_q, head_dim]``; ``[total_q, heads, head_dim]``."""
        _, step, settings, probe = told
        q, k, v = (x.transpose(0, 1) for x in new)
        pools = self.pool.kv[0, layer], self.pool.kv[1, layer]
        for pool, fresh in zip(pools, (k, v), strict=True):
            pool.flatten(0, 1).index_copy_(0, step.slots, fresh)
        if self.stands_in(settings):
            stood, counted = quoka.attend(q, pools, step, settings, scaling)
            self._stood[settings] = self._stood.get(settings, Stats()) + counted
            return stood
        batch = Batch.of(q, *pools, step.table, step.seq_lens, step.cu_seqlens_q)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device) if probe else None
        self.forward(batch, settings, scaling, out, lse, layer=layer)
        if probe:
            probe(layer, batch, scaling, out, lse)
        return out

    def forward(
        self, batch: Batch, settings: Settings, scaling: float, out: Any, lse: Any = None, *, layer: int = 0
    ) -> None:
        """The library's forward, in memory that all plans share: one step runs at a time."""
        plan = self._plan(batch, settings, scaling)
        means, scratch = self._summaries(plan, batch, settings), self._memory(plan)
        # Layers differ by their gates alone.
        at = layer if plan.desc.num_layers > 1 else 0
        plan.forward(batch, out, lse, layer=at, summaries=means, scratch=scratch)

    def stands_in(self, settings: Settings) -> bool:
        """Whether torch attends, as the library does not serve the selector on this device."""
        return settings.selector == "quoka" and (self.torch_quoka or self.device.type != "cpu")

    def stats(self, settings: Settings) -> Stats:
        """What steps with these settings have selected so far; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found = sum(
            (plan.stats() for key, plan in self._plans.items() if key[0] == settings),
            self._stood.get(settings, Stats()),
        )
        if found.refused:
            raise Refused(f"{found.refused} requests left out by the device")
        return found

    def _plan(self, batch: Batch, settings: Settings, scaling: float) -> Plan:
        (total_q, heads, dim), (_, _, kv_heads, _) = batch.q.shape, batch.k.shape
        num_reqs, width = batch.block_table.shape
        # Rounded up, so that plans are few; small steps have plans of their own, whose launches are small.
        sizes = rounded(num_reqs), rounded(total_q), width * PAGE
        key = settings, sizes, scaling
        plan = self._plans.get(key)
        if plan is None:
            shape = heads, kv_heads, dim, PAGE, batch.q.dtype.name.lower()
            gates = self._gates_of(settings)
            desc = PlanDesc(*shape, *sizes, sm_scale=scaling, settings=settings, **gates)
            plan = self._plans[key] = Plan(desc, batch.home.context())
            self._bytes[plan] = plan.sizes().workspace_bytes
        return plan

    def _gates_of(self, settings: Settings) -> dict[str, Any]:
        """What a plan that gates is told beside its shape."""
        if settings.selector != "attn_gate":
            return {}
        if self._gates is None:
            raise Refused("attn_gate: no gates were given")
        rates = tuple(self.model.model.rotary_emb.inv_freq.tolist())
        layers = self.model.config.num_hidden_layers
        return {"gate_weights_path": str(self._gates), "rope_inv_freq": rates, "num_layers": layers}

    def _summaries(self, plan: Plan, batch: Batch, settings: Settings) -> Summaries | None:
        """Means of all whole blocks, where the device cannot make them itself and something reads them."""
        if batch.home.on_cpu or not (settings.selector in stages.READS_MEANS or settings.mean_correction):
            return None
        means = self._means.get(settings)
        if means is None:
            # Its memory serves every layer, one after the other.
            pages, values = self.pool.pages, settings.mean_correction
            means = Summaries.empty(plan, pages, values=values, seals=False, home=batch.home)
            self._means[settings] = means
        stages.update_summaries(plan, batch, means, which="all")
        return means

    def _memory(self, plan: Plan) -> Borrowed | None:
        if self.device.type != "cuda":
            return None
        num_bytes = self._bytes[plan]
        if not self._scratch or self._scratch[-1].num_bytes < num_bytes:
            words = torch.empty(rounded(num_bytes) // 4, dtype=torch.int32, device=self.device)
            self._scratch.append(Borrowed(words))
        return self._scratch[-1]


def _fuse_norms(model: Any) -> None:
    """One kernel a norm, which sums in f32 as they do and rounds once, instead of eight: a quarter of a small model."""
    for module in model.modules():
        if type(module).__name__ in _NORMS:
            module.forward = partial(_norm, module)


def _norm(module: Any, x: Any) -> Any:
    return rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


def _attention(module: Any, query: Any, key: Any, value: Any, mask: Any, *, scaling: Any, **kwargs: Any) -> Any:
    told = kwargs["compactattn"]
    refused = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if refused or mask is not None or key.shape != value.shape:
        raise Refused(f"attention with {', '.join(refused) or 'a mask, or values unlike keys'}")
    return told[0].attend(module.layer_idx, (query[0], key[0], value[0]), scaling, told)[None], None


# Root mean squares times a weight; others may add to theirs.
_NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Qwen3MoeRMSNorm", "MistralRMSNorm")
