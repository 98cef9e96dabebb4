"""The vLLM backend where no vLLM is: who owns which request, what is refused, what was asked for, what is said."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from enum import Enum
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from compactattn import Settings
from compactattn.serving import policy
from compactattn.serving.policy import DECODE, SHORT_CHUNK, SHORT_CONTEXT, Part, Policy, Step
from compactattn.serving.report import Report
from compactattn.serving.service import kv_axis_of, layer_number
from compactattn.serving.settings import Options

LONG = Policy(min_chunk_tokens=256, min_kv_tokens=8192)


class Common:
    """The engine's metadata of a step; what would copy from a device raises."""

    def __init__(self, requests: list[tuple[int, int, bool]], **changes: Any) -> None:
        q_lens, kv_lens, prefilling = zip(*requests, strict=True)
        self.num_reqs = len(requests)
        self.query_start_loc_cpu = np.cumsum([0, *q_lens], dtype=np.int32)
        self.seq_lens_cpu_upper_bound: Any = np.array(kv_lens, np.int32)
        self.is_prefilling: Any = np.array(prefilling)
        self.causal: Any = True
        self.__dict__.update(changes)

    @property
    def seq_lens_cpu(self) -> Any:
        raise AssertionError("a copy from the device")

    query_start_loc = seq_lens = block_table_tensor = num_computed_tokens_cpu = seq_lens_cpu


def split(*requests: tuple[int, int, bool], by: Policy = LONG) -> list[Part]:
    step = Step.of(Common(list(requests)))
    return policy.parts(step, policy.reasons(by, step))


def test_decodes_go_to_the_engine_and_the_long_chunk_is_ours() -> None:
    assert split((1, 9000, False), (1, 50, False), (2048, 40_000, True)) == [
        Part(False, slice(0, 2), slice(0, 2), 1, 9000),
        Part(True, slice(2, 3), slice(2, 2050), 2048, 40_000),
    ]


def test_a_first_chunk_between_long_ones_stays_the_engines() -> None:
    found = split((300, 20_000, True), (310, 310, True), (400, 20_000, True))
    assert [(part.ours, part.tokens) for part in found] == [
        (True, slice(0, 300)),
        (False, slice(300, 610)),
        (True, slice(610, 1010)),
    ]


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ((256, 8192, True), None),
        ((255, 8192, True), SHORT_CHUNK),
        ((256, 8191, True), SHORT_CONTEXT),
        ((1, 90_000, True), DECODE),
        # Draft tokens under verification, however many.
        ((300, 90_000, False), DECODE),
        # A padded row of a captured batch.
        ((0, 0, False), DECODE),
    ],
)
def test_a_request_is_ours_from_both_thresholds_on(request_: tuple[int, int, bool], why: str | None) -> None:
    assert LONG.left_out(*request_) == why


def test_parts_cover_every_request_and_token_once_and_alternate() -> None:
    rng = random.Random(5)
    for _ in range(300):
        requests = [
            (rng.choice([0, 1, 4, 255, 256, 2048]), rng.randint(2048, 20_000), rng.random() < 0.7)
            for _ in range(rng.randint(1, 12))
        ]
        found = split(*requests)
        for first, second in pairwise(found):
            assert first.ours != second.ours
            assert (first.reqs.stop, first.tokens.stop) == (second.reqs.start, second.tokens.start)
        assert (found[0].reqs.start, found[-1].reqs.stop) == (0, len(requests))
        assert (found[0].tokens.start, found[-1].tokens.stop) == (0, sum(q for q, _, _ in requests))
        for part in found:
            own = requests[part.reqs]
            assert part.max_q_len == max(q for q, _, _ in own)
            assert part.max_kv_len == max(kv for _, kv, _ in own)
            assert all((LONG.left_out(*one) is None) == part.ours for one in own)


def test_padded_host_arrays_are_cut_to_the_requests() -> None:
    common = Common([(300, 9000, True)])
    common.query_start_loc_cpu = np.array([0, 300, 300, 300], np.int32)
    common.seq_lens_cpu_upper_bound = np.array([9000, 77, 77], np.int32)
    common.is_prefilling = np.array([True, True, True])
    assert Step.of(common) == Step([0, 300], [9000], [True])


