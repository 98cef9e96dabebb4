"""Random transformers models of each family, and what it means that two attentions agree. Asks for no pytest."""

from __future__ import annotations

from typing import Any

import compactattn
import torch
import transformers
from compactattn import context

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# One sliding layer and one that sees everything.
SLIDING = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "qwen3-moe": ("Qwen3Moe", EXPERTS),
    "gemma3": ("Gemma3", SLIDING),
}
LONG = {"dense_below_kv_len": 128, "dense_max_q_len": 4}
DENSE = LONG | {"selector": "dense"}
SPARSE = LONG | {"block_size": 16, "keep_density": 0.25, "max_density": 0.35}
KEEP_ALL = SPARSE | {"keep_density": 1.0, "max_density": 1.0, "density_guard": 1.0}


def no_gpu() -> str | None:
    """Why the library cannot be tried on a GPU here; None if it can."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    try:
        context.of("cuda:0")
    except (compactattn.DeviceError, compactattn.InvalidArgument) as error:
        return str(error)
    return None


def model_of(family: str, dtype: Any = torch.float32, device: str = "cpu", **changes: Any) -> Any:
    """A random model of a family, or of a class by its name."""
    name, fields = FAMILIES.get(family, (family, {}))
    text = "Text" if name == "Gemma3" else ""
    config = getattr(transformers, f"{name}{text}Config")(**SHAPE | fields | changes)
    torch.manual_seed(0)
    # Larger than a fresh model's, so that attention is far from uniform.
    config.initializer_range = 0.2
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval().to(device)


def prompt(length: int, batch: int = 1) -> Any:
    """Random tokens ``[batch, length]``, always the same."""
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(1))


def generated(model: Any, name: str, ids: Any, chunk: int = 100, **more: Any) -> Any:
    """Greedy tokens and their logits, the prompt in chunks, by the attention of that name."""
    model.set_attn_implementation(name)
    ids = ids.to(model.device)
    more.setdefault("attention_mask", torch.ones_like(ids))
    asked = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(ids, prefill_chunk_size=chunk, **asked | more)


def check_same(ours: Any, theirs: Any, dtype: Any) -> float:
    """Logits of the same prefix are close, and the tokens those logits decide are the same; the largest difference.

    In shares of the largest logit. Both sum up to 300 products in f32: 300 roundings of 2^-24 each, both sides, in two
    layers whose norms may double an error: 300 * 2^-24 * 2 * 2 * 2 = 1.4e-4. In bf16 each layer's attention may come
    out one step (2^-8) apart at each of its two roundings, the output and the projection: 2 * 2 * 2^-8 * 2 = 3.1e-2.
    """
    share, worst = {torch.float32: 1.5e-4, torch.bfloat16: 3.2e-2}[dtype], 0.0
    for mine, reference in zip(ours.logits, theirs.logits, strict=True):
        largest = reference.abs().max().item()
        worst = max(worst, (mine - reference).abs().max().item() / largest)
        assert worst <= share, f"logits differ by {worst:.2e} of the largest"
        first, second = reference.topk(2).values.unbind(-1)
        if bool(((first - second) <= 2 * share * largest).any()):
            assert dtype is torch.bfloat16, "a tie in f32: choose another seed"
            return worst
        assert torch.equal(mine.argmax(-1), reference.argmax(-1))
    assert torch.equal(ours.sequences, theirs.sequences)
    return worst


def batched(model: Any, name: str, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of continuous batching, where prompts are cut into chunks that share steps."""
    model.set_attn_implementation(name)
    config = transformers.ContinuousBatchingConfig(block_size=16, num_blocks=256, max_batch_tokens=96)
    asked = transformers.GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    done = model.generate_batch(prompts, generation_config=asked, continuous_batching_config=config, progress_bar=False)
    return [done[key].generated_tokens for key in sorted(done, key=lambda key: int(key.rsplit("_", 1)[-1]))]


def gap_at_fork(model: Any, prompt: list[int], ours: list[int], theirs: list[int]) -> float:
    """0 for the same tokens; else how much sdpa prefers theirs at the first fork, in shares of the largest logit."""
    fork = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if len(set(pair)) > 1), None)
    if fork is None:
        return 0.0
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = model(torch.tensor([prompt + theirs[:fork]], device=model.device)).logits[0, -1].float()
    return ((logits[theirs[fork]] - logits[ours[fork]]) / logits.abs().max()).item()
