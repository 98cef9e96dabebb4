"""A model small enough for an evaluation in seconds: bytes for tokens, two layers of random weights."""

from __future__ import annotations

from pathlib import Path
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


def checkpoint(folder: Path) -> Path:
    """The same model as a folder that transformers reads, with a tokenizer of bytes and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    turns = "{% for m in messages %}U:{{ m['content'] }}{% endfor %}{{ '\\nA:' if add_generation_prompt }}"
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=turns)
    wrapped.save_pretrained(folder)
    subject().model.save_pretrained(folder)
    return folder