def test_an_engine_that_does_not_say_who_prefills_is_judged_by_lengths() -> None:
    step = Step.of(Common([(1, 9000, False), (300, 9000, False)], is_prefilling=None))
    assert policy.reasons(LONG, step) == [DECODE, None]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"causal": False}, "not causal"),
        ({"causal": np.array([True])}, "not causal"),
        ({"encoder_seq_lens": np.ones(1)}, "encoder"),
        ({"mm_req_doc_ranges": {0: [(1, 2)]}}, "multimodal prefix"),
        ({"rswa_prefix_lens": np.ones(1)}, "reference sliding window"),
        ({"dcp_local_seq_lens": np.ones(1)}, "context parallel"),
        ({"seq_lens_cpu_upper_bound": None}, "no lengths on the host"),
        ({"seq_lens_cpu_upper_bound": None, "_seq_lens_cpu": np.ones(1)}, None),
    ],
)
def test_steps_that_are_not_plain_causal_prefill_stay_the_engines(changes: dict[str, Any], why: str | None) -> None:
    common = Common([(300, 9000, True)], **changes)
    assert policy.step_refusal(common, cascade=False) == why


def test_cascade_stays_the_engines() -> None:
    assert policy.step_refusal(Common([(300, 9000, True)]), cascade=True) == "cascade"


SERVED = {"head_size": 128, "dtype": "torch.bfloat16", "block_size": None, "device_capability": (9, 0)}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({}, []),
        ({"block_size": 48, "device_capability": (8, 9), "attn_type": "decoder"}, []),
        ({"use_mla": True}, ["MLA"]),
        ({"has_sliding_window": True}, ["backend_per_kind"]),
        ({"softcap": True, "alibi": True}, ["softcap", "ALiBi"]),
        ({"attn_type": "encoder_only"}, ["encoder_only: decoder only"]),
        ({"dtype": "torch.float32"}, ["dtype float32"]),
        ({"head_size": 80}, ["head size 80"]),
        ({"block_size": 24}, ["block size 24"]),
        ({"device_capability": (7, 5)}, ["capability 7.5"]),
        ({"device_capability": (10, 3)}, ["capability 10.3"]),
        ({"build": "GPU kernels: 50 kernels for sm_80 sm_90a"}, []),
        ({"build": "GPU kernels: 50 kernels for sm_80"}, ["no kernels for sm_90a"]),
        ({"build": "compactattn 0.1.0; GPU kernels: none"}, ["no GPU kernels"]),
        ({"has_sink": True}, ["sinks"]),
        ({"use_kv_connector": True}, ["KV connector"]),
        ({"two_batch": True, "context_parallel": True}, ["context parallelism", "two-batch"]),
        ({"needs_means": True}, ["block means"]),
    ],
)
def test_what_is_not_served_has_its_reason(change: dict[str, Any], named: list[str]) -> None:
    found = policy.config_refusals(policy.plain(SERVED | change))
    assert len(found) == len(named)
    for text, name in zip(found, named, strict=True):
        assert name in text


def test_the_environment_beats_the_engines_config_and_choosing_the_backend_is_the_opt_in() -> None:
    assert Options.read({}, {}).mode == "compactattn"
    dense = {"compactattn": {"mode": "dense", "keep_mass": 0.5}}
    assert Options.read(dense, {}).is_dense
    assert Options.read(dense, {}).settings == Settings.mode("dense")
    assert Options.read(dense, {"COMPACTATTN_MODE": " Block_Sparse "}).mode == "block_sparse"


def test_fields_come_from_preset_file_and_config_in_that_order(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"keep_density": 0.2, "block_size": 64, "layers": {"3": {"max_density": 0.5}}}')
    found = Options.read(
        {"compactattn": {"block_size": 32, "min_kv_tokens": 100, "dense_layers": [0, -1]}},
        {"COMPACTATTN_CONFIG": str(path)},
    )
    assert (found.settings.keep, found.settings.keep_value, found.settings.block_size) == ("density", 0.2, 32)
    assert (found.layers[3].max_density, found.layers[3].block_size) == (0.5, 32)
    assert found.policy == Policy(min_chunk_tokens=256, min_kv_tokens=100)
    assert [found.keeps_dense(layer, 4) for layer in range(4)] == [True, False, False, True]
    by_key = Options.read({"compactattn": {"config": str(path)}}, {})
    assert by_key.settings.keep_value == 0.2


