"""What the engine's configuration says, read in one place: options, limits, and why a layer is not served."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import build_info, version
from ..serving.policy import Policy
from ..serving.report import REPORT
from ..serving.service import Service, Shape
from ..serving.settings import Options


@dataclass(frozen=True)
class Limits:
    """The largest step of the engine, and where it runs."""

    device: str
    # That one call of the library is given at most.
    max_num_reqs: int
    max_total_q: int
    max_kv_len: int
    num_layers: int
    num_splits: int


def config() -> Any:
    """The engine's configuration while layers are made; None outside."""
    from vllm.config import get_current_vllm_config_or_none

    return get_current_vllm_config_or_none()


def options(vllm_config: Any) -> Options:
    """The options of this engine, read once for a configuration."""
    global _latest
    additional = getattr(vllm_config, "additional_config", None)
    additional = additional if isinstance(additional, dict) else {}
    if _latest is None or _latest[0] != additional:
        found = Options.read(additional)
        REPORT.strict, REPORT.file = found.strict, found.counters_file
        _latest = (dict(additional), found)
    return _latest[1]


def known_dense() -> bool:
    """Whether the options read so far say dense; before any was read, False."""
    return _latest is not None and _latest[1].is_dense


def is_dense() -> bool:
    """Whether the options of the engine at hand say dense: outside of its configuration, those read last."""
    vllm_config = config()
    return known_dense() if vllm_config is None else options(vllm_config).is_dense


def limits(vllm_config: Any) -> Limits:
    """From the engine's configuration."""
    import torch
    import vllm.envs as envs

    scheduler, model, on_cpu = vllm_config.scheduler_config, vllm_config.model_config, _on_cpu()
    tokens, reqs = scheduler.max_num_batched_tokens, scheduler.max_num_seqs
    # On a CPU the library serves the rest of a step as well, and then a step may have all of its requests.
    ours = reqs if on_cpu else min(reqs, options(vllm_config).policy.most_of_ours(tokens))
    return Limits(
        device="cpu" if on_cpu else f"cuda:{torch.cuda.current_device()}",
        max_num_reqs=ours,
        max_total_q=tokens,
        max_kv_len=model.max_model_len,
        num_layers=num_layers(vllm_config),
        num_splits=1 if on_cpu or envs.VLLM_BATCH_INVARIANT else 0,
    )


def num_layers(vllm_config: Any) -> int:
    """Of the whole model, whatever share of them is this rank's."""
    return int(vllm_config.model_config.get_total_num_hidden_layers())


def build() -> str:
    """What the library says of its build; loads it, and no driver."""
    return build_info()


def model_facts(vllm_config: Any) -> dict[str, Any]:
    """What the validation hook is not told: for :func:`..serving.policy.config_refusals`."""
    if vllm_config is None:
        return {}
    text = getattr(vllm_config.model_config, "hf_text_config", None)
    parallel = vllm_config.parallel_config
    position = str(getattr(text, "position_embedding_type", None) or "")
    return {
        "softcap": bool(getattr(text, "attn_logit_softcapping", None)),
        "alibi": bool(getattr(text, "alibi", False)) or position == "alibi" or _is_alibi_family(text),
        "two_batch": bool(getattr(parallel, "use_ubatching", False)),
        "context_parallel": getattr(parallel, "decode_context_parallel_size", 1) > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
    }


def layer_refusal(impl: Any) -> str | None:
    """Why this layer is the engine's, from what its constructor was given; None = it may be ours."""
    window = getattr(impl, "sliding_window", None)
    facts = {
        "logits softcap": bool(getattr(impl, "logits_soft_cap", 0)),
        "ALiBi": getattr(impl, "alibi_slopes", None) is not None,
        "attention sinks": getattr(impl, "sinks", None) is not None,
        "sliding window": window not in (None, -1, (-1, -1)),
        "attention type other than decoder": str(getattr(impl.attn_type, "value", impl.attn_type)) != "decoder",
        f"KV cache dtype {impl.kv_cache_dtype}": impl.kv_cache_dtype not in ("auto", "float16", "bfloat16", *FP8),
        "context parallel": getattr(impl, "dcp_world_size", 1) > 1,
    }
    return next((reason for reason, holds in facts.items() if holds), None)


def model_dtype(vllm_config: Any) -> str:
    """The library's word for the type of queries and results, whatever the cache's is."""
    return dtype_name(vllm_config.model_config.dtype)


def plain_query(query: Any, layer: Any, out: Any) -> Any:
    """Queries in the type of the results: over an fp8 cache the engine has quantised them for its own kernels."""
    return query if query.dtype == out.dtype else query.to(out.dtype) * layer._q_scale.to(out.dtype)


def service(shape: Shape, page_size: int, chosen: Options) -> Service:
    """The process's service of such layers."""
    key = (shape, page_size)
    if key not in _services or _services[key][0] is not chosen:
        _services[key] = (chosen, Service(shape, page_size, chosen))
    return _services[key][1]


def dtype_name(dtype: Any) -> str:
    """The library's word for a torch dtype, or torch's where it has none."""
    name = str(dtype).removeprefix("torch.")
    return {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}.get(name, name)


def start_line(chosen: Options, policy: Policy, layers: str, spec: Any) -> str:
    """What an operator needs to know which path runs."""
    if chosen.is_dense:
        return dense_line()
    device = _device_name()
    # On a CPU the library serves the rest as well, densely.
    rest = "dense" if device == "cpu" else "by the engine's own backend"
    return (
        f"compactattn {version()}: mode {chosen.mode}, {layers} layers on {device}, page size {spec.block_size}; "
        f"{chosen.words(policy)}; all else {rest}"
    )


def dense_line() -> str:
    """The same in mode dense."""
    return f"compactattn {version()}: mode dense, all by the engine's own backend"


def _device_name() -> str:
    import torch

    if _on_cpu():
        return "cpu"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor})"


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _is_alibi_family(text: Any) -> bool:
    # These give slopes to their attention layers without a word in the configuration.
    return getattr(text, "model_type", "") in ("bloom", "mpt", "baichuan", "jais")


# Names of e4m3 caches; of fp8 with other bits, fp8_e5m2, no kernel is offered.
FP8 = ("fp8", "fp8_e4m3")

_latest: tuple[dict[str, Any], Options] | None = None
_services: dict[tuple[Shape, int], tuple[Options, Service]] = {}
