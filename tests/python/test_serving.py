"""What engines' adapters share: an operator's options are checked at start, a repeated call keeps its memory."""

from __future__ import annotations

import gc
import json
import sys
import threading
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cases import Case
from compactattn import Settings, context, workspace
from compactattn.serving import service
from compactattn.serving.policy import Policy
from compactattn.serving.report import REPORT
from compactattn.serving.service import Service, Shape, refusal, reserve, seen
from compactattn.serving.settings import Options


def read(asked: dict[str, Any], file: dict[str, Any] | None = None, folder: Path | None = None) -> Options:
    env = {}
    if file is not None and folder is not None:
        path = folder / "c.json"
        path.write_text(json.dumps(file))
        env = {"COMPACTATTN_CONFIG": str(path)}
    return Options.read({"compactattn": asked}, env)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"keep_mass": 1.7}, "keep mass"),
        ({"block_size": 48}, "block_size"),
        ({"query_span": 100}, "query_span"),
        ({"selector": "attn_gate"}, "gate"),
        ({"layers": {"5": {"max_density": 3}}}, r"layers\.5: .*max_density"),
        ({"layers": {"-1": {}}}, "layer numbers"),
        ({"layers": {"1.5": {}}}, "layer numbers"),
        ({"strict": "false"}, "strict"),
        ({"strict": 1}, "strict"),
        ({"dense_layers": 3}, "dense_layers"),
        ({"dense_layers": "12"}, "dense_layers"),
        ({"dense_layers": [1.5]}, "dense_layers"),
        ({"dense_layers": [True]}, "dense_layers"),
        ({"counters_file": ""}, "counters_file"),
        ({"counters_file": 7}, "counters_file"),
        ({"config": 7}, "config"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_it(asked: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"compactattn: .*{named}"):
        read(asked)


def test_the_settings_of_every_selector_are_right() -> None:
    for selector in ("dense", "sampled_exact", "flashprefill", "pooled_mass", "two_level", "quoka", "xattention"):
        assert read({"selector": selector}).settings == Settings.of(selector)


def test_fields_for_all_reach_layers_that_the_file_names(tmp_path: Path) -> None:
    file = {"layers": {"3": {"keep_mass": 0.5, "block_size": 64}}}
    found = read({"keep_mass": 0.9}, file, tmp_path)
    assert (found.layers[3].keep_value, found.layers[3].block_size) == (0.9, 64)
    # A selector brings its own constants here as elsewhere.
    assert read({"selector": "xattention"}, file, tmp_path).layers[3] == Settings.of("xattention")


def test_a_layer_of_the_engines_config_starts_from_the_files(tmp_path: Path) -> None:
    file = {"block_size": 128, "layers": {"3": {"keep_mass": 0.5, "block_size": 64}}}
    found = read({"layers": {"3": {"max_density": 0.2}, "4": {"max_density": 0.1}}}, file, tmp_path)
    third, fourth = found.layers[3], found.layers[4]
    assert (third.max_density, third.keep_value, third.block_size) == (0.2, 0.5, 64)
    assert (fourth.max_density, fourth.block_size) == (0.1, 128)


def test_what_is_ours_by_its_length_is_not_dense_by_the_librarys_rule() -> None:
    layers = {"1": {"selector": "xattention"}, "2": {"dense_below_kv_len": 9000}}
    found = read({"min_kv_tokens": 1000, "layers": layers})
    assert found.policy.min_kv_tokens == 1000
    rules = [found.of_layer(layer).dense_below_kv_len for layer in (0, 1, 2)]
    # Layer 2 was told otherwise.
    assert rules == [1000, 1000, 9000]
    assert read({"min_kv_tokens": 20_000}).settings.dense_below_kv_len == 8192


def test_the_line_at_start_says_what_is_chosen_and_for_how_many_layers_it_is_not() -> None:
    words = read({"min_kv_tokens": 1000, "keep_mass": 0.9}).words(Policy(512, 1000))
    assert words == "chunks of >= 512 tokens over >= 1000 KV tokens by sampled_exact, keep mass 0.9"
    assert "(1 layers by settings of their own)" in read({"layers": {"0": {"block_size": 64}}}).words(Policy(1, 1))


def test_layers_that_the_model_has_not_are_told() -> None:
    found = read({"dense_layers": [0, -4, -5], "layers": {"3": {}, "4": {}}})
    assert found.unknown_layers(4) == "options name layers [-5, 4]; the model has 4"
    assert found.unknown_layers(5) is None


class Rows(np.ndarray):  # type: ignore[type-arg]
    """NumPy's memory by torch's names."""

    def data_ptr(self) -> int:
        return self.ctypes.data

    def stride(self) -> tuple[int, ...]:
        return self.strides


@dataclass
class Step:
    """A step of one request, and what the library is given for it."""

    case: Case
    out: Any

    @classmethod
    def of(cls, q_len: int, kv_len: int) -> Step:
        case = Case([(q_len, kv_len)])
        return cls(case, np.zeros(case.q.shape, np.float32).view(Rows))

    def call(self, by: Service) -> Any:
        q, k, v, block_table, seq_lens, cu_seqlens_q = self.case.inputs()
        self.q, self.kv = q.view(Rows), (k, v)
        rows = SimpleNamespace(block_table=block_table, seq_lens=seq_lens, query_start_loc=cu_seqlens_q)
        return by.call(self.q, self.kv, rows, self.out)

    def run(self, call: Any, own: Any = None) -> None:
        call.run(self.q, seen(self.kv), self.out, own)
        np.testing.assert_allclose(self.out, self.case.reference()[0], rtol=0, atol=1e-4)


KEEP_ALL = {"keep_density": 1.0, "min_density": 1.0, "max_density": 1.0, "dense_below_kv_len": 0}


@pytest.fixture
def thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that has no workspace yet."""
    monkeypatch.setattr(workspace, "_local", threading.local())


def shape(**changes: Any) -> Shape:
    given: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "sm_scale": 0.125, "dtype": "f32"}
    given |= {"device": "cpu", "max_num_reqs": 1, "max_total_q": 64, "max_kv_len": 512}
    return Shape(**given | changes)


@pytest.mark.usefixtures("thread")
def test_a_call_keeps_its_memory_whoever_needs_more_meanwhile() -> None:
    small, large = (Service(shape(max_kv_len=kv), 16, read(KEEP_ALL)) for kv in (512, 1 << 20))
    step, other = Step.of(40, 300), Step.of(40, 200)
    call = step.call(small)
    memory = weakref.ref(workspace._local.workspace)
    other.run(other.call(large))
    gc.collect()
    assert memory() is not None
    step.run(call)
    del call
    assert memory() is None


@pytest.mark.usefixtures("thread")
def test_a_call_has_room_for_every_layers_settings() -> None:
    options = read(KEEP_ALL | {"block_size": 256, "query_span": 0, "layers": {"1": {"block_size": 16}}})
    service, step = Service(shape(max_kv_len=1 << 16), 16, options), Step.of(40, 300)
    call = step.call(service)
    for layer in (0, 1):
        step.run(call, service.own(layer))


@pytest.mark.parametrize("status", ["E_UNSUPPORTED", "E_NOT_BUILT", "E_ARCH"])
def test_what_is_not_offered_of_one_layer_is_not_said_of_all(monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    options = read({"layers": {"5": {"block_size": 64}}})

    def supports(desc: Any, on: Any) -> str | None:
        return f"{status}: not here" if desc.settings.block_size == 64 else None

    monkeypatch.setattr(service.Plan, "supports", staticmethod(supports))
    service._refused.cache_clear()
    given = shape()
    assert refusal(given, 16, options) is refusal(given, 16, options, 4) is None
    assert refusal(given, 16, options, 5) == f"{status}: not here"
    assert refusal(given, 24, options, 4).startswith("page size 24")
    # The workspace is for those that are served.
    assert service._workspace_bytes(given, 16, options) == service._sizes(given, 16, options.settings)
    service._refused.cache_clear()


def test_what_no_library_could_serve_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"compactattn: E_SHAPE: .*num_q_heads"):
        refusal(shape(num_q_heads=5), 16, read({}))


class Torch:
    """Device memory that does not exist."""

    int32 = "int32"

    def __init__(self) -> None:
        self.made: list[int] = []

    def empty(self, words: int, **where: Any) -> int:
        self.made.append(4 * words)
        return 4 * words


def test_the_workspace_is_made_once_and_late_only_with_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch = Torch()
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(service, "_workspaces", {})
    monkeypatch.setattr(service, "Borrowed", lambda num_bytes: SimpleNamespace(num_bytes=num_bytes))
    # A GPU's plans are made on the CPU, where there is none.
    cpu = context.default()
    monkeypatch.setattr(service.context, "of", lambda device: cpu)
    monkeypatch.setattr(REPORT, "_said", set())
    monkeypatch.setattr(REPORT, "strict", True)
    before = dict(REPORT.fallbacks)
    given, options = shape(device="cuda:0"), read({})
    assert reserve(given, options, 16)
    Service(given, 16, options)
    assert (len(torch.made), caplog.records) == (1, [])
    # Larger than what was known at start: served all the same.
    Service(replace(given, max_kv_len=1 << 20), 16, options)
    assert len(torch.made) == 2
    (record,) = caplog.records
    assert "workspace" in record.message
    assert dict(REPORT.fallbacks) == before
