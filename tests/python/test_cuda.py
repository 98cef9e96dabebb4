"""Tensors on a GPU, without one: what the package hands to the library, and whom it asks for memory and streams.

A stand-in for torch lends addresses that nothing may follow; a stand-in for the library writes down its arguments.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import compactattn
import pytest
from compactattn import _dlpack, api, context, plan, stages
from compactattn._abi import Dtype

NAMES = {"bfloat16": Dtype.BF16, "float16": Dtype.F16, "float32": Dtype.F32, "int32": Dtype.I32, "uint32": Dtype.U32}
CODES = {dtype: key for key, dtype in _dlpack._DTYPES.items()}
SHAPES = {"q": (40, 4, 64), "k": (9, 16, 2, 64), "v": (9, 16, 2, 64), "table": (2, 4), "lens": (2,), "cu": (3,)}


class Tensor:
    """DLPack on device memory that does not exist: reading it ends the process."""

    fresh = itertools.count(0x7F00_0000_0000, 1 << 24)
    made_on: int

    def __init__(self, shape: tuple[int, ...], dtype: str, device: str = "cuda:1") -> None:
        self.shape, self.dtype, self.device = tuple(shape), dtype, device
        self.address = next(self.fresh)

    def view(self, dtype: str) -> Tensor:
        self.dtype = dtype
        return self

    def __getitem__(self, rows: slice) -> Tensor:
        return self

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, int(self.device.partition(":")[2])

    def __dlpack__(self, **options: Any) -> Any:
        assert options["stream"] == -1, "a producer must not wait"
        code, bits = CODES[NAMES[self.dtype]]
        self._extents = (ctypes.c_int64 * len(self.shape))(*self.shape)
        self._managed = _dlpack._ManagedVersioned(major=1)
        where = (2, self.__dlpack_device__()[1])
        self._managed.tensor = _dlpack.DLTensor(
            self.address, *where, len(self.shape), code, bits, 1, self._extents, None, 0
        )
        return _dlpack._new(ctypes.addressof(self._managed), b"dltensor_versioned", None)


class TorchTensor(Tensor):
    """What the package takes for torch's: its class says so."""


TorchTensor.__module__ = "torch"


class Torch(types.ModuleType):
    """Memory and streams, counted."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.made: list[TorchTensor] = []
        self.handle = 0x51
        for name in NAMES:
            setattr(self, name, name)
        self.cuda = types.SimpleNamespace(
            current_stream=self.current_stream, stream=self.on_stream, ExternalStream=lambda handle, device: handle
        )

    def empty(self, shape: tuple[int, ...], *, dtype: str, device: str) -> TorchTensor:
        self.made.append(TorchTensor(shape, dtype, device))
        self.made[-1].made_on = self.handle
        return self.made[-1]

    @contextlib.contextmanager
    def on_stream(self, handle: int) -> Iterator[None]:
        before, self.handle = self.handle, handle
        yield
        self.handle = before

    zeros = empty

    def current_stream(self, ordinal: int) -> Any:
        assert ordinal == 1
        return types.SimpleNamespace(cuda_stream=self.handle)


class Library:
    """The calls it got, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def call(self, name: str, *args: Any) -> None:
        name = name.removeprefix("compactattn_")
        if name in ("context_create", "plan_create"):
            args[-1]._obj.value = 0x1000 + len(self.calls)
            self.calls.append((name, args[-2]._obj))
        elif name == "plan_sizes":
            for field, value in (("workspace_bytes", 1001), ("summary_slots_per_page", 1), ("list_rows", 8)):
                setattr(args[-1]._obj, field, value)
        else:
            self.calls.append((name, args))

    def last(self, name: str) -> Any:
        return next(args for called, args in reversed(self.calls) if called == name)

    def count(self, name: str) -> int:
        return sum(called == name for called, _ in self.calls)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    stand_in = Library()
    for module in (context, plan, stages):
        monkeypatch.setattr(module, "call", stand_in.call)
        monkeypatch.setattr(module, "load", lambda: pytest.fail("asked the real library"), raising=False)
    # Handles of a stand-in are nobody's to destroy.
    monkeypatch.setattr(context, "_destroy", lambda *_: None)
    monkeypatch.setattr(context, "_contexts", {})
    monkeypatch.setattr(api, "_plans", api._Plans())
    return stand_in


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Torch:
    module = Torch()
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)


