"""The GPU's classes with the engine's kernel replaced by plain attention: who computes which rows, over which pages.

Runs on the CPU, where the library's CPU backend stands behind the same code.
"""

from __future__ import annotations

import json
import logging
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compactattn.serving.report import REPORT
from compactattn.vllm import counters, current, split
from compactattn.vllm.backend import (
    CompactAttentionBackend,
    CompactAttentionImpl,
    CompactAttentionMetadataBuilder,
)
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import flash_attn
from vllm.v1.kv_cache_interface import FullAttentionSpec

HEADS, KV_HEADS, DIM, PAGE, PAGES = 4, 2, 64, 16, 400
NAME = "model.layers.1.self_attn.attn"
KEEP_ALL = {"keep_density": 1.0, "min_density": 1.0, "max_density": 1.0, "dense_below_kv_len": 0}
LONG = KEEP_ALL | {"min_chunk_tokens": 64, "min_kv_tokens": 500}

# Enough for any step; who reads it says so.
TABLE = torch.zeros(64, 78, dtype=torch.int32)

# 1200 keys at most, a rounding each in either sum, of averages of numbers below 5.
TOLERANCE = 2 * 5 * 1200 * 2**-24


class Layer:
    """One layer, its builder, a filled cache; what the engine's kernel was asked for is in ``engine_rows``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], **impl: Any) -> None:
        monkeypatch.delenv("COMPACTATTN_MODE", raising=False)
        monkeypatch.setattr(current, "_latest", None)
        monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", self.kernel, raising=False)
        config = vllm_config(asked)
        monkeypatch.setattr(current, "config", lambda: config)
        # An engine built for GPUs finds none here, and does not take itself for a CPU's.
        monkeypatch.setattr(current, "_on_cpu", lambda: True)
        monkeypatch.setattr(flash_attn, "get_current_vllm_config_or_none", lambda: None)
        given = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto"} | impl
        self.impl = CompactAttentionImpl(HEADS, DIM, DIM**-0.5, KV_HEADS, **given)
        self.impl.vllm_flash_attn_version = 3
        self.engine_rows: list[tuple[int, int]] = []
        self.impl.forward(None, torch.zeros(1, HEADS, DIM), None, None, torch.zeros(0), None, torch.zeros(1))
        config.compilation_config.static_forward_context = {NAME: SimpleNamespace(impl=self.impl)}
        spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=KV_HEADS, head_size=DIM, dtype=torch.float32)
        self.builder = CompactAttentionMetadataBuilder(spec, [NAME], config, torch.device("cpu"))
        self.cache = torch.randn(PAGES, PAGE, KV_HEADS, 2 * DIM, generator=seeded(1)).transpose(1, 2)
        one = torch.ones(1)
        self.layer = SimpleNamespace(_q_scale=one, _k_scale=one, _v_scale=one)

    def kernel(self, *, q: Any, k: Any, v: Any, out: Any, block_table: Any, **given: Any) -> None:
        starts, lens = given["cu_seqlens_q"].tolist(), given["seqused_k"].tolist()
        assert (starts[0], starts[-1]) == (0, len(q))
        assert given["max_seqlen_q"] == max(b - a for a, b in pairwise(starts))
        assert given["max_seqlen_k"] >= max(lens)
        assert (given["scheduler_metadata"], given["causal"]) == (None, True)
        for r, kv_len in enumerate(lens):
            rows = slice(starts[r], starts[r + 1])
            self.engine_rows.append((rows.stop - rows.start, kv_len))
            out[rows] = plain(q[rows], k, v, block_table[r], kv_len)

    def step(self, requests: list[tuple[int, int, bool]], **changes: Any) -> tuple[Any, Any, Any]:
        """Runs a step; gives output, what plain attention gives, and the metadata."""
        common = common_metadata(requests, **changes)
        metadata = self.builder.build(changes.get("prefix", 0), common)
        total = common.num_actual_tokens
        # Rows of a padded batch beyond the step, which nobody may write.
        q, out = torch.randn(total + 3, HEADS, DIM, generator=seeded(2)), torch.full((total + 3, HEADS, DIM), 7.0)
        kv = torch.zeros(total + 3, KV_HEADS, DIM)
        self.impl.forward(self.layer, q, kv, kv, self.cache, metadata, out)
        assert (out[total:] == 7.0).all()
        keys, values = self.cache.transpose(1, 2).split(DIM, dim=-1)
        starts = common.query_start_loc.tolist()
        wanted = [
            plain(q[starts[r] : starts[r + 1]], keys, values, common.block_table_tensor[r], kv_len)
            for r, (_, kv_len, _) in enumerate(requests)
        ]
        return out[:total], torch.cat(wanted), metadata


MIXED = [(1, 900, False), (1, 33, False), (70, 700, True), (80, 80, True), (90, 1200, True)]


def test_each_request_is_computed_once_by_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(monkeypatch, LONG)
    before = counters()["our_tokens"]
    out, wanted, metadata = layer.step(MIXED)
    torch.testing.assert_close(out, wanted, rtol=0, atol=TOLERANCE)
    assert layer.engine_rows == [(1, 900), (1, 33), (80, 80)]
    assert [piece.part.ours for piece in metadata.compact_pieces] == [False, True, False, True]
    assert counters()["our_tokens"] - before == 160


def test_the_next_layer_of_a_step_brings_its_own_rows_and_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(monkeypatch, LONG)
    _, _, metadata = layer.step([(90, 1200, True)])
    (piece,) = metadata.compact_pieces
    (call,) = piece.calls.values()
    table = metadata.block_table[0]
    # The second time the rows lie in a wider tensor, as the engine's do.
    for wide, made in ((HEADS, call), (HEADS + 3, None)):
        cache = torch.randn(PAGES, PAGE, KV_HEADS, 2 * DIM, generator=seeded(wide)).transpose(1, 2)
        q, out = torch.randn(90, wide, DIM, generator=seeded(5))[:, :HEADS], torch.full((90, HEADS, DIM), 7.0)
        layer.impl.forward(layer.layer, q, q, q, cache, metadata, out)
        keys, values = cache.transpose(1, 2).split(DIM, dim=-1)
        torch.testing.assert_close(out, plain(q, keys, values, table, 1200), rtol=0, atol=TOLERANCE)
        assert (list(piece.calls.values()) == [call]) == (made is call)


def test_sparse_settings_reach_our_rows_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"keep_density": 0.05, "min_density": 0.05, "max_density": 0.05, "block_size": 16, "dense_below_kv_len": 0}
    layer = Layer(monkeypatch, LONG | few)
    out, wanted, _ = layer.step(MIXED)
    off = (out - wanted).abs().amax((1, 2)) > TOLERANCE
    rows = torch.tensor([i for i, (q_len, kv_len, _) in enumerate(MIXED) for _ in range(q_len)])
    assert not off[(rows != 2) & (rows != 4)].any()
    assert off[(rows == 2) | (rows == 4)].float().mean() > 0.9


@pytest.mark.parametrize(
    "requests",
    [[(1, 900, False)] * 3, [(80, 80, True), (63, 900, True)], [(100, 900, False)]],
    ids=["decode", "short", "verified drafts"],
)
def test_steps_without_a_long_chunk_are_the_engines(monkeypatch: pytest.MonkeyPatch, requests: Any) -> None:
    layer = Layer(monkeypatch, LONG)
    out, wanted, metadata = layer.step(requests)
    assert metadata.compact_pieces is None
    assert layer.engine_rows == [(q_len, kv_len) for q_len, kv_len, _ in requests]
    assert torch.equal(out, wanted)


def test_a_captured_step_is_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(monkeypatch, LONG)
    assert layer.builder.build_for_cudagraph_capture(common_metadata(MIXED)).compact_pieces is None
    assert layer.builder.build(0, common_metadata(MIXED)).compact_pieces is not None
    assert layer.builder.build(0, common_metadata(MIXED), fast_build=True).compact_pieces is None


def test_another_groups_block_table_reaches_every_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(monkeypatch, LONG)
    metadata = layer.builder.build(0, common_metadata(MIXED))
    table = metadata.block_table + 1
    made = layer.builder.update_block_table(metadata, table, metadata.slot_mapping)
    for piece, old in zip(made.compact_pieces, metadata.compact_pieces, strict=True):
        assert torch.equal(piece.metadata.block_table, table[piece.part.reqs])
        assert torch.equal(old.metadata.block_table, table[piece.part.reqs] - 1)


@pytest.mark.parametrize(
    ("asked", "impl"),
    [
        ({"mode": "dense"}, {}),
        (LONG | {"dense_layers": [1]}, {}),
        (LONG, {"logits_soft_cap": 30.0}),
        (LONG, {"alibi_slopes": [0.1] * HEADS}),
    ],
    ids=["mode dense", "dense layer", "softcap", "alibi"],
)
def test_layers_that_are_not_served_are_never_split(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], impl: dict[str, Any]
) -> None:
    layer = Layer(monkeypatch, asked, **impl)
    assert layer.builder.build(0, common_metadata(MIXED)).compact_pieces is None
    assert layer.impl._service is None
    assert layer.builder.reorder_batch_threshold is None


def test_a_cache_quantised_otherwise_than_to_e4m3_stays_the_engines() -> None:
    impl = SimpleNamespace(attn_type="decoder", kv_cache_dtype="auto", sliding_window=(-1, -1))
    for served in ("auto", "bfloat16", "fp8", "fp8_e4m3"):
        impl.kv_cache_dtype = served
        assert current.layer_refusal(impl) is None
    for kept in ("fp8_e5m2", "int8_per_token_head"):
        impl.kv_cache_dtype = kept
        assert current.layer_refusal(impl) == f"KV cache dtype {kept}"


@pytest.mark.parametrize("quantised", [False, True], ids=["plain queries", "fp8 queries"])
def test_an_fp8_cache_is_read_with_the_layers_scales(monkeypatch: pytest.MonkeyPatch, quantised: bool) -> None:
    monkeypatch.setattr(flash_attn, "flash_attn_supports_fp8", lambda: True, raising=False)
    layer = Layer(monkeypatch, LONG, kv_cache_dtype="fp8")
    metadata = layer.builder.build(0, common_metadata([(90, 1200, True)]))
    # Two layers of one step: the second brings another cache and other scales.
    for seed, k_scale, v_scale in ((5, 0.5, 0.3), (6, 1.7, 0.9)):
        cache = torch.randn(PAGES, PAGE, KV_HEADS, 2 * DIM, generator=seeded(seed)).transpose(1, 2)
        cache, q = cache.to(torch.float8_e4m3fn), torch.randn(90, HEADS, DIM, generator=seeded(seed + 10))
        scales = {"_q_scale": 0.7, "_k_scale": k_scale, "_v_scale": v_scale}
        own = SimpleNamespace(**{name: torch.tensor(value) for name, value in scales.items()})
        given = q.to(torch.float8_e4m3fn) if quantised else q
        q, out = given.float() * 0.7 if quantised else q, torch.full((90, HEADS, DIM), 7.0)
        layer.impl.forward(own, given, given, given, cache.view(torch.uint8), metadata, out)
        keys, values = cache.float().transpose(1, 2).split(DIM, dim=-1)
        wanted = plain(q, keys * k_scale, values * v_scale, metadata.block_table[0], 1200)
        torch.testing.assert_close(out, wanted, rtol=0, atol=TOLERANCE)


def test_on_a_gpu_room_is_made_for_requests_that_can_be_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(current, "_latest", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    found = []
    for on_cpu in (True, False):
        monkeypatch.setattr(current, "_on_cpu", lambda on_cpu=on_cpu: on_cpu)
        found.append(current.limits(vllm_config(LONG)).max_num_reqs)
    # 512 tokens, chunks of 64 of them; on a CPU all of the step is the library's.
    assert found == [16, 8]


def test_a_part_that_is_ours_has_no_more_requests_than_room_is_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(monkeypatch, LONG)
    most = layer.builder._policy.most_of_ours(512)
    full = [(64, 600, True)] * most
    between = [
        *[(1, 600, False)] * 20,
        *[(80, 700, True)] * 3,
        (1, 600, False),
        (20, 600, True),
        *[(64, 700, True)] * 3,
    ]
    for requests in (full, between):
        pieces = layer.builder.build(0, common_metadata(requests, block_table_tensor=TABLE)).compact_pieces
        assert max(len(piece.metadata.seq_lens) for piece in pieces if piece.part.ours) <= most


def test_a_step_is_in_the_counters_file_when_it_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layer = Layer(monkeypatch, LONG | {"counters_file": str(tmp_path / "c.json")})
    monkeypatch.setattr(REPORT, "_written", 0.0)
    before = counters()["our_tokens"]
    layer.builder.build(0, common_metadata(MIXED))
    assert json.loads((tmp_path / "c.json").read_text())["our_tokens"] - before == 160


def test_layers_that_the_model_has_not_are_told_and_others_are_served(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layer = Layer(monkeypatch, LONG | {"dense_layers": [3]})
    assert layer.impl._service is not None
    assert "layers [3]; the model has 3" in caplog.text


def test_a_wrong_setting_stops_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="max_density"):
        Layer(monkeypatch, LONG | {"layers": {"2": {"max_density": 3}}})


def test_in_mode_dense_by_option_the_engines_own_classes_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("COMPACTATTN_MODE", raising=False)
    monkeypatch.setattr(REPORT, "_said", set())
    caplog.set_level(logging.INFO, "vllm.compactattn")
    monkeypatch.setattr(current, "_latest", None)
    ours, own = CompactAttentionBackend, flash_attn.FlashAttentionBackend
    # Two engines of one process, one after the other; each knows its own configuration.
    for mode in ("dense", "compactattn", "dense"):
        monkeypatch.setattr(current, "config", lambda mode=mode: vllm_config({"mode": mode}))
        assert (ours.get_impl_cls() is own.get_impl_cls()) == (mode == "dense")
        monkeypatch.setattr(current, "config", lambda: None)
        assert (ours.get_builder_cls() is own.get_builder_cls()) == (mode == "dense")
    assert "mode dense, all by the engine's own backend" in caplog.text


def test_the_mixins_stand_before_the_engines_classes() -> None:
    assert CompactAttentionImpl.__mro__[1] is split.SplitImpl


def plain(q: Any, keys: Any, values: Any, pages: Any, kv_len: int) -> Any:
    """Causal attention of one request, as a textbook has it."""
    used = pages[: -(-kv_len // PAGE)].long()
    k, v = (pool[used].flatten(0, 1)[:kv_len].repeat_interleave(HEADS // KV_HEADS, 1) for pool in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", q, k) * DIM**-0.5
    late = torch.arange(kv_len) > torch.arange(kv_len - len(q), kv_len)[:, None]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(late, -torch.inf).softmax(-1), v)


def common_metadata(requests: list[tuple[int, int, bool]], **changes: Any) -> Any:
    q_lens, kv_lens, prefilling = (torch.tensor(column) for column in zip(*requests, strict=True))
    starts = torch.cat([torch.zeros(1), q_lens.cumsum(0)]).int()
    pages = changes.pop("block_table_tensor", None)
    if pages is None:
        pages = torch.randperm(PAGES - 1, generator=seeded(3))[: len(requests) * 78].view(len(requests), 78)
    fields = {
        "query_start_loc": starts,
        "query_start_loc_cpu": starts,
        "seq_lens": kv_lens.int(),
        "seq_lens_cpu_upper_bound": kv_lens.int(),
        "is_prefilling": prefilling,
        "num_reqs": len(requests),
        "num_actual_tokens": int(starts[-1]),
        "max_query_len": int(q_lens.max()),
        "max_seq_len": int(kv_lens.max()),
        "block_table_tensor": pages.int(),
        "slot_mapping": torch.zeros(int(starts[-1]), dtype=torch.int64),
    }
    return CommonAttentionMetadata(**fields | changes)


def vllm_config(asked: dict[str, Any]) -> Any:
    """As much of the engine's configuration as builder and backend read."""
    model = SimpleNamespace(
        max_model_len=2048,
        dtype=torch.float32,
        rswa_window=None,
        is_mm_prefix_lm=False,
        get_total_num_hidden_layers=lambda: 3,
        get_num_attention_heads=lambda _: HEADS,
        get_num_kv_heads=lambda _: KV_HEADS,
        get_head_size=lambda: DIM,
    )
    graphs = SimpleNamespace(has_full_cudagraphs=lambda: False)
    return SimpleNamespace(
        additional_config={"compactattn": asked},
        model_config=model,
        scheduler_config=SimpleNamespace(max_num_seqs=16, max_num_batched_tokens=512),
        parallel_config=SimpleNamespace(cp_kv_cache_interleave_size=1, decode_context_parallel_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        compilation_config=SimpleNamespace(cudagraph_mode=graphs, max_cudagraph_capture_size=0),
        attention_config=SimpleNamespace(flash_attn_max_num_splits_for_cuda_graph=0),
        kernel_config=SimpleNamespace(enable_jit_warmup=False),
        speculative_config=None,
    )


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)
