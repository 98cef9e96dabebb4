"""Against the SGLang that is installed: entry point, argument, factory and its refusals. No GPU, no engine."""

from __future__ import annotations

import argparse
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compactattn.serving.hooks import HookError
from compactattn.sglang import facts, plugin
from sglang.srt.layers.attention import attention_registry
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options unread; a GPU that is served, and a library that serves it."""
    for name in ("COMPACTATTN_MODE", "COMPACTATTN_CONFIG", facts.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(facts, "_options", None)
    monkeypatch.setattr(facts, "capability", lambda: (9, 0))
    monkeypatch.setattr(facts, "build_info", lambda: "GPU kernels: 50 kernels for sm_80 sm_90a sm_100a sm_120a")
    monkeypatch.setattr(facts, "server_args", lambda: ARGS)


ARGS = SimpleNamespace(chunked_prefill_size=8192, kv_cache_dtype="auto", disaggregation_mode="null")


def runner(**changes: Any) -> Any:
    model = {"head_dim": 128, "context_len": 40_000, "is_encoder_decoder": False, "num_hidden_layers": 2}
    given: dict[str, Any] = {"page_size": 64, "dtype": torch.bfloat16, "device": "cuda", "gpu_id": 0}
    given |= {"model_config": SimpleNamespace(**model), "token_to_kv_pool": object(), "use_mla_backend": False}
    return SimpleNamespace(**given | changes)


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser.parse_args(["--model-path", "none", *arguments])


def test_the_entry_point_is_found_and_runs_twice() -> None:
    (found,) = entry_points(group="sglang.srt.plugins", name="compactattn")
    register = found.load()
    register()
    register()
    assert attention_registry.ATTENTION_BACKENDS["compactattn"] is plugin.create


def test_the_engine_loads_the_plugin_and_takes_the_argument() -> None:
    load_plugins()
    parsed = parse("--prefill-attention-backend", "compactattn", "--decode-attention-backend", "fa3")
    assert (parsed.prefill_attention_backend, parsed.decode_attention_backend) == ("compactattn", "fa3")
    assert parse("--attention-backend", "compactattn", "--page-size", "64").attention_backend == "compactattn"


def test_a_name_that_is_held_stays_its_holders(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(given: Any) -> None: ...

    monkeypatch.setitem(attention_registry.ATTENTION_BACKENDS, "compactattn", other)
    monkeypatch.setenv("COMPACTATTN_MODE", "compactattn")
    with pytest.raises(HookError, match=r"\[compactattn\] is taken by .*other"):
        plugin.register()
    assert attention_registry.ATTENTION_BACKENDS["compactattn"] is other


def test_the_gpu_is_asked_by_torchs_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert facts.capability() == (9, 0)


def test_a_name_nobody_registered_is_no_argument() -> None:
    with pytest.raises(SystemExit):
        parse("--prefill-attention-backend", "compactattm")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"page_size": 1}, "--page-size 64"),
        ({"page_size": 24}, "page size 24"),
        ({"dtype": torch.float32}, "dtype float32"),
        ({"use_mla_backend": True}, "MLA"),
    ],
)
def test_what_is_not_served_stops_the_engine_with_a_reason(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^compactattn: .*{named}"):
        plugin.create(runner(**change))


def test_no_gpu_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "capability", lambda: None)
    with pytest.raises(ValueError, match="no CUDA device"):
        plugin.create(runner())


def test_every_reason_is_said_at_once() -> None:
    with pytest.raises(ValueError, match=r"page size 1.*; .*MLA|MLA.*; .*page size 1"):
        plugin.create(runner(page_size=1, use_mla_backend=True))


@pytest.mark.parametrize("draft", [False, True])
def test_in_mode_dense_and_for_drafts_the_backend_is_the_engines(monkeypatch: pytest.MonkeyPatch, draft: bool) -> None:
    monkeypatch.setitem(attention_registry.ATTENTION_BACKENDS, "fa3", lambda given: ("fa3", given))
    if not draft:
        monkeypatch.setenv("COMPACTATTN_MODE", "dense")
    given = runner(page_size=1, is_draft_worker=draft)
    assert plugin.create(given) == ("fa3", given)


def test_a_wrong_setting_stops_the_engine_and_names_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(facts.VARIABLE, '{"keep_mas": 0.9}')
    with pytest.raises(ValueError, match=r"COMPACTATTN_SGLANG: unknown setting keep_mas"):
        plugin.create(runner())
