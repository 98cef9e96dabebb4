"""Real Q, K and V out of a safetensors trace, as `compactattn demo` reads them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from planted import Tensors
from shapes import Shape


def load(path: Path, layer: int, device: str) -> tuple[Shape, Tensors]:
    """`layerN.q [chunk, heads, d]`, `layerN.k` and `.v [context, kv heads, d]`, bf16: one request."""
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])

    def tensor(name: str) -> torch.Tensor:
        entry = header[f"layer{layer}.{name}"]
        if entry["dtype"] != "BF16":
            raise ValueError(f"{path.name}: layer{layer}.{name} is {entry['dtype']}, wanted BF16")
        begin, end = entry["data_offsets"]
        words = torch.frombuffer(raw, dtype=torch.bfloat16, count=(end - begin) // 2, offset=8 + length + begin)
        return words.view(entry["shape"]).to(device)

    q, k, v = tensor("q"), tensor("k"), tensor("v")
    shape = Shape(q.shape[1], k.shape[1], q.shape[2], 1, q.shape[0], k.shape[0])
    return shape, Tensors(q, k[None], v[None])
