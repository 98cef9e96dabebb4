"""The backend of CPUs, for trying settings and for tests without a GPU: not a fast path.

The engine's CPU cache is packed for its own kernels, so with this backend keys and values are written here, in the
plain layout, and all attention over them is the library's: chunks that policy names by the settings, the rest densely.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from ..serving import hooks
from ..serving.service import kv_views
from ..settings import Settings
from .split import BUILDER_HOOKS, IMPL_HOOKS, SplitBuilder, SplitImpl

hooks.methods("vllm", CPUAttentionBackendImpl, IMPL_HOOKS | {"do_kv_cache_update": 6})
hooks.methods("vllm", CPUAttentionMetadataBuilder, BUILDER_HOOKS)
hooks.methods("vllm", CPUAttentionBackend, {"get_impl_cls": 0, "get_builder_cls": 0})


class CompactCpuImpl(SplitImpl, CPUAttentionBackendImpl):  # type: ignore[misc]
    """A layer that is not served is the engine's altogether, its cache too."""

    def engine_step(self, *args: Any, **kwargs: Any) -> Any:
        """Dense attention over the cache as it is written here."""
        _, query, _, _, kv_cache, metadata, output = args[:7]
        if metadata is None or self._service is None:
            return super().engine_step(*args, **kwargs)
        tokens = metadata.num_actual_tokens
        out = output[:tokens].view(-1, self.num_heads, self.head_size)
        views = kv_views(kv_cache, self.head_size)
        self._service.attend(query[:tokens], views, metadata, out, Settings.mode("dense"))
        return output

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: Any) -> None:
        """Keys and values of new tokens to their slots; -1 = none."""
        if self._service is None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        kept = (slot_mapping >= 0).nonzero().squeeze(1)
        slots = slot_mapping[kept]
        for pages, new in zip(kv_views(kv_cache, self.head_size), (key, value), strict=True):
            pages[slots // pages.shape[1], slots % pages.shape[1]] = new[kept].to(pages.dtype)


class CompactCpuMetadataBuilder(SplitBuilder, CPUAttentionMetadataBuilder):  # type: ignore[misc]
    """The engine's metadata, and the split beside it."""


class CompactCpuBackend(CPUAttentionBackend):  # type: ignore[misc]
    """Stands in the engine's own slot, as its CPU platform takes no other."""

    @staticmethod
    def get_impl_cls() -> type[CompactCpuImpl]:
        """Of each layer."""
        return CompactCpuImpl

    @staticmethod
    def get_builder_cls() -> type[CompactCpuMetadataBuilder]:
        """Of each KV group."""
        return CompactCpuMetadataBuilder
