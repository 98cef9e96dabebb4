"""Gates that are taught: they learn, the library reads them as they were taught, and the row attn_gate runs on them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch and transformers: make test-hf")
pytest.importorskip("transformers", reason="needs torch and transformers: make test-hf")

from compactattn import Settings, stages  # noqa: E402
from compactattn.eval import gates, prefill  # noqa: E402
from compactattn.eval.methods import methods  # noqa: E402
from compactattn.eval.prefill import Limits, Prefill  # noqa: E402
from compactattn.eval.tasks import make  # noqa: E402
from eval_models import subject  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

LIMITS = Limits(chunk=256, dense_below=512, slack=2)
RECIPE = gates.Recipe(contexts=2, length=1024, steps=40)
DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with gates, and their losses."""
    path = tmp_path_factory.mktemp("gates") / "gates.safetensors"
    pupil = subject()
    with pytest.MonkeyPatch.context() as patch:
        # A letter is a token here, so other tasks are too long.
        patch.setattr(gates, "MIX", (("multikey-essay", 4, 1),))
        losses = gates.train(pupil, RECIPE, path)
    return replace(pupil, gates=path), losses


def test_gates_learn_the_pooled_map(taught: Any) -> None:
    pupil, losses = taught
    assert len(losses) == pupil.model.config.num_hidden_layers == 2
    for one in losses:
        assert len(one) == RECIPE.steps + 1 and all(kl > 0 for kl in one)
        assert one[-1] < 0.8 * one[0]


def test_the_map_is_the_largest_weight_of_each_pair_of_blocks() -> None:
    torch.manual_seed(3)
    q, k = torch.randn(2, 128, 16)
    weights = (0.25 * q @ k.T).masked_fill(torch.ones(128, 128).triu(1).bool(), -torch.inf).softmax(-1)
    rows = range(gates.ROW_STEP - 1, 128, gates.ROW_STEP)
    found = gates._pooled_map(q, k, 0.25)
    for i in range(2):
        own = [[weights[r, j * 64 : (j + 1) * 64].max() for r in rows if r // 64 == i] for j in range(2)]
        largest = torch.tensor([max(one) for one in own])
        torch.testing.assert_close(found[i], largest / largest.sum())


def test_the_library_scores_as_gates_were_taught(taught: Any) -> None:
    pupil, _ = taught
    context = make("single-noise", pupil.codec, 1100, "0:0")
    layers = [gates.Examples(), gates.Examples()]
    pupil.model.set_attn_implementation(gates.NAME)
    ids = torch.tensor([context.ids[:768]])
    with torch.no_grad():
        pupil.model.model(ids, use_cache=False, gates=(layers, gates.rates(pupil.model)))
    calls = []
    third = Prefill(pupil, [context], Settings.of("dense"), LIMITS)
    third.contexts(lambda first: (lambda *call: calls.append(call)) if first == 512 else None)
    weights, settings = load_file(str(pupil.gates)), Settings.of("attn_gate").replace(dense_below_kv_len=512)
    assert [layer for layer, *_ in calls] == [0, 1]
    for layer, batch, scaling, *_ in calls:
        plan = pupil.engine._plan(batch, settings, scaling)
        got = stages.select(plan, batch, layer=layer).scores
        name = f"model.layers.{layer}.self_attn.attn_gate.mask_linear_"
        k, q = (weights[f"{name}{part}.weight"].float() for part in "kq")
        seen = layers[layer]
        logits = gates.scores(k, q, seen.k[0][None], seen.q[0][None], gates.rates(pupil.model))
        # Four spans of 64 queries behind 8 blocks.
        want = logits.softmax(-1)[0, :, 8:12, :8].transpose(0, 1)
        torch.testing.assert_close(torch.as_tensor(got)[:4, :, :8], want, rtol=1e-3, atol=1e-5)


def test_the_row_runs_and_reads_what_its_threshold_says(taught: Any) -> None:
    pupil, _ = taught
    context = make("multikey-essay", pupil.codec, 1200, "0:0", 2)
    dense = prefill.run(pupil, [context], methods()["dense"], LIMITS)
    row = methods(gates=True)["attn_gate"]
    assert row.missing is None
    densities = []
    for threshold in (0.02, 0.2):
        other = replace(row, settings=row.settings.replace(keep_value=threshold))
        densities.append(prefill.run(pupil, [context], other, LIMITS, dense.logits).work.density)
    assert 1 >= densities[0] > densities[1] > 0


def test_the_committed_gates_are_of_the_committed_adapter() -> None:
    with safe_open(str(DATA / "smollm2_32k_gates.safetensors"), "pt") as file:
        facts, keys = json.loads(file.metadata()["facts"]), list(file.keys())
        k = file.get_tensor("model.layers.29.self_attn.attn_gate.mask_linear_k.weight")
    assert facts["model"].endswith("+smollm2_32k_lora.safetensors")
    assert (len(keys), k.shape) == (60, (3, 192, 64))
