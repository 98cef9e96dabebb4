"""Low-rank adapters (arXiv 2106.09685) on the attention projections: trained beside frozen weights, then merged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch  # type: ignore[import-not-found, unused-ignore]
from torch import nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
# The update is scaled by SCALE, whatever the rank.
SCALE = 2.0


class Adapted(nn.Module):  # type: ignore[misc, unused-ignore]
    """A frozen linear layer and its update ``SCALE * b @ a``; ``a [rank, in]``, ``b [out, rank]``, f32."""

    def __init__(self, base: Any, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        on = base.weight.device
        self.a = nn.Parameter(torch.randn(rank, base.in_features, device=on) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, device=on))

    def forward(self, x: Any) -> Any:
        """The layer with its update, in the layer's own dtype."""
        low = nn.functional.linear(x, self.a.to(x.dtype))
        return self.base(x) + SCALE * nn.functional.linear(low, self.b.to(x.dtype))


def adapt(model: Any, rank: int) -> list[Any]:
    """Freezes ``model``, puts adapters into it and returns their parameters."""
    model.requires_grad_(False)
    for name, parent, child in _targets(model):
        setattr(parent, name, Adapted(child, rank))
    return [p for p in model.parameters() if p.requires_grad]


def save(model: Any, path: Path, **facts: Any) -> None:
    """The adapters as bf16 safetensors; ``facts`` (what the model's configuration is to be, ...) go into its header."""
    from safetensors.torch import save_file  # type: ignore[import-not-found, unused-ignore]

    adapted = {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}
    tensors = {}
    for name, module in adapted.items():
        tensors[f"{name}.a"] = module.a.detach().to(torch.bfloat16).cpu().contiguous()
        tensors[f"{name}.b"] = module.b.detach().to(torch.bfloat16).cpu().contiguous()
    save_file(tensors, str(path), {"facts": json.dumps(facts)})


def facts(path: Path) -> dict[str, Any]:
    """What :func:`save` was told, ``config`` among it: what the model's configuration is to be."""
    from safetensors import safe_open  # type: ignore[import-not-found, unused-ignore]

    with safe_open(str(path), "pt") as file:
        told: dict[str, Any] = json.loads(file.metadata()["facts"])
    return told


@torch.no_grad()  # type: ignore[misc, unused-ignore]
def merge(model: Any, path: Path) -> None:
    """Adds a file's updates to the weights; ValueError if it is of another model."""
    from safetensors.torch import load_file

    tensors = load_file(str(path))
    layers = {name: module for name, module in model.named_modules() if name.split(".")[-1] in TARGETS}
    if set(layers) != {name.rpartition(".")[0] for name in tensors}:
        raise ValueError(f"{path} has other layers than the model")
    for name, layer in layers.items():
        on = layer.weight.device
        a, b = (tensors[f"{name}.{part}"].to(on, torch.float32) for part in "ab")
        layer.weight.copy_(layer.weight.float() + SCALE * b @ a)


def _targets(model: Any) -> list[tuple[str, Any, Any]]:
    found = []
    for parent in model.modules():
        found += [(name, parent, child) for name, child in parent.named_children() if name in TARGETS]
    return found
