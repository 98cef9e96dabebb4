"""The SGLang backend where no SGLang is: what is refused, which steps are looked at, how its pool is seen."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from compactattn.serving.policy import Policy, Step, reasons
from compactattn.sglang import policy
from compactattn.sglang.policy import PAGE_SIZES

SERVED = {
    "use_mla": False,
    "head_size": 128,
    "dtype": "bfloat16",
    "device_capability": (9, 0),
    "build": "GPU kernels: 50 kernels in 29 units for sm_80 sm_90a sm_100a sm_120a",
    "page_size": 64,
    "kv_cache_dtype": "auto",
}


def test_what_is_served_has_no_reason_against_it() -> None:
    for page_size in PAGE_SIZES:
        assert policy.config_refusals(SERVED | {"page_size": page_size}) == []
    assert policy.config_refusals({}) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"page_size": 1}, "start with --page-size 64"),
        ({"page_size": 48}, "page size 48"),
        ({"device_capability": None}, "no CUDA device"),
        ({"device_capability": (7, 5)}, "capability 7.5"),
        ({"build": "GPU kernels: none"}, "COMPACTATTN_CUDA=require"),
        ({"head_size": 80}, "head size 80"),
        ({"dtype": "float32"}, "dtype float32"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "--kv-cache-dtype auto"),
        ({"use_mla": True}, "MLA"),
        ({"encoder_decoder": True}, "encoder-decoder"),
        ({"disaggregation": True}, "approximate"),
        ({"hicache_storage": True}, "approximate"),
        ({"two_batch": True}, "two-batch overlap"),
        ({"unified_memory": True}, "unified memory"),
        ({"kv_sharding": True}, "sharding"),
        ({"context_parallel": True}, "context parallelism"),
        ({"needs_means": True}, "block means"),
    ],
)
def test_what_is_not_served_gets_one_reason_with_a_remedy(change: dict[str, Any], named: str) -> None:
    (reason,) = policy.config_refusals(SERVED | change)
    assert named in reason


def layer(**changes: Any) -> Any:
    given = {"head_dim": 128, "v_head_dim": 128, "logit_cap": 0.0, "sliding_window_size": -1, "attn_type": "decoder"}
    return SimpleNamespace(**given | changes)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"logit_cap": 50.0}, "logits softcap"),
        ({"sliding_window_size": 0}, "sliding window"),
        ({"sliding_window_size": 4095}, "sliding window"),
        ({"is_cross_attention": True}, "cross attention"),
        ({"attn_type": SimpleNamespace(value="encoder_only")}, "attention type other than decoder"),
        ({"attn_type": SimpleNamespace(value="decoder")}, None),
        ({"v_head_dim": 64}, "values of another size than keys"),
        ({"use_irope": True}, "local attention"),
        ({"xai_temperature_len": 1024}, "length-scaled temperature"),
    ],
)
def test_layers_of_another_kind_are_the_engines(changes: dict[str, Any], why: str | None) -> None:
    assert policy.layer_refusal(layer(**changes)) == why


class Batch:
    """The engine's batch; what lies on the device may not be looked at."""

    def __init__(self, mode: str = "EXTEND", **changes: Any) -> None:
        self.forward_mode = SimpleNamespace(name=mode)
        self.extend_seq_lens_cpu: Any = [300, 20, 1]
        self.extend_prefix_lens_cpu: Any = [9000, 0, 700]
        self.__dict__.update(changes)

    def __getattr__(self, name: str) -> Any:
        if name in ("seq_lens", "extend_seq_lens", "out_cache_loc", "req_pool_indices"):
            raise AssertionError("a copy from the device")
        raise AttributeError(name)


@pytest.mark.parametrize("mode", ["EXTEND", "MIXED"])
def test_a_prefill_step_is_told_from_lengths_on_the_host(mode: str) -> None:
    step = policy.step_of(Batch(mode))
    assert step == Step([0, 300, 320, 321], [9300, 20, 701])
    assert [why is None for why in reasons(Policy(256, 8192), step)] == [True, False, False]


@pytest.mark.parametrize(
    "batch",
    [
        Batch("DECODE"),
        Batch("TARGET_VERIFY"),
        Batch("DRAFT_EXTEND_V2"),
        Batch(spec_info=object()),
        Batch(encoder_lens=object()),
        Batch(extend_seq_lens_cpu=None),
        Batch(extend_prefix_lens_cpu=None),
        Batch(extend_seq_lens_cpu=[]),
    ],
)
def test_steps_of_other_kinds_are_not_looked_at(batch: Batch) -> None:
    assert policy.step_of(batch) is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"page_table": None}, "no page table"),
        ({"image_token_ranges": np.ones(1)}, "image masks"),
        ({"local_attn_metadata": object()}, "local attention"),
        ({"swa_spec_metadata": object()}, "speculative sliding window"),
    ],
)
def test_steps_with_masks_of_their_own_are_the_engines(changes: dict[str, Any], why: str | None) -> None:
    assert policy.metadata_refusal(SimpleNamespace(**{"page_table": np.ones(1)} | changes)) == why


def test_importing_the_package_imports_neither_engine_nor_torch() -> None:
    modules = ", ".join(f"compactattn.sglang{name}" for name in ("", ".policy", ".plugin", ".split", ".facts"))
    code = f"import sys, {modules}; assert not {{'torch', 'sglang', 'vllm'}} & set(sys.modules), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
