"""Where a step lives: its device, that device's context, the stream, and memory beside it.

No framework is imported: torch is asked only where the caller has loaded it.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from . import context
from ._abi import DeviceKind, Dtype, Tensor
from .arrays import Array
from .errors import E_DEVICE, E_NULL, E_STREAM, invalid
from .tensors import View


@dataclass(frozen=True)
class Home:
    """The device of a step's tensors, and the library whose tensors they are."""

    # cpu or cuda:N.
    device: str = "cpu"
    # The torch module, where the tensors are torch's.
    torch: Any = None

    @classmethod
    def of(cls, views: tuple[View, ...], names: tuple[str, ...]) -> Home:
        """The one device all of them lie on; InvalidArgument (E_DEVICE) naming the first that does not."""
        leader = views[0].tensor
        device = _device(leader)
        kind, ordinal = leader.device_kind, leader.device_ordinal
        for i, view in enumerate(views):
            tensor = view.tensor
            if tensor.device_kind != kind or tensor.device_ordinal != ordinal:
                wanted = f"memory of {device}, as batch.{names[0]}"
                raise invalid(E_DEVICE, f"batch.{names[i]}", wanted, _device(tensor))
        return cls(device, _torch() if _is_torch(views[0]) else None)

    @property
    def on_cpu(self) -> bool:
        """Whether the host may read it."""
        return self.device == "cpu"

    def context(self) -> context.Context:
        """The process's context of this device."""
        return context.of(self.device)

    def stream(self, given: int | None) -> int | None:
        """The ``cudaStream_t`` to use: the caller's, else torch's current one; None on the CPU."""
        if given is not None or self.on_cpu:
            return given
        torch = _torch()
        if torch is None:
            raise invalid(E_STREAM, "stream", "a cudaStream_t as int (no torch is loaded to ask for its own)", None)
        handle: int = torch.cuda.current_stream(int(self.device.partition(":")[2])).cuda_stream
        return handle

    def empty(self, name: str, shape: tuple[int, ...], dtype: Dtype, stream: int | None = None) -> Any:
        """Memory for ``name``, contents undefined (zero on the CPU), for use on ``stream`` (None = torch's current)."""
        if self.on_cpu:
            return Array(shape, dtype)
        torch = self._ask(name)
        with self._beside(stream):
            return torch.empty(shape, dtype=self._dtype(dtype), device=self.device)

    def zeros(self, name: str, shape: tuple[int, ...], dtype: Dtype, stream: int | None = None) -> Any:
        """Memory for ``name``, all zero, for use on ``stream`` (None = torch's current), which also zeroes it."""
        if self.on_cpu:
            return self.empty(name, shape, dtype)
        torch = self._ask(name)
        with self._beside(stream):
            # Zero bytes are zero in each of our types, and not every torch fills its unsigned ones.
            if dtype is not Dtype.U32:
                return torch.zeros(shape, dtype=self._dtype(dtype), device=self.device)
            return torch.zeros(shape, dtype=torch.int32, device=self.device).view(self._dtype(dtype))

    def _beside(self, stream: int | None) -> AbstractContextManager[Any]:
        # torch hands freed memory out again in the order of the stream it was made on: no other may use it.
        if stream is None or stream == self.stream(None):
            return nullcontext()
        made: AbstractContextManager[Any] = self.torch.cuda.stream(
            self.torch.cuda.ExternalStream(stream, device=self.device)
        )
        return made

    def _ask(self, name: str) -> Any:
        if self.torch is None:
            raise invalid(E_NULL, name, f"memory of {self.device} from the caller (only torch is asked for it)", None)
        return self.torch

    def _dtype(self, dtype: Dtype) -> Any:
        return getattr(self.torch, _TORCH_NAMES[dtype])


CPU = Home()


def _device(tensor: Tensor) -> str:
    return "cpu" if tensor.device_kind == DeviceKind.CPU else f"cuda:{tensor.device_ordinal}"


def _is_torch(view: View) -> bool:
    # A view of a DLPack producer owns the producer and its capsule.
    owner = view.owner[0] if isinstance(view.owner, tuple) else view.owner
    return type(owner).__module__.partition(".")[0] == "torch"


def _torch() -> Any:
    return sys.modules.get("torch")


_TORCH_NAMES = {
    Dtype.BF16: "bfloat16",
    Dtype.F16: "float16",
    Dtype.F32: "float32",
    Dtype.I32: "int32",
    Dtype.U32: "uint32",
}
