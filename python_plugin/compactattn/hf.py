"""transformers: ``import compactattn.hf``, then ``model.set_attn_implementation("compactattn")``.

Long prefill chunks of ``generate(..., prefill_chunk_size=N)`` go to the library, straight over the cache's own
tensors; decode, first and short chunks, sliding layers and masks that are not plain causal stay transformers' sdpa.
``paged|compactattn`` serves continuous batching of transformers 5.17 over its paged cache. What is long, and what is
kept, say COMPACTATTN_MODE and COMPACTATTN_CONFIG (``dense_below_kv_len``, ``dense_max_q_len``), layer by layer.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any

import torch  # type: ignore[import-not-found, unused-ignore]
from transformers import AttentionInterface, AttentionMaskInterface  # type: ignore[import-not-found, unused-ignore]
from transformers.integrations.sdpa_attention import (  # type: ignore[import-not-found, unused-ignore]
    sdpa_attention_forward,
)
from transformers.masking_utils import causal_mask_function, sdpa_mask  # type: ignore[import-not-found, unused-ignore]

from . import _hf_contiguous, _hf_paged, _hf_register, api
from . import _hf_engine as engine
from ._stats import Stats
from .errors import Unsupported
from .settings import Settings

NAME = "compactattn"


@dataclass(frozen=True)
class Report:
    """Who served the attention calls (one a layer and forward) since the last :func:`register`."""

    # Calls that the library served.
    served: int
    # Calls that transformers' sdpa served, by reason.
    engine: dict[str, int]
    # What the library's steps have selected; its density is the share of past blocks that were read.
    stats: Stats


def register() -> None:
    """Registers ``compactattn`` and ``paged|compactattn``, reads the environment afresh and forgets the counts.

    Importing the module does it. Raises LibraryError without a library, InvalidArgument for a wrong setting,
    HookError where transformers has changed or somebody else holds a name: nothing is then registered.
    """
    _settings.cache_clear()
    _thresholds.cache_clear()
    _settings(-1)
    engine.served.clear()
    global _before
    _before = api.stats()
    _hf_register.offer(
        [
            (AttentionInterface, NAME, attention),
            (AttentionMaskInterface, NAME, mask),
            (AttentionInterface, f"paged|{NAME}", paged_attention),
        ]
    )


def report() -> Report:
    """Counts so far; waits for the GPU, whose steps count when they are done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    counts = dict(engine.served)
    stats = {name: count - getattr(_before, name) for name, count in asdict(api.stats()).items()}
    return Report(counts.pop(NAME, 0), counts, Stats(**stats))


def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> tuple[Any, None]:
    """The attention function: ``query [batch, heads, q_len, dim]``, KV with all of the past.

    Returns ``[batch, q_len, heads, dim]``. Raises Unsupported for softcap and sinks, which sdpa would leave out. In a
    forward compiled by torch, decode is traced into sdpa and not counted; all else breaks the graph.
    """
    if query.shape[2] == 1 and torch.compiler.is_compiling():
        engine.refuse_what_sdpa_ignores(kwargs)
        traced: tuple[Any, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return traced
    answer: tuple[Any, None] = _untraced_attention(module, (query, key, value), attention_mask, kwargs)
    return answer


def mask(*, q_length: int, **kwargs: Any) -> Any:
    """The mask function: None for a plain causal mask that the library may serve, else sdpa's.

    A chunk's dense mask would be as large as a head's scores. sdpa's own reason to return None, an upper-left causal
    mask, is not used where there is a past, so that None says one thing.
    """
    return sdpa_mask(q_length=q_length, **kwargs) if q_length == 1 else _untraced_mask(q_length, **kwargs)


def paged_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any
) -> tuple[Any, None]:
    """The attention function of continuous batching: packed ``query [1, heads, tokens, dim]``, new KV only.

    Everything but sliding layers goes to the library, decode too: its own settings say what is dense.
    """
    answer: tuple[Any, None] = _untraced_paged(module, (query, key, value), kwargs)
    return answer


