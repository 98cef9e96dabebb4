"""What callers hold becomes the struct the library reads, without a copy; results go back the same way."""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from typing import Any

import compactattn
import numpy as np
import pytest
from cases import Case
from compactattn import _dlpack
from compactattn._abi import Dtype
from compactattn.tensors import view
from test_forward import sparse


class Producer:
    """Nothing but DLPack, over a NumPy array."""

    def __init__(self, array: Any, *, old: bool = False) -> None:
        self.array, self.old = array, old

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        if self.old and options:
            raise TypeError("unexpected keyword argument 'max_version'")
        return self.array.__dlpack__(**options)


class Handmade:
    """A DLPack 1.0 capsule with any field set, over a NumPy array."""

    def __init__(self, array: Any, *, major: int = 1, flags: int = 0, **fields: int) -> None:
        self.array = array
        self.extents = (ctypes.c_int64 * array.ndim)(*array.shape)
        self.managed = _dlpack._ManagedVersioned(major=major, flags=flags)
        lent = _dlpack.DLTensor(array.ctypes.data, 1, 0, array.ndim, 2, 32, 1, self.extents, None, 0)
        for name, value in fields.items():
            setattr(lent, name, value)
        self.managed.tensor = lent

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.managed.tensor.device_type, self.managed.tensor.device_id

    def __dlpack__(self, **options: Any) -> Any:
        self.options = options
        return _dlpack._new(ctypes.addressof(self.managed), b"dltensor_versioned", None)


def described(tensor: Any) -> tuple[Any, ...]:
    n = tensor.ndim
    return tensor.data, tensor.shape[:n], tensor.stride[:n], tensor.dtype, tensor.device_kind


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int32, np.uint32])
def test_dlpack_and_numpy_describe_the_same_memory(dtype: Any, old: bool) -> None:
    array = np.zeros((6, 5, 8), dtype)[::2, 1:4]
    assert described(view("x", Producer(array, old=old)).tensor) == described(view("x", array).tensor)
    assert view("x", array).tensor.data == array.ctypes.data


def test_every_field_of_a_capsule_is_heeded() -> None:
    array = np.zeros((3, 4), np.float32)
    seen = view("x", Handmade(array, byte_offset=16)).tensor
    assert described(seen) == (array.ctypes.data + 16, [3, 4], [4, 1], Dtype.F32, 1)
    for fields, text in (
        ({"flags": 1}, "x: wanted writable memory"),
        ({"major": 2}, r"DLPack 2\.0"),
        ({"type_lanes": 4}, "x.dtype"),
        ({"device_type": 9}, "x.device"),
    ):
        with pytest.raises(compactattn.InvalidArgument, match=text):
            view("x", Handmade(array, **fields), writable=True)
    assert view("x", Handmade(array, flags=1)).shape == (3, 4)


def test_a_gpu_tensor_is_not_synchronised_and_keeps_its_device() -> None:
    producer = Handmade(np.zeros((3, 4), np.float32), device_type=2, device_id=3)
    seen = view("x", producer).tensor
    assert (seen.device_kind, seen.device_ordinal) == (2, 3)
    assert producer.options == {"max_version": (1, 0), "stream": -1}


def test_a_tensor_on_another_device_is_refused() -> None:
    case = Case([(4, 20)])
    q, *rest = case.inputs()
    with pytest.raises(compactattn.InvalidArgument, match=r"E_DEVICE: .*batch.q"):
        compactattn.forward(Handmade(q, device_type=2), *rest, out=np.zeros_like(q))


def test_a_producer_is_released_with_its_view() -> None:
    array = np.zeros(4, np.float32)
    watched = weakref.ref(array)
    seen = view("x", Producer(array))
    del array
    gc.collect()
    assert watched() is not None
    del seen
    gc.collect()
    assert watched() is None


def test_forward_through_dlpack_equals_forward_through_numpy() -> None:
    case = Case([(20, 130), (3, 40)], layout="hnd")
    inputs = case.inputs()
    out = compactattn.forward(*map(Producer, inputs), settings=sparse())
    assert isinstance(out, compactattn.Array)
    assert np.asarray(out).tobytes() == compactattn.forward(*inputs, settings=sparse()).tobytes()


def test_own_arrays_are_shared_with_consumers_and_outlive_their_name() -> None:
    array = compactattn.Array((2, 3), Dtype.I32)
    shared, lent = np.asarray(array), np.from_dlpack(array)
    shared[1, 2] = 7
    assert lent[1, 2] == 7 and array.tolist() == [[0, 0, 0], [0, 0, 7]]
    del array, shared
    gc.collect()
    assert lent.tolist() == [[0, 0, 0], [0, 0, 7]]
    before = len(_dlpack._lent)
    del lent
    gc.collect()
    assert len(_dlpack._lent) == before - 1