def step(kind: type[Tensor] = TorchTensor, **other: Tensor) -> list[Tensor]:
    made = {name: kind(shape, "bfloat16" if len(shape) > 2 else "int32") for name, shape in SHAPES.items()}
    return list((made | other).values())


def given(library: Library) -> Any:
    return library.last("forward")[1]._obj


def test_torch_tensors_bring_device_stream_and_memory(library: Library, torch: Torch) -> None:
    tensors = step()
    out, lse = compactattn.forward(*tensors, settings=settings(), return_lse=True)
    desc = library.last("context_create")
    assert (desc.device_kind, desc.device_ordinal) == (2, 1)
    assert (out.shape, out.dtype, out.device) == ((40, 4, 64), "bfloat16", "cuda:1")
    assert (lse.shape, lse.dtype, lse.device) == ((4, 40), "float32", "cuda:1")
    args = given(library)
    batch = args.batch.contents
    seen = [getattr(batch, name) for name in ("q", "k", "v", "block_table", "seq_lens", "cu_seqlens_q")]
    assert [x.data for x in seen] == [x.address for x in tensors]
    assert {(x.device_kind, x.device_ordinal) for x in (*seen, args.out, args.lse)} == {(2, 1)}
    assert (args.out.data, args.lse.data, args.stream) == (out.address, lse.address, 0x51)
    scratch = torch.made[-1]
    assert (args.workspace, scratch.device) == (scratch.address, "cuda:1")
    # Whole words, and no fewer bytes than asked for.
    assert args.workspace_bytes == 4 * math.prod(scratch.shape) == 1004


def test_context_plan_and_workspace_are_made_once(library: Library, torch: Torch) -> None:
    out = TorchTensor(SHAPES["q"], "bfloat16")
    for _ in range(3):
        compactattn.forward(*step(), settings=settings(), out=out)
    assert (library.count("context_create"), library.count("plan_create"), library.count("forward")) == (1, 1, 3)
    assert len(torch.made) == 1
    # Work on another stream may overlap: it gets memory of its own.
    torch.handle = 0x52
    compactattn.forward(*step(), settings=settings(), out=out)
    assert len(torch.made) == 2 and given(library).workspace == torch.made[-1].address


def test_threads_on_one_stream_have_memory_of_their_own(library: Library, torch: Torch) -> None:
    out, addresses = TorchTensor(SHAPES["q"], "bfloat16"), []

    def forward() -> None:
        compactattn.forward(*step(), settings=settings(), out=out)
        addresses.append(given(library).workspace)

    other = threading.Thread(target=forward)
    for run in (forward, other.start, other.join, forward):
        run()
    assert library.count("plan_create") == 1
    assert addresses[0] == addresses[2] != addresses[1]


def test_a_given_stream_is_used_and_zero_is_the_default_stream(library: Library, torch: Torch) -> None:
    for stream, handle in ((0x99, 0x99), (0, None)):
        compactattn.forward(*step(), settings=settings(), stream=stream)
        # A NULL pointer reads as None.
        assert given(library).stream == handle
        # Results and workspace are that stream's: torch would hand them out again too early otherwise.
        assert [x.made_on for x in torch.made[-2:]] == [stream, stream] and torch.handle == 0x51


def test_limits_are_shapes_or_the_callers_word(library: Library, torch: Torch) -> None:
    compactattn.forward(*step(), settings=settings())
    desc = library.last("plan_create")
    assert (desc.max_num_reqs, desc.max_total_q, desc.max_kv_len) == (2, 64, 64)
    # A word for each step's length would be a plan, and a workspace, for each.
    for length in (17, 32, 25):
        compactattn.forward(*step(), settings=settings(), max_kv_len=length)
        assert library.last("plan_create").max_kv_len == 32
    assert (library.count("plan_create"), len(torch.made)) == (2, 4 + 2)
    for wrong in (0, -1, 1.5):
        with pytest.raises(compactattn.InvalidArgument, match="E_VALUE: max_kv_len"):
            compactattn.forward(*step(), settings=settings(), max_kv_len=wrong)