def test_the_engines_threshold_is_the_settings_own() -> None:
    found = Options.read({"compactattn": {"dense_below_kv_len": 5000}}, {})
    assert found.policy.min_kv_tokens == 5000


@pytest.mark.parametrize(
    "asked",
    [
        {"selecter": "oracle"},
        {"selector": "no such"},
        {"keep_mass": 0.9, "keep_density": 0.2},
        {"block_size": "big"},
        {"min_chunk_tokens": -1},
        {"layers": {"x": {}}},
        {"dense_layers": ["y"]},
        {"config": "/no/such/file.json"},
        {"mode": "fast"},
        "sparse",
    ],
)
def test_what_is_not_known_is_an_error(asked: Any) -> None:
    with pytest.raises(ValueError, match=r"compactattn|E_VALUE"):
        Options.read({"compactattn": asked}, {})


FILES = [
    '{"keep_mass": 0.9}',
    '{"selector": "xattention", "keep_threshold": 0.25, "xattention_stride": 8}',
    '{"block_size": 64, "layers": {"1": {"selector": "streaming"}}}',
]


@pytest.mark.parametrize("text", FILES)
def test_a_file_means_here_what_it_means_to_the_library(text: str, tmp_path: Path, library: str | None) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    env = {"COMPACTATTN_MODE": "compactattn", "COMPACTATTN_CONFIG": str(path)}
    found = Options.read({}, env)
    code = f"""
import compactattn
if {library!r}: compactattn.load_library({library!r})
print([compactattn.Settings.from_env(layer) for layer in (0, 1)])
"""
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == repr([found.layers.get(layer, found.settings) for layer in (0, 1)])


def test_selectors_that_read_block_means_are_found_in_any_layer() -> None:
    def needs(asked: dict[str, Any]) -> bool:
        return Options.read({"compactattn": asked}, {}).needs_means

    assert not needs({})
    assert needs({"selector": "two_level"})
    assert needs({"layers": {"2": {"mean_correction": True}}})


def test_a_fallback_is_warned_of_once_and_counted_always(caplog: pytest.LogCaptureFixture) -> None:
    report = Report()
    with caplog.at_level(logging.INFO, "vllm.compactattn"):
        for reason in ("cascade", "cascade", "not causal"):
            report.fallback(reason)
        report.start("a line")
        report.start("a line")
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO"]
    assert report.as_dict()["fallbacks"] == {"cascade": 2, "not causal": 1}
    report.strict = True
    with pytest.raises(RuntimeError, match="cascade"):
        report.fallback("cascade")


def test_counters_reach_their_file(tmp_path: Path) -> None:
    report = Report()
    report.file = str(tmp_path / "c-{pid}.json")
    step = Step.of(Common([(1, 10, False), (300, 9000, True)]))
    left_out = policy.reasons(LONG, step)
    report.write()
    assert not list(tmp_path.iterdir())
    report.step(left_out, policy.parts(step, left_out))
    report.write()
    (path,) = tmp_path.iterdir()
    assert str(os.getpid()) in path.name
    read = json.loads(path.read_text())
    assert read == report.as_dict()
    assert (read["our_requests"], read["our_tokens"], read["left_to_engine"]) == (1, 300, {DECODE: 1})
    # Numbers that changed too soon for the step that changed them wait for the next one, of any kind.
    report.step(left_out, policy.parts(step, left_out))
    report.write()
    assert json.loads(path.read_text())["our_requests"] == 1
    report._written = 0.0
    report.write()
    assert json.loads(path.read_text())["our_requests"] == 2


def test_a_counters_file_that_cannot_be_written_is_said_and_dropped(caplog: pytest.LogCaptureFixture) -> None:
    report = Report()
    report.file = "/no/such/folder/c.json"
    for _ in range(2):
        report.step([DECODE], [])
        report._written = 0.0
        report.write()
    assert len(caplog.records) == 1


