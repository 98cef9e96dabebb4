"""The GPU's backend with the engine's kernel replaced by plain attention: who computes which rows, over which pages.

The engine's own code prepares metadata and calls the kernel. Runs on the CPU, where the library's CPU backend stands
behind the same code.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compactattn.serving import service
from compactattn.serving.report import REPORT
from compactattn.sglang import counters, facts, split
from compactattn.sglang.backend import CompactAttentionBackend
from sglang.srt.layers.attention import flashattention_backend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode

HEADS, KV_HEADS, DIM, PAGE, PAGES = 4, 2, 64, 16, 400
LONG = (
    '{"keep_density": 1.0, "min_density": 1.0, "max_density": 1.0, "dense_below_kv_len": 0, "min_chunk_tokens": 64, %s}'
)

# 1200 keys at most, a rounding each in either sum, of averages of numbers below 5.
TOLERANCE = 2 * 5 * 1200 * 2**-24


class Pool:
    """``[slots, heads, head_dim]`` of one layer; slots nobody wrote are NaN."""

    def __init__(self) -> None:
        self.k, self.v = (torch.full((PAGES * PAGE, KV_HEADS, DIM), float("nan")) for _ in range(2))
        self.writes = 0

    def get_kv_buffer(self, layer_id: int) -> tuple[Any, Any]:
        return self.k, self.v

    def set_kv_buffer(self, layer: Any, slots: Any, k: Any, v: Any, k_scale: Any, v_scale: Any) -> None:
        self.writes += 1
        self.k[slots.loc], self.v[slots.loc] = k.view(-1, KV_HEADS, DIM), v.view(-1, KV_HEADS, DIM)


class Engine:
    """The backend as the engine makes it, but for its constructor, which wants a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, asked: str = '"min_kv_tokens": 500', model: Any = None) -> None:
        monkeypatch.delenv("COMPACTATTN_MODE", raising=False)
        monkeypatch.setenv(facts.VARIABLE, LONG % asked)
        monkeypatch.setattr(facts, "_options", None)
        monkeypatch.setattr(facts, "server_args", lambda: SimpleNamespace(chunked_prefill_size=2048))
        monkeypatch.setattr(flashattention_backend, "flash_attn_with_kvcache", self.kernel)
        # By version; asked, they would read the arguments of a server.
        for context_parallel in ("is_cp_active", "is_cp_v2_active"):
            monkeypatch.setattr(flashattention_backend, context_parallel, lambda batch: False, raising=False)
        self.pool, self.engine_rows = Pool(), []
        # Row 0 is nobody's; a request's pages lie anywhere, its slots within a page are neighbours.
        pages = torch.randperm(PAGES, generator=seeded(3), dtype=torch.int32)[: 4 * 90].view(4, 90)
        slots = (pages[:, :, None] * PAGE + torch.arange(PAGE, dtype=torch.int32)).flatten(1)
        self.slots = torch.cat([torch.zeros_like(slots[:1]), slots])
        req_to_token = SimpleNamespace(req_to_token=self.slots, size=4)
        config = SimpleNamespace(context_len=1440, num_hidden_layers=2)
        runner = SimpleNamespace(page_size=PAGE, dtype=torch.float32, device="cpu", model_config=config, model=model)
        runner.token_to_kv_pool, runner.req_to_token_pool = self.pool, req_to_token
        backend = CompactAttentionBackend.__new__(CompactAttentionBackend)
        # What the constructor of either version sets and prefill without extras reads.
        plain_off = dict.fromkeys(
            (
                "use_mla",
                "use_sliding_window_kv_pool",
                "has_swa",
                "is_encoder_decoder",
                "fa_skip_kv_cache",
                "has_softcap",
            ),
            False,
        )
        others = {"attn_cp_size": 1, "topk": 0, "speculative_step_id": 0, "fa_impl_ver": 3, "num_splits": 0}
        others |= {"kv_cache_dtype_str": "auto", "kv_cache_is_mxfp8": False, "attention_chunk_size": None}
        others |= {"max_context_len": 1440, "page_size": PAGE, "device": "cpu", "local_attn_builder": None}
        others |= {"is_prefill_aware_swa": False, "has_local_attention": False, "kv_index_translator": Translator()}
        others |= {"full_cg_prefill_metadata": None, "sliding_window_size": None, "kv_cache_dtype": torch.float32}
        others |= {"_unified_dense": False, "speculative_num_steps": 0}
        others |= {"_disable_scheduler_metadata_precompute": True, "speculative_num_draft_tokens": 0}
        others |= {"token_to_kv_pool": self.pool, "req_to_token_pool": req_to_token, "req_to_token": self.slots}
        backend.__dict__.update(plain_off | others)
        backend.serve(runner, facts.options())
        self.backend = backend

    def kernel(self, *, q: Any, k_cache: Any, v_cache: Any, page_table: Any, cache_seqlens: Any, **given: Any) -> Any:
        starts, lens = given["cu_seqlens_q"].tolist(), cache_seqlens.tolist()
        assert (starts[0], starts[-1], len(lens)) == (0, len(q), len(page_table))
        assert given["max_seqlen_q"] == max(b - a for a, b in pairwise(starts))
        out = given["out"] if given.get("out") is not None else torch.empty_like(q)
        for r, kv_len in enumerate(lens):
            rows = slice(starts[r], starts[r + 1])
            self.engine_rows.append((rows.stop - rows.start, kv_len))
            out[rows] = plain(q[rows], k_cache, v_cache, page_table[r], kv_len)
        return out

    def step(self, requests: list[tuple[int, int]], *, given_out: bool = True, **layer: Any) -> tuple[Any, Any]:
        """Runs a step of (query tokens, KV tokens); gives the output and what plain attention gives."""
        total = sum(q_len for q_len, _ in requests)
        for r, (_, kv_len) in enumerate(requests):
            past = self.slots[r + 1, :kv_len].long()
            self.pool.k[past] = torch.randn(kv_len, KV_HEADS, DIM, generator=seeded(10 + r))
            self.pool.v[past] = torch.randn(kv_len, KV_HEADS, DIM, generator=seeded(20 + r))
        new = torch.cat([self.slots[r + 1, kv - q : kv] for r, (q, kv) in enumerate(requests)]).long()
        k, v = self.pool.k[new].flatten(1), self.pool.v[new].flatten(1)
        self.pool.k[new] = self.pool.v[new] = float("nan")
        batch = forward_batch(requests, new)
        # Rows of a padded batch beyond the step, which nobody may write.
        batch._attn_output = torch.full((total, HEADS * DIM), 7.0) if given_out else None
        q = torch.randn(total, HEADS * DIM, generator=seeded(2))
        self.backend.init_forward_metadata(batch)
        out = self.backend.forward(q, k, v, radix_layer(**layer), batch)
        if given_out:
            assert out.data_ptr() == batch._attn_output.data_ptr()
        keys, values = (pool.view(PAGES, PAGE, KV_HEADS, DIM) for pool in (self.pool.k, self.pool.v))
        tables, starts = self.slots[1:, ::PAGE] // PAGE, batch.starts
        rows = q.view(-1, HEADS, DIM)
        wanted = [
            plain(rows[starts[r] : starts[r + 1]], keys, values, tables[r], kv) for r, (_, kv) in enumerate(requests)
        ]
        return out.view(-1, HEADS, DIM), torch.cat(wanted)


