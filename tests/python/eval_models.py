"""A model small enough for an evaluation in seconds: bytes for tokens, two layers of random weights."""

from __future__ import annotations

from typing import Any

from compactattn.eval.codec import Codec


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def codec() -> Codec:
    return Codec(Bytes(), ("U:", "\nA:"))


def subject(dtype: Any = None, device: str = "cpu") -> Any:
    import torch
    from compactattn.eval.model import Subject
    from hf_models import model_of

    wide = {"vocab_size": 256, "max_position_embeddings": 65536, "bos_token_id": None, "eos_token_id": 255}
    return Subject(model_of("llama", dtype or torch.float32, device, **wide), codec(), "tiny")
