"""The entry point of vLLM's plugin group: run in every process of an engine, any number of times."""

from __future__ import annotations

from typing import Any

from ..serving import hooks
from ..serving.report import LOG

GPU_CLASS = "compactattn.vllm.backend.CompactAttentionBackend"
CPU_CLASS = "compactattn.vllm.cpu.CompactCpuBackend"


def register() -> None:
    """Puts the backend into the engine's slot: CUSTOM, or on CPUs, if COMPACTATTN_MODE asks for it, CPU_ATTN.

    Imports neither torch's CUDA nor the native library. A slot that another plugin holds stays its own, and an engine
    without the hooks is left as it is: HookError if COMPACTATTN_MODE asks for us, else a warning.
    """
    try:
        _register()
    except hooks.HookError as error:
        hooks.refuse(error)


def _register() -> None:
    is_cpu = hooks.attribute("vllm", "vllm.platforms:current_platform.is_cpu")
    hooks.callable_with("vllm", "vllm.platforms:current_platform.is_cpu", is_cpu, 0)
    mode = hooks.mode()
    if is_cpu():
        # The CPU platform takes no --attention-backend, so that the mode itself is the opt-in.
        if mode not in ("", "dense"):
            _take("CPU_ATTN", CPU_CLASS)
        return
    if mode != "dense":
        _take("CUSTOM", GPU_CLASS)
        return
    # The slot is then the engine's own class: not one line of ours runs in it.
    engines = hooks.attribute("vllm", f"{SLOTS}.FLASH_ATTN.get_path")()
    LOG.info("compactattn: mode dense, the attention backend slot CUSTOM is %s", engines)
    _take("CUSTOM", engines)


def _take(name: str, class_path: str) -> None:
    slot: Any = hooks.attribute("vllm", f"{SLOTS}.{name}")
    for method in ("is_overridden", "get_path"):
        path = f"{SLOTS}.{name}.{method}"
        hooks.callable_with("vllm", path, hooks.attribute("vllm", path), 0)
    put = hooks.attribute("vllm", REGISTER)
    hooks.callable_with("vllm", REGISTER, put, 2)
    held = slot.get_path() if slot.is_overridden() else None
    if held == class_path:
        return
    if held is not None:
        raise hooks.taken("vllm", f"{SLOTS}.{name}", held, "VLLM_PLUGINS names the plugins to load")
    put(slot, class_path)
    got = slot.get_path() if slot.is_overridden() else "nothing"
    if got != class_path:
        getattr(slot, "clear_override", lambda: None)()
        raise hooks.changed("vllm", REGISTER, f"{class_path} in {name}", str(got))


SLOTS = "vllm.v1.attention.backends.registry:AttentionBackendEnum"
REGISTER = "vllm.v1.attention.backends.registry:register_backend"
