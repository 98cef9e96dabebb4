"""Teaches a model's gates for selector attn_gate by self-distillation (SeerAttention, arXiv 2410.13276).

    python -m compactattn.eval.gates --out gates.safetensors --adapter tests/data/smollm2_32k_lora.safetensors

The model stays as it is. Contexts of :mod:`compactattn.eval.tasks`, of seeds that no study uses, go through it once;
of each layer and query head the attention map is max-pooled over blocks of BLOCK queries by BLOCK keys, of which every
ROW_STEP-th query is looked at, and each row of blocks is made to add up to 1. Gates learn that map by its KL
divergence, layer by layer, from the pooled keys and queries that the library's selector takes
(rust/select/attn_gate.rs).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch  # type: ignore[import-not-found, unused-ignore]
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface  # type: ignore[import-not-found, unused-ignore]

from . import model
from .finetune import MIX, sequence
from .model import Subject

NAME = "compactattn_gates"
BLOCK = 64
ROW_STEP = 4


@dataclass(frozen=True)
class Recipe:
    """How gates are trained: on so many contexts of so many tokens, so many steps a layer over all of them at once."""

    contexts: int
    length: int
    steps: int
    learning_rate: float = 3e-3
    seed: int = 0


@dataclass
class Examples:
    """What one layer's gate is to learn; a context after the other."""

    # [blocks, num_kv_heads, 3 * head_dim]: max, min and mean of a block's keys before rotation.
    k: list[Any] = field(default_factory=list)
    # [blocks, num_q_heads, head_dim]: means of the queries.
    q: list[Any] = field(default_factory=list)
    # [num_q_heads, blocks of queries, blocks of keys]
    map: list[Any] = field(default_factory=list)


def main(arguments: list[str] | None = None) -> int:
    """0 if the gates were written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the gates, safetensors")
    parser.add_argument("--model", type=Path, help="SmolLM2's GGUF or a checkpoint folder (default: as eval)")
    parser.add_argument("--adapter", type=Path, help="safetensors of compactattn.eval.finetune")
    parser.add_argument("--contexts", type=int, default=8)
    parser.add_argument("--length", type=int, default=8192, help="tokens of a context, a multiple of 64")
    parser.add_argument("--steps", type=int, default=200, help="a layer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    dtype = "f32" if asked.device == "cpu" else "bf16"
    subject = model.load(asked.model or model.cached_smollm2(), asked.device, dtype, asked.adapter)
    recipe = Recipe(asked.contexts, asked.length, asked.steps, seed=asked.seed)
    losses = train(subject, recipe, asked.out)
    before, after = (sum(one[i] for one in losses) / len(losses) for i in (0, -1))
    print(f"{asked.out}: {asked.out.stat().st_size} bytes; KL {before:.3f} -> {after:.3f}", file=sys.stderr)
    return 0


def train(subject: Subject, recipe: Recipe, out: Path) -> list[list[float]]:
    """Trains the gates of all layers and writes them to ``out``; the KL divergences of each layer, step by step."""
    from safetensors.torch import save_file  # type: ignore[import-not-found, unused-ignore]

    layers = harvest(subject, recipe)
    tensors, losses = {}, []
    for i, examples in enumerate(layers):
        gate, kl = _learn(examples, rates(subject.model), recipe)
        losses.append(kl)
        print(f"layer {i}: KL {kl[0]:.3f} -> {kl[-1]:.3f}", flush=True)
        for part, weights in gate.items():
            tensors[f"model.layers.{i}.self_attn.attn_gate.mask_linear_{part}.weight"] = weights
    made = vars(recipe) | {"model": subject.name, "torch": torch.__version__}
    save_file(tensors, str(out), {"facts": json.dumps(made)})
    return losses


@torch.no_grad()  # type: ignore[misc, unused-ignore]
def harvest(subject: Subject, recipe: Recipe) -> list[Examples]:
    """Each layer's examples, from the model's own dense attention."""
    if recipe.length % BLOCK:
        raise ValueError(f"{recipe.length} tokens: wanted a multiple of {BLOCK}")
    net, rng = subject.model, Random(f"gates:{recipe.seed}")
    AttentionInterface.register(NAME, _attention)
    net.set_attn_implementation(NAME)
    tasks, weights = [(task, questions) for task, questions, _ in MIX], [weight for *_, weight in MIX]
    layers = [Examples() for _ in range(net.config.num_hidden_layers)]
    for _ in range(recipe.contexts):
        task, questions = rng.choices(tasks, weights)[0]
        ids, _ = sequence(task, subject.codec, recipe.length, rng, questions)
        net.model(torch.tensor([ids], device=net.device), use_cache=False, gates=(layers, rates(net)))
    return layers


def rates(net: Any) -> Any:
    """``[head_dim / 2]``, by how much each pair of a head's vector turns from a token to the next."""
    return net.model.rotary_emb.inv_freq.float()