def test_the_layers_number_is_read_from_its_name() -> None:
    assert layer_number("model.layers.13.self_attn.attn") == 13
    assert layer_number("attn") == -1


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        (lambda n, b, h, d: (2, n, b, h, d), 0),
        (lambda n, b, h, d: (n, 2, b, h, d), 1),
        (lambda n, b, h, d: (n, h, b, 2 * d), None),
    ],
)
def test_the_engines_version_says_where_keys_and_values_part(shape: Any, axis: int | None) -> None:
    assert kv_axis_of(SimpleNamespace(get_kv_cache_shape=shape), 128) == axis
    assert kv_axis_of(SimpleNamespace(), 128) is None


class Engine:
    """The engine's registry, as far as the plugin sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, on_cpu: bool = False) -> None:
        self.taken: dict[Any, str] = {}
        taken = self.taken

        class Slots(Enum):
            FLASH_ATTN = "engine.FlashAttention"
            CPU_ATTN = "engine.Cpu"
            CUSTOM = None

            def get_path(self) -> str:
                return taken.get(self, self.value)

            def is_overridden(self) -> bool:
                return self in taken

        self.slots = Slots
        registry = SimpleNamespace(AttentionBackendEnum=Slots, register_backend=taken.__setitem__)
        platforms = SimpleNamespace(current_platform=SimpleNamespace(is_cpu=lambda: on_cpu))
        for name in ("vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backends"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
        monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.registry", registry)
        monkeypatch.delenv("COMPACTATTN_MODE", raising=False)


def test_the_plugin_takes_the_custom_slot_however_often_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from compactattn.vllm import plugin

    engine = Engine(monkeypatch)
    plugin.register()
    plugin.register()
    assert engine.taken == {engine.slots.CUSTOM: plugin.GPU_CLASS}


def test_in_mode_dense_the_slot_is_the_engines_own_class(monkeypatch: pytest.MonkeyPatch) -> None:
    from compactattn.vllm import plugin

    engine = Engine(monkeypatch)
    monkeypatch.setenv("COMPACTATTN_MODE", "dense")
    plugin.register()
    assert engine.taken == {engine.slots.CUSTOM: "engine.FlashAttention"}


def test_another_plugins_slot_stays_its_own_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from compactattn.vllm import plugin

    engine = Engine(monkeypatch)
    engine.taken[engine.slots.CUSTOM] = "other.Backend"
    plugin.register()
    assert engine.taken == {engine.slots.CUSTOM: "other.Backend"}
    assert "other.Backend" in caplog.text


@pytest.mark.parametrize(("mode", "takes"), [(None, False), ("dense", False), ("compactattn", True)])
def test_on_a_cpu_the_mode_is_the_opt_in(monkeypatch: pytest.MonkeyPatch, mode: str | None, takes: bool) -> None:
    from compactattn.vllm import plugin

    engine = Engine(monkeypatch, on_cpu=True)
    if mode:
        monkeypatch.setenv("COMPACTATTN_MODE", mode)
    plugin.register()
    assert engine.taken == ({engine.slots.CPU_ATTN: plugin.CPU_CLASS} if takes else {})


def test_the_tool_reads_what_an_engine_wrote(tmp_path: Path, library: str | None) -> None:
    if library is not None:
        pytest.skip("a source tree has no installed tool")
    report = Report()
    report.file = str(tmp_path / "counters.json")
    report.steps, report._changed = 3, True
    report.left_to_engine[DECODE] = 2
    report.write()
    ran = subprocess.run(
        [sys.executable, "-m", "compactattn", "stats", "--prometheus", report.file],
        capture_output=True,
        text=True,
        check=False,
    )
    assert f'compactattn_steps_total{{pid="{os.getpid()}"}} 3' in ran.stdout, ran.stderr
    assert f'compactattn_left_to_engine_total{{pid="{os.getpid()}",reason="decode"}} 2' in ran.stdout
    # Every number of the file is a metric.
    for key in report.as_dict().keys() - {"pid", "plans"}:
        assert f"compactattn_{key.removeprefix('our_')}_total" in ran.stdout, key
