"""The paired protocol end to end on a tiny random model: who is compared, what is counted, going on, repeating."""

from __future__ import annotations

import json
import os
import struct
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch and transformers: make test-hf")
pytest.importorskip("transformers", reason="needs torch and transformers: make test-hf")

from compactattn.eval import cli, finetune, gguf, lora, model, prefill, report  # noqa: E402
from compactattn.eval.clock import Clock  # noqa: E402
from compactattn.eval.methods import find_keep_value, methods  # noqa: E402
from compactattn.eval.engine import Refused
from compactattn.eval.prefill import Limits  # noqa: E402
from compactattn.eval.protocol import Folder, Study, at_density, facts, measure  # noqa: E402
from compactattn.eval.tasks import make  # noqa: E402
from eval_models import checkpoint, codec, subject  # noqa: E402

LENGTH = 1200
LIMITS = Limits(chunk=256, dense_below=512, slack=2)
STUDY = Study(("single-noise", "multikey-essay"), (LENGTH,), 1, 2, 0, LIMITS.dense_below, LIMITS.chunk, True)
FREE = {"block_size": 32, "min_density": 0.0, "max_density": 1.0, "density_guard": 1.0}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # put_in_force sets these; they are put back behind each test.
    for name in ("COMPACTATTN_MODE", "COMPACTATTN_CONFIG"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def tiny() -> Any:
    return subject()


def changed(name: str, **changes: Any) -> Any:
    method = methods()[name]
    return replace(method, settings=method.settings.replace(**changes))


def test_keeping_everything_is_dense_and_reads_everything(tiny: Any) -> None:
    context = make("multikey-essay", tiny.codec, LENGTH, "0:0", 2)
    dense = prefill.run(tiny, context, methods()["dense"], LIMITS)
    kept = changed("default", keep="density", keep_value=1.0, **FREE)
    whole = prefill.run(tiny, context, kept, LIMITS, dense.logits)
    assert (whole.work.density, whole.work.executed) == (1.0, 1.0)
    assert (dense.work.density, dense.work.executed) == (None, 1.0)
    for ours, theirs in zip(whole.logits, dense.logits, strict=True):
        # Two orders of one sum in f32, as in hf_models.check_same.
        assert (ours - theirs).abs().max() <= 1.5e-4 * theirs.abs().max()
    for outcomes in whole.outcomes:
        assert [outcome.final for outcome in outcomes] == ["own", "dense"]
        assert all(outcome.kl < 1e-6 and outcome.flips == 0 for outcome in outcomes)


def test_answers_behind_a_shared_prefix_are_those_of_whole_prompts(tiny: Any) -> None:
    context = make("multikey-essay", tiny.codec, LENGTH, "0:0", 2)
    dense = prefill.run(tiny, context, methods()["dense"], LIMITS)
    tiny.model.set_attn_implementation("sdpa")
    for question, found, (outcome, *_) in zip(context.questions, dense.logits, dense.outcomes, strict=True):
        ids = torch.tensor([context.ids + question.tail + question.answer])
        with torch.no_grad():
            logits = tiny.model(ids).logits[0, -len(question.answer) - 1 : -1]
        assert (found - logits).abs().max() <= 1.5e-4 * logits.abs().max()
        wanted = torch.nn.functional.cross_entropy(logits, ids[0, -len(question.answer) :])
        assert outcome.nll == pytest.approx(float(wanted), rel=1e-3)
        prompt = ids[:, : -len(question.answer)]
        more = {"max_new_tokens": len(question.answer) + LIMITS.slack, "do_sample": False, "pad_token_id": 0}
        said = tiny.model.generate(prompt, attention_mask=torch.ones_like(prompt), **more)[0, prompt.shape[1] :]
        assert outcome.exact == (tuple(said.tolist()[: len(question.answer)]) == question.answer)


def test_less_is_read_and_the_answer_is_another(tiny: Any) -> None:
    context = make("single-essay", tiny.codec, LENGTH, "0:0")
    dense = prefill.run(tiny, context, methods()["dense"], LIMITS)
    sparse = prefill.run(
        tiny, context, changed("default", keep="density", keep_value=0.1, **FREE), LIMITS, dense.logits
    )
    assert 0.05 < sparse.work.density < 0.3
    assert sparse.work.density < sparse.work.executed < 1
    own, final = sparse.outcomes[0]
    assert own.kl > 1e-4
    assert own.nll != final.nll


def test_greedy_recall_is_generates_own(tiny: Any) -> None:
    """A model that has learnt one answer by heart says it; the references are then found, wherever it stands."""
    context = make("single-noise", tiny.codec, 600, "0:0")
    dense = prefill.run(tiny, context, methods()["dense"], LIMITS)
    (question,) = context.questions
    tiny.model.set_attn_implementation("sdpa")
    prompt = torch.tensor([context.ids + question.tail])
    count = len(question.answer) + LIMITS.slack
    more = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    said = tiny.model.generate(prompt, attention_mask=torch.ones_like(prompt), **more)[0, prompt.shape[1] :].tolist()
    # What it says anyway is made the reference: found, though the expected tokens are others.
    claimed = replace(question, references=(tiny.codec.decode(said)[-3:],))
    again = prefill.run(tiny, replace(context, questions=(claimed,)), methods()["dense"], LIMITS)
    assert not again.outcomes[0][0].exact
    assert (again.outcomes[0][0].recall, dense.outcomes[0][0].recall) == (1.0, 0.0)


def test_who_is_not_served_has_no_row_and_a_reason(tiny: Any, tmp_path: Path) -> None:
    table = methods()
    with pytest.raises(Refused, match="gates"):
        prefill.run(tiny, make("single-noise", tiny.codec, 600, "0:0"), table["attn_gate"], LIMITS)
    folder = Folder(tmp_path, facts(STUDY, tiny, "f32"))
    measure(STUDY, tiny, {LENGTH: [table["dense"], table["attn_gate"]]}, folder, Clock(0))
    assert "gates" in folder.gaps["attn_gate"]
    assert {r["method"] for r in folder.records} == {"dense"}
    (tmp_path / "out").mkdir()
    report.write(folder.records, facts(STUDY, tiny, "f32"), folder.gaps, tmp_path / "out")
    assert "`attn_gate`: its gates" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("name", sorted(set(methods()) - {"attn_gate", "dense"}))
def test_every_method_is_served_on_the_cpu(tiny: Any, name: str) -> None:
    context = make("single-noise", tiny.codec, 900, "0:0")
    # Blocks of 128 would leave nothing to choose from.
    small = changed(name) if name == "quoka" else changed(name, block_size=16)
    result = prefill.run(tiny, context, small, LIMITS)
    assert result.work.density is not None
    assert 0 < result.work.density <= 1


def test_two_methods_come_to_the_same_density(tiny: Any, tmp_path: Path) -> None:
    folder = Folder(tmp_path, facts(STUDY, tiny, "f32"))
    for name in ("sampled_exact-group", "flashprefill-union"):
        found = at_density(STUDY, tiny, changed(name, block_size=16), 0.4, LENGTH, folder)
        assert found.name == f"{name}@0.4"
        context = make("single-essay", tiny.codec, LENGTH, "1:1")
        assert prefill.run(tiny, context, found, LIMITS).work.density == pytest.approx(0.4, rel=0.25)
    assert set(json.loads((tmp_path / "keep.json").read_text())) == set(folder.keep)


def test_the_number_is_found_whichever_way_densities_run() -> None:
    table = methods()
    for name, density_at in (("default", lambda x: x**2), ("flashprefill-union", lambda x: 1 - x**0.5)):
        assert find_keep_value(table[name], 0.2, density_at)[1] == pytest.approx(0.2, rel=0.03)


def test_a_study_goes_on_where_it_stopped_and_repeats_a_row(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(model, "load", lambda *_: tiny)
    asked = f"--out {tmp_path} --lengths {LENGTH} --tasks single-noise,multikey-essay --contexts 1 --questions 2"
    asked += (
        f" --chunk {LIMITS.chunk} --dense-below {LIMITS.dense_below} --device cpu --methods dense,sampled_exact-group"
    )
    assert cli.main(asked.split()) == 0
    first = (tmp_path / "items.jsonl").read_text()
    # Three questions: dense once, the other with its own and a dense last chunk.
    assert len(first.splitlines()) == 3 * 3
    assert cli.main(asked.split()) == 0
    assert (tmp_path / "items.jsonl").read_text() == first
    assert cli.main([*asked.split()[:-1], "dense,streaming"]) == 0
    both = (tmp_path / "items.jsonl").read_text()
    assert both.startswith(first)
    assert len(both.splitlines()) == 3 * 5
    assert {p.name for p in tmp_path.iterdir()} >= {"report.csv", "report.md", f"report-{LENGTH}.svg", "study.json"}
    assert "| streaming | 3 (2) |" in (tmp_path / "report.md").read_text()
    assert cli.main([*asked.split(), "--repro", f"multikey-essay,{LENGTH},0,streaming"]) == 0
    wrong = both.replace('"nll": ', '"nll": 1')
    (tmp_path / "items.jsonl").write_text(wrong)
    assert cli.main([*asked.split(), "--repro", f"multikey-essay,{LENGTH},0,streaming"]) == 1
    assert cli.main([*asked.split(), "--seed", "5"]) == 2


def test_workers_share_a_study_of_a_checkpoint(tmp_path: Path, library: str | None, monkeypatch: Any) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    source, out = checkpoint(tmp_path / "model"), tmp_path / "out"
    asked = f"--model {source} --out {out} --lengths 900 --tasks single-noise --contexts 3 --chunk 256 --device cpu"
    asked += " --methods dense,default --density .5 --at-density default --workers 2"
    assert cli.main(asked.split() + (["--library", library] if library else [])) == 0
    records = [[json.loads(x) for x in (out / f"items{i}.jsonl").read_text().splitlines()] for i in ("", "-1")]
    # The second worker makes contexts 1, 3, ..: of three, one; each has dense, and two rows with two last chunks.
    assert [sorted({r["index"] for r in shard}) for shard in records] == [[0, 2], [1]]
    assert [len(shard) for shard in records] == [10, 5]
    found = json.loads((out / "keep.json").read_text())
    rows = [r for shard in records for r in shard if r["method"] == "default@0.5"]
    assert {r["keep_value"] for r in rows} == set(found.values())
    assert "| default@0.5 | 3 (3) |" in (out / "report.md").read_text()
    # A template's frame is found, and text comes back as it went.
    read = model.load(source, "cpu", "f32").codec
    assert read.frame == codec().frame
    assert read.decode(list(make("single-essay", read, 900, "0:0").ids)).startswith("U:Read the text")


def test_a_gguf_file_is_read_as_its_format_says(tmp_path: Path) -> None:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    fields = text("general.alignment") + struct.pack("<II", 4, 64)
    fields += text("words") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc")
    fields += text("kinds") + struct.pack("<IIQii", 9, 5, 2, 1, 3)
    infos = text("eight") + struct.pack("<IQQIQ", 2, 32, 1, 8, 0)
    infos += text("four") + struct.pack("<IQQIQ", 2, 32, 2, 3, 64) + text("odd") + struct.pack("<IQIQ", 1, 32, 12, 0)
    head = struct.pack("<4sIQQ", b"GGUF", 3, 3, 3) + fields + infos
    eight = struct.pack("<e32b", 0.5, *range(-16, 16))
    nibbles = [(15 - i) << 4 | i for i in range(16)]
    four = b"".join(struct.pack("<ee16B", scale, least, *nibbles) for scale, least in ((2.0, 1.0), (0.25, -3.0)))
    path = tmp_path / "x.gguf"
    path.write_bytes(head + b"\xff" * (-len(head) % 64) + eight.ljust(64, b"\xff") + four)
    file = gguf.Gguf(path)
    assert file.fields == {"general.alignment": 64, "words": ["a", "bc"], "kinds": [1, 3]}
    assert file.values("eight").tolist() == [[x / 2 for x in range(-16, 16)]]
    ramp = [*range(16), *range(15, -1, -1)]
    assert file.values("four").tolist() == [[2.0 * x + 1 for x in ramp], [0.25 * x - 3 for x in ramp]]
    with pytest.raises(ValueError, match="odd: wanted a kind"):
        file.values("odd")
    path.write_bytes(b"GGUX" + head[4:])
    with pytest.raises(ValueError, match="wanted GGUF version 3"):
        gguf.Gguf(path)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--methods dense,nobody", "nobody: wanted some of dense, default"),
        ("--tasks none-such", "none-such: wanted some of single-noise"),
        ("--repro single-noise,900,0,default@0.7", "default@0.7:900: "),
        ("--model /nowhere/model.gguf", "/nowhere/model.gguf"),
        ("", "is missing: `make test-candle` fetches it"),
    ],
)
def test_mistakes_are_one_line(more: str, said: str, tiny: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if more and "/nowhere" not in more:
        monkeypatch.setattr(model, "load", lambda *_: tiny)
        more += " --model here"
    assert cli.main(f"--out {tmp_path / 'out'} --device cpu {more}".split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("compactattn eval: ") and said in error
    assert error.count("\n") == 1


def test_time_ends_a_study(tiny: Any, tmp_path: Path) -> None:
    folder = Folder(tmp_path, facts(STUDY, tiny, "f32"))
    measure(STUDY, tiny, {LENGTH: [methods()["dense"]]}, folder, Clock(1e-9))
    assert not folder.records


def test_training_sequences_hold_every_answer_where_they_say() -> None:
    for task, questions, _ in finetune.MIX:
        ids, answers = finetune.sequence(task, codec(), 8000, Random(task), min(questions, 4))
        assert len(ids) == 8000
        said = codec().decode([ids[at] for at in answers])
        assert said.startswith(" ") and said.endswith(".")
        # The token before an answer is the last of its beginning: "... is" or "... are".
        assert codec().decode(ids[answers[0] - 3 : answers[0]]) in (" is", "are")


def test_an_adapter_learns_is_saved_and_merges_into_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "MIX", (("multikey-essay", 4, 1),))
    config = {"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    pupil = subject()
    finetune.rebase(pupil.model, config)
    recipe = finetune.Recipe(60.0, (finetune.Stage(1.0, 1200, 1),), rank=4, learning_rate=1e-2, warmup_steps=1, steps=6)
    path = tmp_path / "adapter.safetensors"
    losses = finetune.train(pupil, recipe, path, config)
    assert min(losses[3:]) < losses[0]
    assert lora.facts(path)["made"]["steps"] == 6
    ids = torch.tensor([codec().encode("The access code of Kumare is 12345")])
    merged = subject()
    finetune.rebase(merged.model, config)
    with torch.no_grad():
        before = merged.model(ids).logits
        lora.merge(merged.model, path)
        after, trained = merged.model(ids).logits, pupil.model(ids).logits
    # The file is bf16: 2^-9 of each update, which is a part of the logits itself.
    assert (after - trained).abs().max() <= 2**-7 * trained.abs().max()
    assert (after - before).abs().max() > 2**-5 * trained.abs().max()
    other = replace(pupil, model=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="other layers"):
        lora.merge(other.model, path)
