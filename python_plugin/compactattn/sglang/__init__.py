"""Attention backend for SGLang, registered by entry point in an engine that is not changed.

It stands on the engine's own FlashAttention backend and takes over long prefill chunks only: what
:mod:`..serving.policy` names. Everything else, KV writes and decode included, is the engine's code. Importing this
package imports no SGLang and no torch.
"""

from __future__ import annotations

from ..serving.report import counters

__all__ = ["counters"]
