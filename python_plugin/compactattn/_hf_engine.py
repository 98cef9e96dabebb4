"""What transformers computes itself: its own attention, the masks that takes, and the count of who served a call."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch  # type: ignore[import-not-found, unused-ignore]
from transformers.integrations.sdpa_attention import (  # type: ignore[import-not-found, unused-ignore]
    sdpa_attention_forward,
)
from transformers.masking_utils import sdpa_mask  # type: ignore[import-not-found, unused-ignore]

from .errors import Unsupported

# Calls by who served them: "compactattn", or why the engine did.
served: Counter[str] = Counter()

# Reasons that are the policy itself: nobody is warned of them.
DECODE, SHORT, SLIDING = "decode", "short", "sliding"
# Reasons a user may want to know of; the first call for each is logged.
MASK = "mask: not plain causal (padding, StaticCache, packed, 4-D)"


def attention(reason: str, module: Any, tensors: tuple[Any, Any, Any], mask: Any, kwargs: dict[str, Any]) -> Any:
    """The engine's sdpa over ``(query, key, value)``, counted under ``reason``.

    Where chunks of a plain causal mask come without one, as :func:`compactattn.hf.mask` leaves it, it is made here:
    sdpa's own ``is_causal`` would be upper-left.
    """
    note(reason)
    refuse_what_sdpa_ignores(kwargs)
    query, key, _ = tensors
    q_len, kv_len = query.shape[2], key.shape[2]
    if mask is None and 1 < q_len < kv_len and is_causal(module, kwargs):
        mask = sdpa_mask(
            batch_size=query.shape[0],
            q_length=q_len,
            kv_length=kv_len,
            q_offset=kv_len - q_len,
            allow_is_causal_skip=False,
            device=query.device,
        )
    return sdpa_attention_forward(module, *tensors, mask, **kwargs)


def packed_mask(cu_seqlens_q: Any, cu_seqlens_k: Any, size: tuple[int, int], window: int) -> Any:
    """Who sees whom among packed requests, bool ``[1, 1, *size]``: own request, bottom-right causal, in the window.

    ``cu_seqlens_* [num_reqs + 1]``; nothing is read back from the device. Rows of no request see everything, as sdpa
    has no answer for a row that sees nothing.
    """
    device = cu_seqlens_q.device
    q, k = torch.arange(size[0], device=device), torch.arange(size[1], device=device)
    last = cu_seqlens_q.shape[0] - 2
    req_of_q = torch.searchsorted(cu_seqlens_q[1:].contiguous(), q, right=True)
    req_of_k = torch.searchsorted(cu_seqlens_k[1:].contiguous(), k, right=True)
    # Both are counted from their request's end, where they meet. Behind the last request is nobody's.
    own = req_of_q.clamp(max=last)
    reach = (q - cu_seqlens_q[own + 1] + cu_seqlens_k[own + 1])[:, None]
    seen = (own[:, None] == req_of_k) & (req_of_q <= last)[:, None] & (k <= reach) & (k > reach - window)
    return (seen | ~seen.any(-1, keepdim=True))[None, None]


def is_causal(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call without a mask is causal, as sdpa reads it."""
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def refuse_what_sdpa_ignores(kwargs: dict[str, Any]) -> None:
    """Raises Unsupported for what neither we nor sdpa compute; older engines drop it silently."""
    for name, feature in (("softcap", "logits softcap"), ("s_aux", "attention sinks")):
        if kwargs.get(name) is not None:
            text = f"E_UNSUPPORTED: {name}: wanted none, got {feature}; set attn_implementation to eager or a flash one"
            raise Unsupported(8, "E_UNSUPPORTED", text)


def note(reason: str) -> None:
    """Counts a call that the engine serves; says so once, unless that is the policy."""
    if reason not in served and reason not in (DECODE, SHORT, SLIDING):
        _log.warning("attention is transformers' sdpa, dense, for calls with %s (said once)", reason)
    served[reason] += 1


_log = logging.getLogger("compactattn.hf")
