"""torch's tensors are asked attribute by attribute: they say what their capsules say, and a call stays cheap."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compactattn
import pytest
from compactattn.tensors import view
from test_cuda import SHAPES, Library, Torch, TorchTensor, given, library, settings, torch  # noqa: F401

PACKAGE = str(Path(compactattn.__file__).parent)


class Plain(TorchTensor):
    """Stands in for torch.Tensor itself, on a GPU; its capsules are counted."""

    requires_grad, is_cuda, is_cpu = False, True, False
    lent = 0

    def get_device(self) -> int:
        return 1

    def data_ptr(self) -> int:
        return self.address

    def stride(self) -> tuple[int, ...]:
        made, step = [], 1
        for extent in reversed(self.shape):
            made.append(step)
            step *= extent
        return tuple(reversed(made))

    def __dlpack__(self, **options: Any) -> Any:
        type(self).lent += 1
        return super().__dlpack__(**options)


Plain.__module__, Plain.__name__ = "torch", "Tensor"


def step(kind: Any) -> list[Any]:
    return [kind(shape, "bfloat16" if len(shape) > 2 else "int32") for shape in SHAPES.values()]


def calls_of(run: Callable[[], object]) -> int:
    """Python functions of the package that one run enters."""
    count = 0

    def watch(frame: Any, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def test_a_forward_enters_few_functions_and_makes_no_capsule(library: Library, torch: Torch) -> None:  # noqa: F811
    tensors, out = step(Plain), Plain(SHAPES["q"], "bfloat16")
    chosen = settings()

    def run() -> None:
        compactattn.forward(*tensors, settings=chosen, out=out)

    run()
    Plain.lent = 0
    # 48 as this is written: 14 for 7 tensors, the rest for batch, home, plan and arguments. Through capsules it is 90,
    # and as many again of torch's. Not a time: that would depend on who else uses the machine.
    assert calls_of(run) <= 52
    assert Plain.lent == 0
    assert library.count("forward") == 2
    seen = [getattr(given(library).batch.contents, name) for name in ("q", "k", "v", "block_table", "seq_lens")]
    assert [x.data for x in seen] == [x.address for x in tensors[:5]]


def test_asked_or_lent_a_tensor_is_the_same() -> None:
    lent, asked = TorchTensor((3, 1, 7, 64), "bfloat16"), Plain((3, 1, 7, 64), "bfloat16")
    asked.address = lent.address
    assert bytes(view("x", asked).tensor) == bytes(view("x", lent).tensor)
    assert view("x", asked)[1:] == (view("x", lent).dtype, asked, lent.shape)


def test_real_tensors_say_what_their_capsules_say(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")  # noqa: F811
    base = torch.arange(3 * 5 * 4 * 8, dtype=torch.float32).view(3, 5, 4, 8)
    for tensor in (
        base,
        base[1:, ::2].transpose(1, 2),
        base[0, 0, 0].to(torch.bfloat16),
        base.half(),
        base.int()[:0],
        base.to(torch.int32).view(torch.uint32),
        torch.nn.Parameter(base, requires_grad=False),
    ):
        asked = view("x", tensor)
        assert asked.owner is tensor
        monkeypatch.setattr("compactattn.tensors._torch_kinds", set())
        monkeypatch.setattr("compactattn.tensors._is_torch", lambda _: False)
        lent = view("x", tensor)
        monkeypatch.undo()
        assert isinstance(lent.owner, tuple)
        assert (asked.dtype, asked.shape) == (lent.dtype, lent.shape)
        if tensor.numel():
            assert bytes(asked.tensor) == bytes(lent.tensor)


def test_what_torch_would_not_lend_is_refused_as_ever() -> None:
    torch = pytest.importorskip("torch")  # noqa: F811
    good = torch.zeros(2, 3)
    for tensor, text in (
        (good.clone().requires_grad_(), "x: wanted a tensor that DLPack can lend, got .*gradient"),
        (good.to_sparse(), "x: wanted a tensor that DLPack can lend"),
        (good.long(), "x.dtype: wanted bf16, f16, f32, i32, u32 or e4m3, got DLPack type 0 of 64 bits"),
        (good.sum(), "x.ndim: wanted 1 to 4 dimensions, got 0"),
        (torch.zeros(1, 1, 1, 1, 1), "x.ndim: wanted 1 to 4 dimensions, got 5"),
    ):
        with pytest.raises(compactattn.InvalidArgument, match=text):
            view("x", tensor)


def test_a_struct_is_packed_as_ctypes_lays_it_out() -> None:
    from compactattn import _abi, tensors

    packed = tensors._TENSOR(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14)
    read = _abi.Tensor.from_buffer_copy(packed)
    assert len(packed) == ctypes.sizeof(_abi.Tensor)
    assert (read.data, list(read.shape), list(read.stride)) == (1, [2, 3, 4, 5], [6, 7, 8, 9])
    rest = (read.storage_bytes, read.dtype, read.ndim, read.device_kind, read.device_ordinal)
    assert rest == (10, 11, 12, 13, 14)
