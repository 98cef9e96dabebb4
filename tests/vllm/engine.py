"""Serves a tiny random model with the real engine on the CPU and prints what it saw, as one line of JSON.

    python tests/vllm/engine.py FOLDER [ADDITIONAL_CONFIG]      # FOLDER keeps the model; the mode is the environment's

Two waves, chunked prefill and prefix cache on: a long prompt beside short ones, then the long prompt's prefix again
beside another long prompt.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1"}

import torch

VOCAB, LAYERS = 512, 3


def main(folder: Path, additional: dict[str, object]) -> None:
    """Log probabilities of all tokens after each prompt, the counters, and how much of prompts was cached."""
    if not (folder / "config.json").exists():
        make_model(folder)
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=8192,
        max_num_batched_tokens=512,
        max_num_seqs=8,
        max_logprobs=VOCAB,
        enable_prefix_caching=True,
        enforce_eager=True,
        additional_config=additional,
    )
    sampling = SamplingParams(max_tokens=4, temperature=0, logprobs=VOCAB, ignore_eos=True, detokenize=False)
    first = [tokens(0, 3000), tokens(1, 40), tokens(2, 700)]
    second = [tokens(0, 3000)[:2200] + tokens(3, 900), tokens(4, 1500), tokens(5, 30)]
    logprobs, cached = [], []
    for wave in (first, second):
        for done in llm.generate([{"prompt_token_ids": prompt} for prompt in wave], sampling, use_tqdm=False):
            cached.append(done.num_cached_tokens)
            steps = done.outputs[0].logprobs
            logprobs.append([[step[token].logprob for token in range(VOCAB)] for step in steps])
    from compactattn.vllm import counters

    print("RESULT " + json.dumps({"logprobs": logprobs, "cached": cached, "counters": counters()}))


def tokens(seed: int, count: int) -> list[int]:
    """A random prompt."""
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def make_model(folder: Path) -> None:
    """A Llama of three layers, 4 query and 2 KV heads of 64, with weights large enough that attention is not flat."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