def _attention(module: Any, tensors: tuple[Any, Any, Any], mask: Any, kwargs: dict[str, Any]) -> Any:
    query, key, _ = tensors
    settings = _settings(getattr(module, "layer_idx", None))
    reason = _policy(module, query, key, settings) or _unfit(module, tensors, mask, kwargs)
    if reason is None:
        try:
            out = _hf_contiguous.chunk(*tensors, kwargs.get("scaling"), settings)
            engine.served[NAME] += 1
            return out, None
        except Unsupported as error:
            reason = str(error)
    return engine.attention(reason, module, tensors, mask, kwargs)


def _mask(
    q_length: int, *, kv_length: int, q_offset: Any = 0, attention_mask: Any = None, config: Any = None, **kwargs: Any
) -> Any:
    plain = (
        kwargs.get("mask_function", causal_mask_function) is causal_mask_function
        and kwargs.get("kv_offset", 0) == 0
        # A StaticCache has tokens to come after the last, and its offset on the device.
        and isinstance(q_offset, int)
        and q_offset + q_length == kv_length
    )
    max_q_len, min_kv_len = _thresholds(getattr(config, "num_hidden_layers", 1))
    if plain and q_offset and q_length > max_q_len and kv_length >= min_kv_len and _unpadded(attention_mask, kv_length):
        return None
    if q_length != kv_length:
        kwargs["allow_is_causal_skip"] = False
    given = {"q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "attention_mask": attention_mask}
    return sdpa_mask(**given, config=config, **kwargs)


def _paged(module: Any, tensors: tuple[Any, Any, Any], kwargs: dict[str, Any]) -> Any:
    engine.refuse_what_sdpa_ignores(kwargs)
    step = _hf_paged.Step.of(module, kwargs)
    return _hf_paged.attention(module, tensors, step, _settings(step.layer), kwargs)


def _policy(module: Any, query: Any, key: Any, settings: Settings) -> str | None:
    """Why a call is not for the library, as its settings say."""
    q_len, kv_len = query.shape[2], key.shape[2]
    if q_len == 1:
        return engine.DECODE
    if getattr(module, "sliding_window", None) is not None:
        return engine.SLIDING
    past = kv_len - q_len
    if q_len <= settings.dense_max_q_len or kv_len < settings.dense_below_kv_len or past < _hf_contiguous.PAGE:
        return engine.SHORT
    return None


def _unfit(module: Any, tensors: tuple[Any, Any, Any], mask: Any, kwargs: dict[str, Any]) -> str | None:
    """Why a long chunk cannot be the library's."""
    query, key, value = tensors
    reasons = {
        engine.MASK: mask is not None or not engine.is_causal(module, kwargs),
        "dropout": kwargs.get("dropout"),
        "gradients": query.requires_grad or key.requires_grad or value.requires_grad,
        "position_bias": kwargs.get("position_bias") is not None,
        "softcap or sinks": any(kwargs.get(name) is not None for name in ("softcap", "s_aux")),
        "output_attentions": kwargs.get("output_attentions"),
        "values unlike keys": key.shape != value.shape or not query.dtype == key.dtype == value.dtype,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _unpadded(attention_mask: Any, kv_length: int) -> bool:
    return attention_mask is None or (attention_mask.shape[-1] == kv_length and bool(attention_mask.all()))


@functools.cache
def _settings(layer: int | None) -> Settings:
    return _first_of_equals(Settings.from_env(-1 if layer is None else layer))


@functools.cache
def _first_of_equals(settings: Settings) -> Settings:
    """One object for all layers that are set alike: what is kept for a chunk is found by its identity."""
    return settings


@functools.cache
def _thresholds(num_layers: int) -> tuple[int, int]:
    """The longest chunk that is dense in every layer, and the shortest KV that is not in some."""
    layers = [_settings(layer) for layer in range(num_layers)]
    return min(s.dense_max_q_len for s in layers), min(s.dense_below_kv_len for s in layers)


# What compiled models may not trace into: ctypes, and counts.
_untraced_attention, _untraced_mask, _untraced_paged = map(torch.compiler.disable, (_attention, _mask, _paged))
_before = Stats()
register()
