"""The backend of GPUs: the engine's FlashAttention, with long prefill chunks taken over."""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend

from ..serving import hooks
from ..serving.report import REPORT
from ..serving.settings import Options
from . import facts
from .split import SplitBackend

# What the mixin overrides.
hooks.methods("sglang", FlashAttentionBackend, {"init_forward_metadata": 2, "forward_extend": 7})


class CompactAttentionBackend(SplitBackend, FlashAttentionBackend):  # type: ignore[misc]
    """What ``--prefill-attention-backend compactattn`` names; as ``--attention-backend`` it decodes as the engine's."""

    def __init__(self, model_runner: Any, chosen: Options, fa_impl_ver: int) -> None:
        super().__init__(model_runner, fa_impl_ver=fa_impl_ver)
        self.serve(model_runner, chosen)
        REPORT.start(facts.start_line(chosen, model_runner))
