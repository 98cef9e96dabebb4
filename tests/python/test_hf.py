"""transformers with tiny random models: dense through the library is sdpa, sparse runs, and who served is counted."""

from __future__ import annotations

import inspect
import json
import logging
import re
import weakref
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch and transformers: make test-hf")
transformers = pytest.importorskip("transformers", reason="needs torch and transformers: make test-hf")

import compactattn  # noqa: E402
import compactattn.hf as hf  # noqa: E402
from compactattn import _hf_contiguous, _hf_engine  # noqa: E402
from hf_models import (  # noqa: E402
    DENSE,
    FAMILIES,
    KEEP_ALL,
    SPARSE,
    batched,
    check_same,
    gap_at_fork,
    generated,
    model_of,
    no_gpu,
    prompt,
)
from transformers import AttentionInterface  # noqa: E402
from transformers.generation.continuous_batching import PagedAttentionCache  # noqa: E402

NO_GPU = no_gpu()
on_gpu = pytest.mark.skipif(NO_GPU is not None, reason=f"needs a GPU: {NO_GPU}")
DEVICES = [pytest.param("cpu", torch.float32), pytest.param("cuda", torch.bfloat16, marks=on_gpu)]
INDEXED = "write_index" in inspect.signature(PagedAttentionCache.update).parameters