def test_without_torch_the_caller_names_stream_and_memory(library: Library, no_torch: None) -> None:
    tensors = step(Tensor)
    with pytest.raises(compactattn.InvalidArgument, match="E_NULL: out: wanted memory of cuda:1 from the caller"):
        compactattn.forward(*tensors, settings=settings())
    out = Tensor(SHAPES["q"], "bfloat16")
    with pytest.raises(compactattn.InvalidArgument, match="E_STREAM: stream: wanted a cudaStream_t"):
        compactattn.forward(*tensors, settings=settings(), out=out)
    with pytest.raises(compactattn.InvalidArgument, match="E_NULL: workspace: wanted memory of cuda:1"):
        compactattn.forward(*tensors, settings=settings(), out=out, stream=7)
    batch, words = compactattn.Batch.of(*tensors), Tensor((300,), "int32")
    made = compactattn.plan_for(batch, settings=settings())
    made.forward(batch, out, stream=7, scratch=compactattn.Borrowed(words))
    args = given(library)
    assert (args.workspace, args.workspace_bytes, args.stream) == (words.address, 1200, 7)


@pytest.mark.parametrize("place", [1, 3, 4, 5])
def test_one_tensor_elsewhere_is_refused_by_name(library: Library, torch: Torch, place: int) -> None:
    tensors = step()
    tensors[place].device = "cuda:0"
    name = ("q", "k", "v", "block_table", "seq_lens", "cu_seqlens_q")[place]
    with pytest.raises(compactattn.InvalidArgument, match=f"E_DEVICE: batch.{name}: .*cuda:1, as batch.q, got cuda:0"):
        compactattn.forward(*tensors, settings=settings())


def test_lengths_in_host_memory_are_refused(library: Library, torch: Torch) -> None:
    *tensors, _lens, cu = step()
    with pytest.raises(compactattn.InvalidArgument, match=r"E_DEVICE: batch.seq_lens: .* got cpu"):
        compactattn.forward(*tensors, [40, 50], cu, settings=settings())


def test_block_means_live_beside_the_pool_and_start_whole(library: Library, torch: Torch) -> None:
    batch = compactattn.Batch.of(*step())
    made = compactattn.plan_for(batch, settings=settings())
    means = compactattn.BlockMeans(made)
    summaries = means.update(batch)
    assert (summaries.k_mean.shape, summaries.k_mean.device) == ((9, 1, 2, 64), "cuda:1")
    assert summaries.v_mean is None and library.last("summaries_update")[3] == 1
    assert means.update(batch) is summaries and library.last("summaries_update")[3] == 0
    out = TorchTensor(SHAPES["q"], "bfloat16")
    made.forward(batch, out, summaries=summaries)
    assert given(library).summaries.contents.k_mean.data == summaries.k_mean.address


def test_stages_write_beside_the_batch(library: Library, torch: Torch) -> None:
    batch = compactattn.Batch.of(*step())
    made = compactattn.plan_for(batch, settings=settings())
    lists = compactattn.union(made, batch, compactattn.Selection(scores=TorchTensor((2, 4, 4), "float32")), out=Lists())
    rows = compactattn.table(made, batch, lists)
    assert {x.device for x in (rows.counts, rows.stream_lens, rows.boxes)} == {"cuda:1"}
    compactattn.attend(made, batch, rows, TorchTensor(SHAPES["q"], "bfloat16"))
    args = library.last("attend")[1]._obj
    assert args.stream == 0x51 and args.workspace in {made.address for made in torch.made}


def test_what_stages_make_for_a_given_stream_is_made_on_it(
    library: Library, torch: Torch, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = compactattn.Batch.of(*step())
    made, lists = compactattn.plan_for(batch, settings=settings()), compactattn.Lists(Lists(), 8)
    compactattn.BlockMeans(made, values=True).update(batch, stream=0x99)
    assert library.last("summaries_update")[2]._obj.stream == 0x99
    # Block means of one call alone are made for it too.
    monkeypatch.setattr(stages, "READS_MEANS", {"dense"})
    selection = compactattn.select(made, batch, stream=0x99)
    compactattn.union(made, batch, selection, stream=0x99)
    for stage in (compactattn.table, compactattn.export_padded, compactattn.export_csr):
        stage(made, batch, lists, stream=0x99)
    assert len(torch.made) >= 3 + 3 + 1 + 3 * 3
    assert {tensor.made_on for tensor in torch.made} == {0x99}
    assert torch.handle == 0x51


def Lists() -> TorchTensor:  # noqa: N802
    return TorchTensor((8, 1), "uint32")


def settings() -> compactattn.Settings:
    # From the real library before the stand-in took its place: presets are kept.
    return DENSE


DENSE = None


@pytest.fixture(autouse=True, scope="module")
def _presets() -> None:
    global DENSE
    DENSE = compactattn.Settings.mode("dense")