class Translator:
    is_translating = False


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def forward_batch(requests: list[tuple[int, int]], new: Any) -> Any:
    """The fields of the engine's ForwardBatch that a prefill step of its own code reads."""
    q_lens, kv_lens = (list(x) for x in zip(*requests, strict=True))
    prefixes = [kv - q for q, kv in requests]
    fields = {
        "forward_mode": ForwardMode.MIXED if 1 in q_lens else ForwardMode.EXTEND,
        "batch_size": len(requests),
        "seq_lens": torch.tensor(kv_lens),
        "seq_lens_cpu": torch.tensor(kv_lens),
        "extend_seq_lens": torch.tensor(q_lens, dtype=torch.int32),
        "extend_seq_lens_cpu": q_lens,
        "extend_prefix_lens_cpu": prefixes,
        "extend_num_tokens": sum(q_lens),
        "req_pool_indices": torch.arange(1, len(requests) + 1),
        "out_cache_loc": new,
        "starts": torch.cumsum(torch.tensor([0, *q_lens]), 0).tolist(),
    }
    return Batch(**fields)


class Batch(SimpleNamespace):
    """What is not set is off, as in the engine's dataclass."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def radix_layer(**changes: Any) -> Any:
    given: dict[str, Any] = {"tp_q_head_num": HEADS, "tp_k_head_num": KV_HEADS, "tp_v_head_num": KV_HEADS}
    given |= {"head_dim": DIM, "qk_head_dim": DIM, "v_head_dim": DIM, "scaling": DIM**-0.5, "layer_id": 0}
    given |= {"logit_cap": 0.0, "sliding_window_size": -1, "is_cross_attention": False, "attn_type": "decoder"}
    return SimpleNamespace(**given | {"k_scale": None, "v_scale": None, "use_irope": False} | changes)


def plain(q: Any, k_cache: Any, v_cache: Any, pages: Any, kv_len: int) -> Any:
    """Bottom-right causal attention of one request; q [tokens, heads, dim]."""
    used = pages[: -(-kv_len // PAGE)].long()
    k, v = (cache[used].flatten(0, 1)[:kv_len].repeat_interleave(HEADS // KV_HEADS, 1) for cache in (k_cache, v_cache))
    scores = torch.einsum("qhd,khd->hqk", q, k) * DIM**-0.5
    hidden = torch.ones(len(q), kv_len, dtype=torch.bool).triu(kv_len - len(q) + 1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


MIXED = [(80, 80), (70, 700), (90, 1200), (1, 900)]


@pytest.mark.parametrize("given_out", [True, False])
def test_each_request_is_computed_once_by_its_owner(monkeypatch: pytest.MonkeyPatch, given_out: bool) -> None:
    engine = Engine(monkeypatch)
    before = counters()["our_tokens"]
    out, wanted = engine.step(MIXED, given_out=given_out)
    assert (out - wanted).abs().max() < TOLERANCE
    assert engine.engine_rows == [(80, 80), (1, 900)]
    assert counters()["our_tokens"] - before == 160
    assert engine.pool.writes == 1


def test_a_step_that_is_all_ours_never_meets_the_engines_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch)
    out, wanted = engine.step([(64, 500), (100, 1100)])
    assert (out - wanted).abs().max() < TOLERANCE
    assert (engine.engine_rows, engine.pool.writes) == ([], 1)


def test_short_steps_are_the_engines_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch)
    out, wanted = engine.step([(63, 700), (100, 400)])
    assert torch.equal(out, wanted)
    assert engine.engine_rows == [(63, 700), (100, 400)]


@pytest.mark.parametrize("layer", [{"logit_cap": 30.0}, {"sliding_window_size": 128}])
def test_a_layer_that_is_not_offered_is_the_engines(monkeypatch: pytest.MonkeyPatch, layer: dict[str, Any]) -> None:
    engine = Engine(monkeypatch)
    engine.step([(100, 1100)], **layer)
    assert engine.engine_rows == [(100, 1100)]


@pytest.mark.parametrize("strict", ["false", "true"])
def test_a_layer_that_is_not_offered_is_a_fallback_once(monkeypatch: pytest.MonkeyPatch, strict: str) -> None:
    engine = Engine(monkeypatch, f'"min_kv_tokens": 500, "strict": {strict}')
    before = counters()["fallbacks"].get("layer: logits softcap", 0)
    if strict == "true":
        with pytest.raises(RuntimeError, match="strict: layer: logits softcap"):
            engine.step([(100, 1100)], logit_cap=30.0)
    for _ in range(3):
        engine.step([(100, 1100)], logit_cap=30.0)
    assert counters()["fallbacks"]["layer: logits softcap"] - before == 1


def model(**changes: Any) -> Any:
    """A loaded model of two layers; the changes are of the second."""
    layers = [RadixAttention(HEADS, DIM, DIM**-0.5, KV_HEADS, layer_id=number) for number in range(2)]
    layers[1].__dict__.update(changes)
    return torch.nn.ModuleList(layers)


def test_a_loaded_models_layers_are_looked_at_before_it_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(split, "reserve", lambda shape, options, page_size: made.append((shape, page_size)))
    backend = Engine(monkeypatch, '"min_kv_tokens": 500, "dense_layers": [7]', model=model()).backend
    (served,) = set(backend._bound.values())
    assert set(made) == {(served.shape, PAGE)}
    assert "layers [7]; the model has 2" in caplog.text
    before = dict(backend._bound)
    assert backend._bind(radix_layer(layer_id=1)) is served
    assert backend._bound == before


def test_strict_is_an_error_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="strict: layer: logits softcap"):
        Engine(monkeypatch, '"min_kv_tokens": 500, "strict": true', model=model(logit_cap=30.0))


def test_one_layers_settings_that_are_not_offered_leave_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    supports = service.Plan.supports

    def refused(desc: Any, on: Any = None) -> Any:
        return "E_UNSUPPORTED: not here" if on and desc.settings.block_size == 64 else supports(desc, on)

    monkeypatch.setattr(service.Plan, "supports", staticmethod(refused))
    asked = '"min_kv_tokens": 501, "layers": {"1": {"block_size": 64}}'
    backend = Engine(monkeypatch, asked, model=model()).backend
    assert [found is None for found in backend._bound.values()] == [False, True]


def test_a_step_is_in_the_counters_file_when_it_is_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = Engine(monkeypatch, f'"min_kv_tokens": 500, "counters_file": "{tmp_path / "c.json"}"')
    monkeypatch.setattr(REPORT, "_written", 0.0)
    before = counters()["our_tokens"]
    engine.step([(100, 1100)])
    assert json.loads((tmp_path / "c.json").read_text())["our_tokens"] - before == 100


def test_layers_named_dense_are_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, '"min_kv_tokens": 500, "dense_layers": [-1]')
    engine.step([(100, 1100)], layer_id=1)
    assert engine.engine_rows == [(100, 1100)]
    engine.step([(100, 1100)], layer_id=0)
    assert engine.engine_rows == [(100, 1100)]


def test_metadata_of_another_step_voids_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch)
    engine.step([(100, 1100)])
    backend = engine.backend
    backend.forward_metadata = SimpleNamespace(**backend.forward_metadata.__dict__)
    assert backend._service(radix_layer(), {}) is None