def test_an_unconsumed_capsule_gives_its_memory_back() -> None:
    array = compactattn.Array((2,), Dtype.F32)
    before = len(_dlpack._lent)
    capsule = array.__dlpack__()
    assert len(_dlpack._lent) == before + 1
    del capsule
    assert len(_dlpack._lent) == before


def test_lists_of_ints_are_lengths_and_tables() -> None:
    case = Case([(4, 20), (3, 40)])
    *tensors, table, lens, cu = case.inputs()
    out = compactattn.forward(*tensors, table.tolist(), lens.tolist(), tuple(cu.tolist()))
    assert out.tobytes() == compactattn.forward(*tensors, table, lens, cu).tobytes()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.zeros(3), "x.dtype: wanted bf16, f16, f32, i32, u32 or e4m3, got <f8"),
        (np.zeros(3, np.uint16), "compactattn.bf16"),
        (np.zeros(3, np.uint8), "compactattn.e4m3"),
        (compactattn.e4m3(np.zeros(3, np.int8)), "x.dtype: wanted uint8"),
        (compactattn.e4m3(Producer(np.zeros(3, np.int64))), "x.dtype: wanted uint8"),
        (np.zeros(3, ">f4"), "got >f4"),
        (compactattn.bf16(np.zeros(3, np.int16)), "x.dtype: wanted uint16 words"),
        (np.float32(1.0).reshape(()), "x.ndim: wanted 1 to 4"),
        (np.zeros((1,) * 5, np.float32), "x.ndim: wanted 1 to 4"),
        (Producer(np.zeros(3, np.int64)), "x.dtype: .* DLPack type 0 of 64 bits"),
        (None, "E_NULL: x: wanted a tensor"),
        ("text", "x: wanted a NumPy array, .* got str"),
        ([1, 2**31], "x: wanted int32 numbers"),
        ([1, 2.5], "x: wanted int32 numbers"),
        ([[1, 2], [3]], "x: wanted rows of 2"),
    ],
)
def test_what_has_no_word_is_refused_by_name(value: Any, text: str) -> None:
    with pytest.raises(compactattn.InvalidArgument, match=text):
        view("x", value)


def test_read_only_memory_is_read_but_not_written() -> None:
    case = Case([(4, 20)])
    inputs = case.inputs()
    for array in inputs:
        array.flags.writeable = False
    out = np.zeros_like(inputs[0])
    compactattn.forward(*inputs, out=out)
    out.flags.writeable = False
    with pytest.raises(compactattn.InvalidArgument, match="out: wanted writable memory"):
        compactattn.forward(*inputs, out=out)
    scores = np.zeros((4, 4, 4), np.float32)
    scores.flags.writeable = False
    batch = compactattn.Batch.of(*inputs)
    with pytest.raises(compactattn.InvalidArgument, match=r"selection.scores: wanted writable memory"):
        compactattn.select(compactattn.plan_for(batch), batch, out=compactattn.Selection(scores))


def test_torch_tensors_go_in_and_come_out() -> None:
    torch = pytest.importorskip("torch")
    case = Case([(20, 130), (3, 40)], dtype="bf16", layout="interleaved")
    words = [torch.from_numpy(x.words.view(np.int16)).view(torch.bfloat16) for x in case.inputs()[:3]]
    rest = [torch.from_numpy(x) for x in case.inputs()[3:]]
    out, lse = compactattn.forward(*words, *rest, settings=sparse(), return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    wanted = compactattn.forward(*case.inputs(), settings=sparse())
    assert out.view(torch.int16).numpy().tobytes() == wanted.tobytes()
    given = torch.empty_like(words[0])
    assert compactattn.forward(*words, *rest, settings=sparse(), out=given) is given
    assert torch.equal(given.view(torch.int16), out.view(torch.int16))
    with pytest.raises(compactattn.InvalidArgument, match="q: wanted a tensor that DLPack can lend"):
        compactattn.forward(words[0].clone().requires_grad_(), *words[1:], *rest)


def test_jax_arrays_go_in_and_results_go_back() -> None:
    jax = pytest.importorskip("jax")
    case = Case([(20, 130), (3, 40)], dtype="bf16")
    words = [jax.lax.bitcast_convert_type(jax.numpy.asarray(x.words), jax.numpy.bfloat16) for x in case.inputs()[:3]]
    out = compactattn.forward(*words, *map(jax.numpy.asarray, case.inputs()[3:]), settings=sparse())
    assert np.asarray(out).tobytes() == compactattn.forward(*case.inputs(), settings=sparse()).tobytes()
    assert jax.dlpack.from_dlpack(out).dtype == jax.numpy.bfloat16


def test_views_cost_no_reference_leak() -> None:
    array = np.zeros(4, np.float32)
    before = sys.getrefcount(array)
    for _ in range(100):
        view("x", array)
        view("x", Producer(array))
    gc.collect()
    assert sys.getrefcount(array) == before
