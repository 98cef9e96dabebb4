"""The backend of GPUs: the engine's FlashAttention, with long prefill chunks taken over."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from ..serving import hooks, policy
from ..serving.report import REPORT
from ..serving.service import kv_axis_of
from . import current
from .split import BACKEND_HOOKS, BUILDER_HOOKS, IMPL_HOOKS, SplitBuilder, SplitImpl

hooks.methods("vllm", FlashAttentionImpl, IMPL_HOOKS)
hooks.methods("vllm", FlashAttentionMetadataBuilder, BUILDER_HOOKS | {"get_cudagraph_support": 2})
hooks.methods("vllm", FlashAttentionBackend, BACKEND_HOOKS)


class CompactAttentionImpl(SplitImpl, FlashAttentionImpl):  # type: ignore[misc]
    """KV writes, decode, cascade, quantised caches: FlashAttentionImpl's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kv_axis = kv_axis_of(FlashAttentionBackend, self.head_size)


class CompactAttentionMetadataBuilder(SplitBuilder, FlashAttentionMetadataBuilder):  # type: ignore[misc]
    """FlashAttentionMetadataBuilder's metadata, and the split beside it."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        """Uniform decode at most, as steps with chunks are split on the host; in mode dense the engine's own."""
        own = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        if current.options(vllm_config).is_dense:
            return own
        return min(own, type(own).UNIFORM_BATCH, key=lambda support: support.value)


class CompactAttentionBackend(FlashAttentionBackend):  # type: ignore[misc]
    """What ``--attention-backend CUSTOM`` names."""

    @staticmethod
    def get_name() -> str:
        """The slot: the engine looks the backend up by it."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> Any:
        """Of each layer; in mode dense, whoever asked for it, the engine's own."""
        return FlashAttentionBackend.get_impl_cls() if current.is_dense() else CompactAttentionImpl

    @staticmethod
    def get_builder_cls() -> Any:
        """Of each KV group; as the layers'."""
        if not current.is_dense():
            return CompactAttentionMetadataBuilder
        REPORT.start(current.dense_line())
        return FlashAttentionBackend.get_builder_cls()

    @staticmethod
    def get_supported_kernel_block_sizes(*args: Any, **kwargs: Any) -> list[Any]:
        """Page sizes of our kernels; other multiples of 16 are cut by the engine into the largest that divides."""
        if current.known_dense():
            return list(FlashAttentionBackend.get_supported_kernel_block_sizes(*args, **kwargs))
        return list(policy.PAGE_SIZES)

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Whether the device may hold other query lengths than the host: not in steps that the host splits."""
        return current.known_dense()

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        """Reasons against this model, machine and configuration, for the engine to print at start."""
        vllm_config = current.config()
        # Read first, as what the engine asks of this class for its own reasons differs by mode.
        try:
            options = current.options(vllm_config)
        except ValueError as error:
            return [str(error)]
        found: list[str] = list(super().validate_configuration(*args, **kwargs))
        if options.is_dense:
            return found
        own = {"needs_means": options.needs_means, "build": current.build()}
        facts = policy.plain(kwargs) | current.model_facts(vllm_config) | own
        return found + [f"compactattn: {reason}" for reason in policy.config_refusals(facts)]
