"""Attention backend for vLLM, registered by entry point in an engine that is not changed.

It wraps the engine's own backend and takes over long prefill chunks only: what :mod:`..serving.policy` names. All
else, KV writes and decode included, is the engine's code. Importing this package imports no vLLM and no torch.
"""

from __future__ import annotations

from ..serving.report import counters

__all__ = ["counters"]
