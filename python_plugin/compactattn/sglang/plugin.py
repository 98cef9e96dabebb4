"""The entry point of SGLang's plugin group: run in every process of an engine, before it reads its arguments."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from ..serving import hooks
from ..serving.report import LOG


def register() -> None:
    """Offers the backend as ``--prefill-attention-backend compactattn`` (also ``--attention-backend``).

    Imports neither the native library nor any of the engine's backends. A name that another plugin holds stays its
    own, and an engine without the hooks is left as it is: HookError if COMPACTATTN_MODE asks for us, else a warning;
    the engine then refuses the argument.
    """
    try:
        _register()
    except hooks.HookError as error:
        hooks.refuse(error)


def _register() -> None:
    backends = hooks.attribute("sglang", BACKENDS)
    if not isinstance(backends, MutableMapping):
        raise hooks.changed("sglang", BACKENDS, "a dict of factories by name", type(backends).__name__)
    offer, choices = hooks.attribute("sglang", REGISTER), hooks.attribute("sglang", CHOICES)
    for path, hook in ((REGISTER, offer), (CHOICES, choices)):
        hooks.callable_with("sglang", path, hook, 1)
    if NAME in backends:
        if backends[NAME] is not create:
            raise hooks.taken("sglang", f"{BACKENDS}[{NAME}]", _holder(backends[NAME]), "uninstall the other plugin")
        return
    try:
        offer(NAME)(create)
        if backends.get(NAME) is not create:
            raise hooks.changed("sglang", REGISTER, f"our factory at {NAME}", str(type(backends.get(NAME)).__name__))
        choices([NAME])
    except BaseException:
        # Both or neither: a factory without its choice is half an offer.
        backends.pop(NAME, None)
        raise


def _holder(factory: Any) -> str:
    return f"{getattr(factory, '__module__', '?')}.{getattr(factory, '__qualname__', type(factory).__name__)}"


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
BACKENDS = "sglang.srt.layers.attention.attention_registry:ATTENTION_BACKENDS"
REGISTER = "sglang.srt.layers.attention.attention_registry:register_attention_backend"
CHOICES = "sglang.srt.server_args:add_attention_backend_choices"
