"""Which steps, layers and engine configurations are served at all. No SGLang, no torch.

Which requests of a step are ours is the same question in every engine: :class:`compactattn.serving.policy.Policy`.
"""

from __future__ import annotations

from typing import Any

from ..serving import policy as shared
from ..serving.policy import PAGE_SIZES, Step


def config_refusals(facts: dict[str, Any]) -> list[str]:
    """Why a model, machine or engine configuration is not served, each with what to do; [] = it is.

    ``facts``: what :mod:`.facts` reads from the engine; what is absent is not asked.
    """
    found = shared.config_refusals({name: facts[name] for name in _SHARED & facts.keys()})
    found += [text for name, text in _FLAGS.items() if facts.get(name)]
    if "device_capability" in facts and facts["device_capability"] is None:
        found.append("no CUDA device")
    page_size = facts.get("page_size")
    if page_size is not None and page_size not in PAGE_SIZES:
        wanted = ", ".join(map(str, PAGE_SIZES))
        found.append(f"page size {page_size}: start with --page-size 64 (any of {wanted})")
    if facts.get("kv_cache_dtype", "auto") not in ("auto", "bfloat16", "bf16", "float16"):
        found.append(f"KV cache dtype {facts['kv_cache_dtype']}: not offered (--kv-cache-dtype auto)")
    return found


def layer_refusal(layer: Any) -> str | None:
    """Why this layer (the engine's RadixAttention) is the engine's; None = it may be ours."""
    window = getattr(layer, "sliding_window_size", None)
    attn_type = getattr(layer, "attn_type", "decoder")
    facts = {
        "logits softcap": bool(getattr(layer, "logit_cap", 0)),
        "sliding window": window is not None and window > -1,
        "cross attention": bool(getattr(layer, "is_cross_attention", False)),
        "attention type other than decoder": str(getattr(attn_type, "value", attn_type)) != "decoder",
        "values of another size than keys": layer.v_head_dim != layer.head_dim,
        "local attention": bool(getattr(layer, "use_irope", False)),
        "length-scaled temperature": getattr(layer, "xai_temperature_len", -1) > 0,
    }
    return next((reason for reason, holds in facts.items() if holds), None)


def step_of(batch: Any) -> Step | None:
    """The host's lengths of a prefill step (the engine's ForwardBatch); None = a step of another kind.

    Nothing is read from the device: where the engine keeps no lengths on the host, there is no step of ours.
    """
    mode = getattr(batch.forward_mode, "name", "")
    chunks, prefixes = batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu
    other = getattr(batch, "spec_info", None) is not None or getattr(batch, "encoder_lens", None) is not None
    if mode not in ("EXTEND", "MIXED") or other or not chunks or not prefixes:
        return None
    starts = [0]
    for chunk in chunks:
        starts.append(starts[-1] + int(chunk))
    return Step(starts, [int(chunk) + int(prefix) for chunk, prefix in zip(chunks, prefixes, strict=True)])


def metadata_refusal(metadata: Any) -> str | None:
    """Why a whole step is the engine's, from what it prepared for its own kernels."""
    facts = {
        "image masks": getattr(metadata, "image_token_ranges", None) is not None,
        "local attention": getattr(metadata, "local_attn_metadata", None) is not None,
        "speculative sliding window": getattr(metadata, "swa_spec_metadata", None) is not None,
        "no page table": getattr(metadata, "page_table", None) is None,
    }
    return next((reason for reason, holds in facts.items() if holds), None)


_SHARED = {"use_mla", "head_size", "dtype", "device_capability", "build", "context_parallel"}
_SHARES = "KV after sparse layers is approximate and would be shared with engines that compute it densely"
_FLAGS = {
    "encoder_decoder": "encoder-decoder model: not offered",
    "disaggregation": f"prefill/decode disaggregation: {_SHARES}; use mode dense",
    "hicache_storage": f"HiCache storage: {_SHARES}; use mode dense",
    "two_batch": "two-batch overlap: not offered, the workspace is for one stream",
    "unified_memory": "unified memory pool: its pages are no rows of one tensor; start without it",
    "kv_sharding": "KV sharding over ranks: not offered",
    "needs_means": "selector or mean_correction that reads block means: not kept for SGLang's pages; "
    "choose sampled_exact, quoka, xattention or streaming",
}
