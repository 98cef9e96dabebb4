"""The engine on a machine without a GPU: its kernels' package is named on import, and nothing in it may be called."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class Kernels(ModuleType):
    """Any name is a function that fails; so a test that reaches one says which."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def kernel(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError(f"{self.__name__}.{name} runs on GPUs")

        return kernel


if find_spec("sgl_kernel") is None:
    stub = Kernels("sgl_kernel")
    stub.__spec__, stub.__path__ = ModuleSpec("sgl_kernel", None, is_package=True), []
    sys.modules["sgl_kernel"] = stub
