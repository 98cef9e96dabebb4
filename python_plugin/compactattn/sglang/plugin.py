"""The entry point of SGLang's plugin group: run in every process of an engine, before it reads its arguments."""

from __future__ import annotations

from typing import Any

from ..serving.report import LOG


def register() -> None:
    """Offers the backend as ``--prefill-attention-backend compactattn`` (also ``--attention-backend``).

    Imports neither the native library nor any of the engine's backends. A name that another plugin holds stays its own.
    """
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend
    from sglang.srt.server_args import add_attention_backend_choices

    if NAME in ATTENTION_BACKENDS:
        if ATTENTION_BACKENDS[NAME] is not create:
            LOG.warning("compactattn: the attention backend name is taken by %s", ATTENTION_BACKENDS[NAME])
        return
    register_attention_backend(NAME)(create)
    add_attention_backend_choices([NAME])


def create(runner: Any) -> Any:
    """The backend for a model runner; ValueError with every reason against it, so that the engine does not start.

    In mode dense, and for the draft model of speculative decoding, it is the engine's own.
    """
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    from . import facts, policy

    chosen = facts.options()
    own = "fa4" if (facts.capability() or (0, 0))[0] >= 10 else "fa3"
    if chosen.is_dense or getattr(runner, "is_draft_worker", False):
        LOG.info("compactattn: this model's attention is the engine's own %s", own)
        return ATTENTION_BACKENDS[own](runner)
    found = policy.config_refusals(facts.of_runner(runner, chosen))
    if found:
        raise ValueError("compactattn: " + "; ".join(found))
    from .backend import CompactAttentionBackend

    return CompactAttentionBackend(runner, chosen, 4 if own == "fa4" else 3)


NAME = "compactattn"