@pytest.fixture(autouse=True)
def _fresh(asked: Any) -> None:
    asked("compactattn", **DENSE)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Asks for settings as a user does."""

    def ask(mode: str, **config: Any) -> None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        monkeypatch.setenv("COMPACTATTN_MODE", mode)
        monkeypatch.setenv("COMPACTATTN_CONFIG", str(path))
        hf.register()

    return ask


@pytest.mark.parametrize(("device", "dtype"), [*DEVICES, ("cpu", torch.bfloat16)])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_is_sdpa_in_every_family(family: str, device: str, dtype: Any) -> None:
    model = model_of(family, dtype, device)
    # Chunks of 100: KV of 200 and 290 tokens, neither of them whole pages.
    theirs = generated(model, "sdpa", prompt(290))
    ours = generated(model, "compactattn", prompt(290))
    check_same(ours, theirs, dtype)
    report, full = hf.report(), 1 if family == "gemma3" else 2
    assert report.served == 2 * full
    assert report.engine == {"short": full, "decode": 5 * 2} | ({"sliding": 3} if full == 1 else {})
    assert report.stats.calls == report.served
    assert report.stats.refused == 0


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("chunk", [96, 101])
def test_whole_pages_and_batches_are_sdpa(chunk: int, device: str, dtype: Any) -> None:
    model, ids = model_of("llama", dtype, device), prompt(288, batch=2)
    check_same(generated(model, "compactattn", ids, chunk), generated(model, "sdpa", ids, chunk), dtype)
    # Three chunks, two layers; the first chunk has no past.
    assert hf.report().served == 4
    assert hf.report().stats.calls == 8


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_everything_kept_is_sdpa(asked: Any, device: str, dtype: Any) -> None:
    asked("compactattn", **KEEP_ALL)
    model = model_of("llama", dtype, device)
    check_same(generated(model, "compactattn", prompt(290)), generated(model, "sdpa", prompt(290)), dtype)
    assert hf.report().stats.density == 1.0


def test_mode_dense_is_sdpa_at_its_own_threshold(asked: Any) -> None:
    asked("dense")
    model = model_of("llama", num_hidden_layers=1, max_position_embeddings=16384)
    theirs = generated(model, "sdpa", prompt(8300), chunk=8200)
    check_same(generated(model, "compactattn", prompt(8300), chunk=8200), theirs, torch.float32)
    assert hf.report().served == 1


@pytest.mark.parametrize("selector", ["sampled_exact", "pooled_mass"])
@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_compact_mode_reads_a_share_of_the_blocks(asked: Any, device: str, dtype: Any, selector: str) -> None:
    asked("compactattn", **SPARSE | {"selector": selector})
    model = model_of("llama", dtype, device)
    ours = generated(model, "compactattn", prompt(1000), chunk=250)
    stats = hf.report().stats
    assert hf.report().served == 6
    assert 0.05 < stats.density < 0.5
    # The selection is really applied: attention that left blocks out is not dense attention.
    theirs = generated(model, "sdpa", prompt(1000), chunk=250)
    assert not torch.equal(ours.logits[0], theirs.logits[0])
    assert torch.isfinite(ours.logits[0]).all()


def test_the_default_threshold_leaves_short_prompts_alone(asked: Any) -> None:
    asked("compactattn")
    model = model_of("llama")
    theirs, ours = generated(model, "sdpa", prompt(290)), generated(model, "compactattn", prompt(290))
    assert torch.equal(ours.logits[0], theirs.logits[0])
    assert hf.report().served == 0
    assert set(hf.report().engine) == {"short", "decode"}


def test_no_kv_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = []
    batch_of = _hf_contiguous.Batch.of
    monkeypatch.setattr(_hf_contiguous.Batch, "of", lambda *args: pools.append(args[1:3]) or batch_of(*args))
    q, k, v = torch.randn(1, 4, 50, 64), torch.randn(1, 2, 203, 64), torch.randn(1, 2, 203, 64)
    _hf_contiguous.chunk(q, k, v, None, hf._settings(0))
    # 203 = 11 + 12 pages of 16.
    for pool, whole in zip(pools[0], (k, v), strict=True):
        assert pool.shape == (12, 16, 2, 64)
        assert pool.data_ptr() == whole[0, 0, 11].data_ptr()


def test_a_call_that_is_kept_serves_other_tensors_and_holds_none() -> None:
    settings = compactattn.Settings.mode("compactattn").replace(
        block_size=16, dense_below_kv_len=128, dense_max_q_len=4
    )
    calls = _hf_contiguous._local.__dict__

    def drawn() -> list[Any]:
        return [torch.randn(2, heads, tokens, 64) for heads, tokens in ((4, 48), (2, 208), (2, 208))]

    first, second = drawn(), drawn()
    calls.clear()
    kept = [_hf_contiguous.chunk(*one, None, settings) for one in (first, second)]
    assert len(calls["calls"]) == 1
    for one, out in zip((first, second), kept, strict=True):
        for req in range(2):
            calls.clear()
            alone = _hf_contiguous.chunk(*(tensor[req : req + 1] for tensor in one), None, settings)
            assert torch.equal(alone[0], out[req])
    calls.clear()
    _hf_contiguous.chunk(*second, None, settings)
    freed = [weakref.ref(tensor) for tensor in second]
    del first, second, one
    assert len(calls["calls"]) == 1
    assert all(tensor() is None for tensor in freed)


def test_padding_and_static_caches_stay_with_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = model_of("llama"), prompt(290, batch=2)
    padded = torch.ones_like(ids)
    padded[0, :7] = 0
    with caplog.at_level(logging.WARNING, "compactattn.hf"):
        for more in ({"attention_mask": padded}, {"cache_implementation": "static", "disable_compile": True}):
            check_same(
                generated(model, "compactattn", ids, **more), generated(model, "sdpa", ids, **more), torch.float32
            )
    assert hf.report().served == 0
    assert hf.report().engine[_hf_engine.MASK] >= 2 * 2
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1


@on_gpu
def test_f32_on_a_gpu_stays_with_the_engine() -> None:
    model, ids = model_of("llama", torch.float32, "cuda"), prompt(290)
    check_same(generated(model, "compactattn", ids), generated(model, "sdpa", ids), torch.float32)
    assert hf.report().served == 0
    assert any("dtype" in reason for reason in hf.report().engine)


def test_shapes_that_are_not_offered_stay_with_the_engine() -> None:
    model = model_of("llama", head_dim=80)
    check_same(generated(model, "compactattn", prompt(290)), generated(model, "sdpa", prompt(290)), torch.float32)
    assert hf.report().served == 0
    assert any("head_dim" in reason for reason in hf.report().engine)


def test_training_stays_with_the_engine() -> None:
    model = model_of("llama")
    cache = transformers.DynamicCache(config=model.config)
    model.set_attn_implementation("compactattn")
    model(prompt(150), past_key_values=cache, use_cache=True)
    model(prompt(60), past_key_values=cache, use_cache=True).logits.sum().backward()
    assert hf.report().engine["gradients"] == 2
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.*")
def test_compiled_models_break_their_graph_at_long_chunks() -> None:
    model, ids = model_of("llama", num_hidden_layers=1), prompt(290)
    theirs = generated(model, "sdpa", ids)
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    check_same(generated(model, "compactattn", ids), theirs, torch.float32)
    assert hf.report().served == 2
    # Traced decode is not counted.
    assert hf.report().engine == {"short": 1}


@pytest.mark.parametrize("kwargs", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}])
def test_what_sdpa_leaves_out_is_refused(kwargs: Any) -> None:
    q, k = torch.randn(1, 4, 50, 64), torch.randn(1, 2, 203, 64)
    with pytest.raises(hf.Unsupported, match=next(iter(kwargs))):
        AttentionInterface()["compactattn"](torch.nn.Module(), q, k, k, None, **kwargs)


def test_wrong_settings_are_known_at_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPACTATTN_MODE", "sparse-ish")
    with pytest.raises(ValueError, match="COMPACTATTN_MODE"):
        hf.register()


PROMPTS = [prompt(n)[0].tolist() for n in (230, 61, 150)]


@pytest.mark.skipif(not INDEXED, reason="continuous batching takes no names of others in this transformers")
@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_continuous_batching_is_paged_sdpa(
    family: str, device: str, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family, dtype, device)
    theirs = batched(model, "paged|sdpa", PROMPTS)
    copies, update = [], PagedAttentionCache.update
    monkeypatch.setattr(PagedAttentionCache, "update", lambda *args: copies.append(args[3]) or update(*args))
    ours = batched(model, "paged|compactattn", PROMPTS)
    assert all(len(tokens) == 5 for tokens in ours)
    # Greedy tokens part where two logits are as close as check_same lets them come apart: never so in f32.
    most = 0.0 if dtype is torch.float32 else 2 * 3.2e-2
    forks = [gap_at_fork(model, *three) for three in zip(PROMPTS, ours, theirs, strict=True)]
    assert max(map(abs, forks)) <= most
    report = hf.report()
    # The engine's dense copy is made for sliding layers alone.
    assert set(copies) == ({0} if family == "gemma3" else set())
    assert report.engine.get("sliding", 0) == len(copies)
    assert report.served > 0


@pytest.mark.skipif(not INDEXED, reason="continuous batching takes no names of others in this transformers")
def test_continuous_batching_is_sparse_and_serves_odd_shapes(asked: Any) -> None:
    asked("compactattn", **SPARSE)
    batched(model_of("llama"), "paged|compactattn", PROMPTS)
    assert 0.05 < hf.report().stats.density < 0.5
    odd = model_of("llama", head_dim=80)
    theirs = batched(odd, "paged|sdpa", PROMPTS)
    asked("compactattn", **DENSE)
    assert batched(odd, "paged|compactattn", PROMPTS) == theirs
    assert hf.report().served == 0
    assert any("head_dim" in reason for reason in hf.report().engine)


@pytest.mark.skipif(INDEXED, reason="this transformers' continuous batching is served")
def test_newer_continuous_batching_refuses_by_name() -> None:
    with pytest.raises(ValueError, match="compactattn is not supported for continuous batching"):
        batched(model_of("llama"), "paged|compactattn", PROMPTS)


def test_the_readme_runs_as_written(asked: Any) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```py\n(.*?)```", readme, re.DOTALL)
    asked("compactattn")
    ids = prompt(8300)
    model = model_of("llama", num_hidden_layers=1, max_position_embeddings=16384)
    model.generation_config.max_new_tokens = 2
    names: dict[str, Any] = {"model": model, "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}
    exec(code[1], names)
    # Chunks end at 4096, 8192 and 8300.
    assert hf.report().served == 2
    stats = hf.report().stats
    # The preset's cap; sink and local blocks may come on top.
    assert 0 < stats.selected - stats.forced <= 0.35 * stats.candidates
    assert names["out"].shape[1] > 8300


def test_a_call_from_another_continuous_batching_is_refused() -> None:
    q, k = torch.randn(1, 4, 50, 64), torch.randn(1, 2, 50, 64)
    with pytest.raises(hf.Unsupported, match=r"wanted continuous batching as transformers 5\.17"):
        AttentionInterface()["paged|compactattn"](torch.nn.Module(), q, k, k, None)


def test_packed_masks_are_block_diagonal() -> None:
    cu_q, cu_k = torch.tensor([0, 3, 3, 5]), torch.tensor([0, 5, 5, 7])
    seen = _hf_engine.packed_mask(cu_q, cu_k, (6, 8), window=4)[0, 0]
    wanted = torch.zeros(6, 8, dtype=torch.bool)
    for i, keys in enumerate([(0, 1, 2), (0, 1, 2, 3), (1, 2, 3, 4), (5,), (5, 6), range(8)]):
        wanted[i, list(keys)] = True
    assert torch.equal(seen, wanted)