def _attention(module: Any, query: Any, key: Any, value: Any, mask: Any, *, scaling: Any, **kwargs: Any) -> Any:
    layers, inv_freq = kwargs["gates"]
    _look(layers[module.layer_idx], query[0].float(), key[0].float(), inv_freq, scaling)
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


def _look(examples: Examples, q: Any, k: Any, inv_freq: Any, scaling: float) -> None:
    """Adds one context's ``q``, ``k`` ``[heads, tokens, head_dim]``, which are rotated."""
    positions = torch.arange(q.shape[1], device=q.device)
    plain_q, plain_k = (_turned(x, -positions, inv_freq).unflatten(1, (-1, BLOCK)) for x in (q, k))
    pooled = torch.cat([plain_k.amax(2), plain_k.amin(2), plain_k.mean(2)], dim=-1)
    examples.k.append(pooled.transpose(0, 1).cpu())
    examples.q.append(plain_q.mean(2).transpose(0, 1).cpu())
    group = len(q) // len(k)
    maps = [_pooled_map(rows, k[head // group], scaling) for head, rows in enumerate(q)]
    examples.map.append(torch.stack(maps).cpu())


def _pooled_map(q: Any, k: Any, scaling: float) -> Any:
    """``[blocks, blocks]`` of one head: the largest weight of every pair of blocks, over their sum."""
    at = torch.arange(ROW_STEP - 1, len(q), ROW_STEP, device=q.device)
    scores = (q[at] @ k.T) * scaling
    scores.masked_fill_(torch.arange(len(k), device=q.device) > at[:, None], -math.inf)
    largest = scores.softmax(-1).view(-1, BLOCK // ROW_STEP, len(k) // BLOCK, BLOCK).amax((1, 3))
    return largest / largest.sum(-1, keepdim=True)


def _turned(x: Any, positions: Any, inv_freq: Any) -> Any:
    """``x [.., positions, dim]`` rotated as Llama's vectors are, halves together."""
    angles = positions[:, None] * inv_freq.to(x.device)
    cos, sin = angles.cos(), angles.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def scores(k: Any, q: Any, pooled_k: Any, mean_q: Any, inv_freq: Any) -> Any:
    """``[contexts, num_q_heads, blocks, blocks]`` logits of gates ``k``, ``q``; -inf for blocks of keys to come."""
    blocks, (heads, dim, _) = mean_q.shape[1], q.shape
    starts = torch.arange(0, blocks * BLOCK, BLOCK, device=q.device)
    keys = _turned(torch.einsum("cbhf,hfg->chbg", pooled_k, k), starts, inv_freq)
    queries = _turned(torch.einsum("cbhd,hdg->chbg", mean_q, q), starts, inv_freq)
    keys = keys.repeat_interleave(heads // len(k), dim=1)
    return (queries @ keys.transpose(-1, -2) / math.sqrt(dim)).masked_fill(_later(blocks, q.device), -math.inf)


def _later(blocks: int, device: Any) -> Any:
    return torch.ones(blocks, blocks, dtype=torch.bool, device=device).triu(1)


def _learn(examples: Examples, inv_freq: Any, recipe: Recipe) -> tuple[dict[str, Any], list[float]]:
    """One layer's ``k [num_kv_heads, 3 * head_dim, head_dim]`` and ``q [num_q_heads, head_dim, head_dim]``, as f16."""
    device = inv_freq.device
    pooled_k, mean_q, target = (torch.stack(x).to(device) for x in (examples.k, examples.q, examples.map))
    (_, blocks, heads, dim), kv_heads = mean_q.shape, pooled_k.shape[2]
    # At first the mean key and the mean query as they are.
    one = torch.eye(dim, device=device)
    k = torch.cat([torch.zeros(2 * dim, dim, device=device), one]).repeat(kv_heads, 1, 1).requires_grad_()
    q = one.repeat(heads, 1, 1).requires_grad_()
    later = _later(blocks, device)
    entropy = target.xlogy(target).sum(-1).mean()
    optimizer = torch.optim.Adam([k, q], lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, recipe.steps))
    losses = []
    for step in range(recipe.steps + 1):
        log_shares = scores(k, q, pooled_k, mean_q, inv_freq).log_softmax(-1)
        # A weight that is 0 by causality costs nothing, whatever the log of its share.
        cost = -(target * log_shares.masked_fill(later, 0.0)).sum(-1).mean()
        losses.append(float((cost + entropy).detach()))
        if step < recipe.steps:
            optimizer.zero_grad()
            cost.backward()
            optimizer.step()
            schedule.step()
    return {"k": k.detach().half().cpu(), "q": q.detach().half().cpu()}, losses


if __name__ == "__main__":
    sys.exit(main())
