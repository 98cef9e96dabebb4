"""The entry point of vLLM's plugin group: run in every process of an engine, any number of times."""

from __future__ import annotations

import os
from typing import Any

from ..serving.report import LOG
from ..serving.settings import MODE

GPU_CLASS = "compactattn.vllm.backend.CompactAttentionBackend"
CPU_CLASS = "compactattn.vllm.cpu.CompactCpuBackend"


def register() -> None:
    """Puts the backend into the engine's slot: CUSTOM, or on CPUs, if COMPACTATTN_MODE asks for it, CPU_ATTN.

    Imports neither torch's CUDA nor the native library. A slot that another plugin holds stays its own: that is said,
    and nothing of ours runs.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    mode = os.environ.get(MODE, "").strip().lower()
    if current_platform.is_cpu():
        # The CPU platform takes no --attention-backend, so that the mode itself is the opt-in.
        if mode not in ("", "dense"):
            _take(AttentionBackendEnum.CPU_ATTN, CPU_CLASS)
        return
    if mode != "dense":
        _take(AttentionBackendEnum.CUSTOM, GPU_CLASS)
        return
    # The slot is then the engine's own class: not one line of ours runs in it.
    engines = AttentionBackendEnum.FLASH_ATTN.get_path()
    LOG.info("compactattn: mode dense, the attention backend slot CUSTOM is %s", engines)
    _take(AttentionBackendEnum.CUSTOM, engines)


def _take(slot: Any, class_path: str) -> None:
    from vllm.v1.attention.backends.registry import register_backend

    held = slot.get_path() if slot.is_overridden() else None
    if held not in (None, class_path):
        LOG.warning(
            "compactattn: the attention backend slot %s is taken by %s, so compactattn is not offered; "
            "VLLM_PLUGINS names the plugins to load",
            slot.name,
            held,
        )
        return
    register_backend(slot, class_path)
