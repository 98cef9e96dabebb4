"""Against the vLLM that is installed: entry point, slot, validation hook, cache layouts. No GPU, no engine."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from compactattn.serving.hooks import HookError
from compactattn.serving.service import kv_axis_of, kv_views
from compactattn.vllm import current, plugin
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import AttentionSelectorConfig


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class that the engine finds in the slot, its options unread."""
    monkeypatch.delenv("COMPACTATTN_MODE", raising=False)
    monkeypatch.setattr(current, "_latest", None)
    # What is installed here is for the CPU.
    monkeypatch.setattr(current, "build", lambda: "GPU kernels: 50 kernels in 29 units for sm_80 sm_90a sm_100a")
    register_backend(AttentionBackendEnum.CUSTOM, plugin.GPU_CLASS)
    return AttentionBackendEnum.CUSTOM.get_class()


def asked(**changes: Any) -> dict[str, Any]:
    """What the engine gives its hook, in this version."""
    given = {"head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": None} | changes
    capability = given.pop("device_capability", DeviceCapability(9, 0))
    return {"device_capability": capability, **AttentionSelectorConfig(**given)._asdict()}


def test_the_entry_point_is_found_and_runs_twice() -> None:
    (found,) = entry_points(group="vllm.general_plugins", name="compactattn")
    register = found.load()
    register()
    register()


def test_a_slot_that_is_held_stops_the_engine_that_asks_for_us(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import plugins
    from vllm.platforms import current_platform

    slot = AttentionBackendEnum.CPU_ATTN if current_platform.is_cpu() else AttentionBackendEnum.CUSTOM
    monkeypatch.setenv("COMPACTATTN_MODE", "compactattn")
    monkeypatch.setattr(plugins, "plugins_loaded", False)
    register_backend(slot, "other.Backend")
    try:
        with pytest.raises(HookError, match=rf"{slot.name} is taken by other\.Backend"):
            plugins.load_general_plugins()
        assert slot.get_path() == "other.Backend"
    finally:
        slot.clear_override()


def test_the_engine_looks_the_backend_up_by_its_own_name(backend: Any) -> None:
    assert AttentionBackendEnum[backend.get_name()] is AttentionBackendEnum.CUSTOM
    assert not backend.is_mla()
    assert not backend.is_sparse()
    assert not backend.forward_includes_kv_cache_update


def test_the_readmes_command_is_one_that_the_engine_and_we_understand() -> None:
    from compactattn.serving.settings import Options
    from vllm.entrypoints.openai.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^COMPACTATTN_MODE=compactattn vllm serve .*$", readme, re.M)
    setting, _, _, model, *flags = shlex.split(line)
    given = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", model, *flags])
    assert AttentionBackendEnum[given.attention_backend] is AttentionBackendEnum.CUSTOM
    options = Options.read(given.additional_config["compactattn"], dict([setting.split("=")]))
    assert (options.settings.keep, options.settings.keep_value) == ("mass", 0.95)


def test_what_is_served_has_no_reason_against_it(backend: Any) -> None:
    assert backend.validate_configuration(**asked()) == []
    assert backend.validate_configuration(**asked(dtype=torch.float16, head_size=64, block_size=64)) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_mla": True}, "MLA"),
        ({"has_sliding_window": True}, "sliding window"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "encoder"),
        ({"dtype": torch.float32}, "dtype"),
        ({"head_size": 80}, "head size 80"),
        ({"block_size": 24}, "block size 24"),
        ({"device_capability": DeviceCapability(10, 3)}, "capability 10.3"),
        ({"use_kv_connector": True}, "KV connector"),
    ],
)
def test_what_is_not_served_gets_a_reason_of_ours(backend: Any, change: dict[str, Any], named: str) -> None:
    own = [text for text in backend.validate_configuration(**asked(**change)) if text.startswith("compactattn: ")]
    assert len(own) == 1
    assert named in own[0]


def test_a_library_for_the_cpu_alone_is_a_reason(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(current, "build", lambda: "compactattn 0.1.0; GPU kernels: none")
    (reason,) = backend.validate_configuration(**asked())
    assert "COMPACTATTN_CUDA=require" in reason


def test_a_wrong_setting_is_a_reason_and_not_a_crash(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPACTATTN_MODE", "fast")
    (reason,) = backend.validate_configuration(**asked())
    assert "fast" in reason


def test_in_mode_dense_the_engines_reasons_are_all(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPACTATTN_MODE", "dense")
    assert backend.validate_configuration(**asked(has_sliding_window=True, head_size=80)) == []
    assert backend.get_supported_kernel_block_sizes() != [16, 32, 64, 128, 256]


def test_graphs_hold_uniform_decode_at_most(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = backend.get_builder_cls()
    for own in type(builder._cudagraph_support):
        monkeypatch.setattr(builder, "_cudagraph_support", own)
        assert builder.get_cudagraph_support(None, None).value == min(own.value, 2)


PAGES, PAGE, HEADS, DIM = 3, 16, 2, 64


def caches() -> dict[str, tuple[torch.Tensor, int | None]]:
    """One numbering of the cache in the layouts of all versions; every element's value is its logical place."""
    joined = torch.arange(PAGES * PAGE * HEADS * 2 * DIM, dtype=torch.int32).view(PAGES, PAGE, HEADS, 2 * DIM)
    apart = joined.view(PAGES, PAGE, HEADS, 2, DIM)
    return {
        "joined, tokens first": (joined.transpose(1, 2), None),
        "joined, heads first": (joined.transpose(1, 2).contiguous(), None),
        "pages first": (apart.permute(0, 3, 1, 2, 4).contiguous(), 1),
        "pages first, heads first": (apart.permute(0, 3, 2, 1, 4).contiguous().transpose(2, 3), 1),
        "keys first": (apart.permute(3, 0, 1, 2, 4).contiguous(), 0),
    }


@pytest.mark.parametrize("name", caches())
def test_keys_and_values_are_found_in_every_layout(name: str) -> None:
    wanted, (cache, axis) = caches()["pages first"][0], caches()[name]
    keys, values = kv_views(cache, DIM, axis)
    assert torch.equal(keys, wanted[:, 0])
    assert torch.equal(values, wanted[:, 1])
    base = cache.untyped_storage().data_ptr()
    assert keys.untyped_storage().data_ptr() == values.untyped_storage().data_ptr() == base


def test_a_cache_of_another_head_size_is_refused() -> None:
    with pytest.raises(ValueError, match="KV cache of"):
        kv_views(torch.zeros(PAGES, HEADS, PAGE, 3 * DIM), DIM)


def test_an_axis_of_one_head_has_a_stride_that_copy_engines_take() -> None:
    cache = torch.zeros(PAGES, PAGE, 2 * DIM).as_strided((PAGES, 1, PAGE, 2 * DIM), (PAGE * 2 * DIM, 1, 2 * DIM, 1))
    keys, _ = kv_views(cache, DIM)
    assert keys.shape == (PAGES, PAGE, 1, DIM)
    assert keys.stride(2) * 2 % 16 == 0


def test_this_engines_layout_is_one_of_them(backend: Any) -> None:
    assert kv_axis_of(backend, DIM) in (None, 0, 1)
