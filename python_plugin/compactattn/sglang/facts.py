"""What the engine says of itself, read in one place: options, limits, reasons against it."""

from __future__ import annotations

import json
import os
from typing import Any

from .. import build_info, version
from ..serving.policy import Policy
from ..serving.report import REPORT
from ..serving.service import Shape
from ..serving.settings import ADDITIONAL, Options


def options() -> Options:
    """COMPACTATTN_MODE and COMPACTATTN_CONFIG, changed by the JSON object in COMPACTATTN_SGLANG; read once."""
    global _options
    if _options is None:
        text = os.environ.get(VARIABLE) or "{}"
        try:
            _options = Options.read({"compactattn": json.loads(text)})
        except json.JSONDecodeError as error:
            raise ValueError(f"compactattn: {VARIABLE}: wanted JSON, got {error}") from None
        except ValueError as error:
            raise ValueError(str(error).replace(ADDITIONAL, VARIABLE)) from None
        REPORT.strict, REPORT.file = _options.strict, _options.counters_file
    return _options


def of_runner(runner: Any, chosen: Options) -> dict[str, Any]:
    """For :func:`.policy.config_refusals`; attributes that an engine's version lacks count as off."""
    args, model, pool = server_args(), runner.model_config, runner.token_to_kv_pool
    parallel = max(int(getattr(args, name, 1) or 1) for name in ("dcp_size", "attn_cp_size"))
    return {
        "use_mla": bool(getattr(runner, "use_mla_backend", False)),
        "head_size": int(model.head_dim),
        "dtype": str(runner.dtype).removeprefix("torch."),
        "device_capability": capability(),
        "build": build_info(),
        "page_size": int(runner.page_size),
        "kv_cache_dtype": str(getattr(args, "kv_cache_dtype", "auto")),
        "encoder_decoder": bool(getattr(model, "is_encoder_decoder", False)),
        "context_parallel": parallel > 1,
        "disaggregation": getattr(args, "disaggregation_mode", "null") not in (None, "null"),
        "hicache_storage": bool(getattr(args, "hicache_storage_backend", None)),
        "two_batch": bool(getattr(args, "enable_two_batch_overlap", False)),
        "unified_memory": bool(getattr(args, "enable_unified_memory", False))
        or bool(getattr(getattr(runner, "kv_index_translator", None), "is_translating", False)),
        "kv_sharding": "PageInterleave" in "".join(base.__name__ for base in type(pool).__mro__),
        "needs_means": chosen.needs_means,
    }


def layers_of(runner: Any) -> list[Any]:
    """The attention layers of the runner's model, which the engine loads before it makes backends; [] = not loaded."""
    from sglang.srt.layers.radix_attention import RadixAttention

    model = getattr(runner, "model", None)
    return [] if model is None else [layer for layer in model.modules() if isinstance(layer, RadixAttention)]


def shape_of(runner: Any, layer: Any, policy: Policy) -> Shape:
    """What the library must know of a layer (the engine's RadixAttention), and the engine's largest step."""
    tokens = max_step_tokens(runner)
    return Shape(
        num_q_heads=layer.tp_q_head_num,
        num_kv_heads=layer.tp_k_head_num,
        head_dim=layer.head_dim,
        sm_scale=float(layer.scaling),
        dtype={"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[str(runner.dtype).removeprefix("torch.")],
        device=_device(runner),
        max_num_reqs=policy.most_of_ours(tokens),
        max_total_q=tokens,
        max_kv_len=runner.model_config.context_len,
        num_splits=1 if getattr(server_args(), "enable_deterministic_inference", False) else 0,
    )


def max_step_tokens(runner: Any) -> int:
    """Query tokens of the engine's largest prefill step."""
    args = server_args()
    chunk = int(getattr(args, "chunked_prefill_size", 0) or 0)
    if chunk > 0:
        # A chunk is rounded to pages; in mixed steps each running request adds a token.
        return chunk + int(runner.page_size) + int(runner.req_to_token_pool.size)
    return max(int(getattr(args, "max_prefill_tokens", 0) or 0), int(runner.model_config.context_len))


def server_args() -> Any:
    """The engine's arguments, in every process of it."""
    from sglang.srt.runtime_context import get_server_args

    return get_server_args()


def start_line(chosen: Options, runner: Any) -> str:
    """What an operator needs to know which path runs."""
    return (
        f"compactattn {version()}: mode {chosen.mode}, page size {runner.page_size}; {chosen.words(chosen.policy)}; "
        "all else by the engine's own backend"
    )


def capability() -> tuple[int, int] | None:
    """Of the GPU of this process; None = there is none."""
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def _device(runner: Any) -> str:
    device = str(runner.device)
    return f"cuda:{runner.gpu_id}" if device == "cuda" else device


VARIABLE = "COMPACTATTN_SGLANG"

_options: Options | None = None
