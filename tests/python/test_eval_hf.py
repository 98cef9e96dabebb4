"""The paired protocol end to end on a tiny random model: who is compared, what is counted, going on, repeating."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch and transformers: make test-hf")
pytest.importorskip("transformers", reason="needs torch and transformers: make test-hf")

from compactattn._stats import Stats  # noqa: E402
from compactattn.batch import Batch  # noqa: E402
from compactattn.eval import (  # noqa: E402
    cli,
    decode,
    finetune,
    gguf,
    lora,
    model,
    pool,
    prefill,
    probe,
    protocol,
    report,
)
from compactattn.eval.bench import Bench  # noqa: E402
from compactattn.eval.clock import Clock  # noqa: E402
from compactattn.eval.engine import Refused  # noqa: E402
from compactattn.eval.folder import Folder  # noqa: E402
from compactattn.eval.methods import find_keep_value, methods  # noqa: E402
from compactattn.eval.prefill import Limits, Work  # noqa: E402
from compactattn.eval.protocol import Rows, Run, Study, facts, measure  # noqa: E402
from compactattn.eval.tasks import make  # noqa: E402
from eval_models import checkpoint, codec, subject  # noqa: E402

LENGTH = 1200
LIMITS = Limits(chunk=256, dense_below=512, slack=2)
STUDY = Study(("single-noise", "multikey-essay"), (LENGTH,), 3, 0, 2, 0, LIMITS.dense_below, LIMITS.chunk, "all", 1)
FREE = {"block_size": 32, "min_density": 0.0, "max_density": 1.0, "density_guard": 1.0}


@pytest.fixture(scope="module")
def tiny() -> Any:
    return subject()


def changed(name: str, **changes: Any) -> Any:
    method = methods()[name]
    return replace(method, settings=method.settings.replace(**changes))


def one(tiny: Any, context: Any, method: Any, reference: Any = None) -> Any:
    return prefill.run(tiny, [context], method, LIMITS, reference)


def test_keeping_everything_is_dense_and_reads_everything(tiny: Any) -> None:
    context = make("multikey-essay", tiny.codec, LENGTH, "0:0", 2)
    dense = one(tiny, context, methods()["dense"])
    kept = changed("default", keep="density", keep_value=1.0, **FREE)
    whole = one(tiny, context, kept, dense.logits)
    assert (whole.work.density, whole.work.executed) == (1.0, 1.0)
    assert (dense.work.density, dense.work.executed) == (None, 1.0)
    # Two orders of one sum in f32, as in hf_models.check_same.
    assert (whole.logits - dense.logits).abs().max() <= 1.5e-4 * dense.logits.abs().max()
    for outcomes in whole.outcomes[0]:
        assert [outcome.final for outcome in outcomes] == ["own", "dense"]
        assert all(outcome.kl < 1e-6 and outcome.flips == 0 for outcome in outcomes)


def test_a_question_weighs_by_its_pairs() -> None:
    # A context of two spans of 1,024 behind 16 blocks of 64, of which .85 is read; a question of 30, of which .35 is.
    context, question = Work(past_pairs=2048 * 1024.0, other_pairs=2e6), Work(past_pairs=30 * 3072.0, other_pairs=500.0)
    context.read(Stats(candidates=7, selected=7), Stats(candidates=7 + 320, selected=7 + 272))
    question.read(Stats(), Stats(candidates=480, selected=168))
    both = context.plus(question, 1.0)
    read = 0.85 * 2048 * 1024 + 0.35 * 30 * 3072
    assert both.density == pytest.approx(read / (2048 * 1024 + 30 * 3072))
    assert both.executed == pytest.approx((read + 2e6 + 500) / (2048 * 1024 + 30 * 3072 + 2e6 + 500))
    # What no selection was asked for is read whole.
    context.read(Stats(), Stats())
    assert context.density == 1.0


def test_every_chunk_is_weighed_by_its_pairs(tiny: Any, monkeypatch: Any) -> None:
    context, shares, steps = make("multikey-essay", tiny.codec, LENGTH, "0:0", 2), (1.0, 0.9, 0.8, 0.7, 0.6, 0.1), []
    run = tiny.engine.run

    def stats(_: Any) -> Stats:
        # As much to choose from in every step, whatever its size.
        return Stats(candidates=1000 * len(steps), selected=round(1000 * sum(shares[: len(steps)])))

    monkeypatch.setattr(tiny.engine, "stats", stats)
    monkeypatch.setattr(tiny.engine, "run", lambda step, *told: steps.append(step) or run(step, *told))
    found = one(tiny, context, changed("default", **FREE)).work
    chunks = list(zip(range(256, LENGTH, 256), shares[1:5], strict=True))
    pairs = [(first * min(256, len(context.ids) - first), share) for first, share in chunks]
    # Half of both questions, as each is a prompt of its own.
    pairs += [(len(context.ids) // 32 * 32 * len(q.tail) / 2, shares[5]) for q in context.questions]
    assert found.density == pytest.approx(sum(x * share for x, share in pairs) / sum(x for x, _ in pairs))
    n, tails = len(context.ids), [len(q.tail) for q in context.questions]
    every = n * (n + 1) / 2 + sum(tail * n + tail * (tail + 1) / 2 for tail in tails) / 2
    assert found.past_pairs + found.other_pairs == every
    assert found.executed == pytest.approx(1 - sum(x * (1 - share) for x, share in pairs) / every)


def test_answers_behind_a_shared_prefix_are_those_of_whole_prompts(tiny: Any) -> None:
    contexts = [make("multikey-essay", tiny.codec, LENGTH, f"0:{i}", 1 + i) for i in range(2)]
    dense = prefill.run(tiny, contexts, methods()["dense"], LIMITS)
    tiny.model.set_attn_implementation("sdpa")
    found, outcomes = dense.logits, [outcome for several in dense.outcomes for outcome, *_ in several]
    asked = [(context, question) for context in contexts for question in context.questions]
    for (context, question), outcome in zip(asked, outcomes, strict=True):
        ids = torch.tensor([context.ids + question.tail + question.answer])
        with torch.no_grad():
            logits = tiny.model(ids).logits[0, -len(question.answer) - 1 : -1]
        own, found = found[: len(logits)], found[len(logits) :]
        assert (own - logits).abs().max() <= 1.5e-4 * logits.abs().max()
        wanted = torch.nn.functional.cross_entropy(logits, ids[0, -len(question.answer) :])
        assert outcome.nll == pytest.approx(float(wanted), rel=1e-3)
        assert outcome.exact == (tuple(logits.argmax(-1).tolist()) == question.answer)
    assert not len(found)


def test_neighbours_in_a_step_change_nothing(tiny: Any) -> None:
    """Selection and attention to the last bit; the model's own products may sum rows of another count otherwise."""
    contexts = [make("multikey-essay", tiny.codec, LENGTH, f"0:{i}", 1 + i) for i in range(3)]
    sparse = changed("default", keep="density", keep_value=0.2, **FREE)
    together = prefill.run(tiny, contexts, sparse, LIMITS)
    engine, found = tiny.engine, together.logits
    read = 0.0
    for i, context in enumerate(contexts):
        alone = one(tiny, context, sparse)
        own, found = found[: len(alone.logits)], found[len(alone.logits) :]
        assert (own - alone.logits).abs().max() <= 1.5e-4 * own.abs().max()
        assert [o.recall for q in alone.outcomes[0] for o in q] == [o.recall for q in together.outcomes[i] for o in q]
        read += alone.work.read_pairs
    assert together.work.read_pairs == pytest.approx(read, rel=0.02)
    # One layer, from the same numbers: three requests in a step, and each by itself.
    engine.reserve(3 * LENGTH + 3 * pool.PAGE)
    torch.manual_seed(0)
    engine.pool.kv.normal_()
    sequences = [pool.Sequence(engine.pool.take(LENGTH), LENGTH - 256 - i) for i in range(3)]
    step = pool.Step.of([(x, [0] * (250 + i)) for i, x in enumerate(sequences)], "cpu")
    q = torch.randn(len(step.slots), 4, 64)
    settings = sparse.settings.replace(dense_below_kv_len=LIMITS.dense_below)

    def attended(rows: slice, reqs: slice) -> Any:
        out = torch.full_like(q[rows], float("nan"))
        ends = step.cu_seqlens_q[reqs.start : reqs.stop + 1]
        given = step.table[reqs], step.seq_lens[reqs], ends - ends[0]
        engine.forward(Batch.of(q[rows], *engine.pool.kv[:, 0], *given), settings, 0.125, out)
        return out

    whole, ends = attended(slice(0, len(q)), slice(0, 3)), step.cu_seqlens_q.tolist()
    for i in range(3):
        rows = slice(ends[i], ends[i + 1])
        assert torch.equal(whole[rows], attended(rows, slice(i, i + 1)))


def test_pages_are_shared_up_to_the_last_one(tiny: Any) -> None:
    tiny.engine.reserve(8 * pool.PAGE)
    own = tiny.engine.pool
    first = pool.Sequence(own.take(2 * pool.PAGE + 1), 2 * pool.PAGE + 1)
    fresh = own.take(pool.PAGE)
    forked = first.fork(fresh)
    assert forked.pages.tolist() == [*first.pages[:2].tolist(), *fresh.tolist()]
    own.kv.normal_()
    own.copy([int(first.pages[2])], [int(fresh[0])])
    assert torch.equal(own.kv[:, :, first.pages[2]], own.kv[:, :, fresh[0]])
    assert forked.slots(2 * pool.PAGE, 2).tolist() == [fresh[0] * pool.PAGE, fresh[0] * pool.PAGE + 1]
    with pytest.raises(ValueError, match="pages wanted of"):
        own.take(own.pages * pool.PAGE)


def test_less_is_read_and_the_answer_is_another(tiny: Any) -> None:
    context = make("single-essay", tiny.codec, LENGTH, "0:0")
    dense = one(tiny, context, methods()["dense"])
    sparse = one(tiny, context, changed("default", keep="density", keep_value=0.1, **FREE), dense.logits)
    assert 0.05 < sparse.work.density < 0.3
    assert sparse.work.density < sparse.work.executed < 1
    own, final = sparse.outcomes[0][0]
    assert own.kl > 1e-4
    assert own.nll != final.nll


def test_greedy_answers_are_generates_own(tiny: Any) -> None:
    """What the model says anyway is made the reference: found, though the expected tokens are others."""
    contexts = [make("single-noise", tiny.codec, 600, f"0:{i}") for i in range(2)]
    dense = prefill.run(tiny, contexts, methods()["dense"], LIMITS)
    tiny.model.set_attn_implementation("sdpa")
    claimed = []
    for context in contexts:
        (question,) = context.questions
        prompt = torch.tensor([context.ids + question.tail])
        more = {"max_new_tokens": len(question.answer) + LIMITS.slack, "do_sample": False, "pad_token_id": 0}
        said = tiny.model.generate(prompt, attention_mask=torch.ones_like(prompt), **more)[0, prompt.shape[1] :]
        text = tiny.codec.decode(said.tolist())
        claimed.append(replace(context, questions=(replace(question, references=(text.lower()[-3:], "none such")),)))
    again = prefill.run(tiny, claimed, methods()["dense"], LIMITS)
    for ((then, *_),), ((now, *_),) in zip(dense.outcomes, again.outcomes, strict=True):
        assert not now.exact
        assert (now.recall, then.recall) == (0.5, 0.0)


def test_decoding_several_is_generate(tiny: Any) -> None:
    prompts = [make("single-noise", tiny.codec, size, "0:0").ids for size in (600, 450)]
    more = {"max_new_tokens": 13, "do_sample": False, "pad_token_id": 0}
    tiny.model.set_attn_implementation("sdpa")
    given = [torch.tensor([ids]) for ids in prompts]
    wanted = [tiny.model.generate(x, attention_mask=torch.ones_like(x), **more)[0, x.shape[1] :] for x in given]
    engine = tiny.engine
    engine.reserve(20 * pool.PAGE)
    sequences = [pool.Sequence(engine.pool.take(len(ids) + 20)) for ids in prompts]
    step = pool.Step.of(list(zip(sequences, prompts, strict=True)), "cpu")
    first = engine.run(step, methods()["dense"].settings).argmax(-1).tolist()
    behind = decode.greedy(engine, sequences, first, [12, 12])
    for token, said, want in zip(first, behind, wanted, strict=True):
        assert [token, *said][: len(want)] == want.tolist()


def test_decoding_ends_with_the_text(tiny: Any, monkeypatch: Any) -> None:
    tiny.engine.reserve(4 * pool.PAGE)
    said = [decode.greedy(tiny.engine, [pool.Sequence(tiny.engine.pool.take(40))], [7], [n])[0] for n in (1, 20)]
    assert (len(said[0]), len(said[1])) == (1, 20)
    monkeypatch.setattr(decode, "ends_of", lambda _: {said[1][0]})
    (ended,) = decode.greedy(tiny.engine, [pool.Sequence(tiny.engine.pool.take(40))], [7], [20])
    # A look comes every eight steps.
    assert ended == said[1][:8]


def test_who_is_not_served_has_no_row_and_a_reason(tiny: Any, tmp_path: Path) -> None:
    table = methods()
    with pytest.raises(Refused, match="gates"):
        one(tiny, make("single-noise", tiny.codec, 600, "0:0"), table["attn_gate"])
    folder = Folder(tmp_path, facts(STUDY, tiny, "f32"))
    measure(Run(STUDY, tiny, folder, Clock(0)), {LENGTH: Rows(table["dense"], [table["attn_gate"]], [])})
    assert "gates" in folder.gaps[f"attn_gate:{LENGTH}"]
    assert {r["method"] for r in folder.records} == {"dense"}
    report.write(folder, tmp_path / "other")
    assert f"`attn_gate:{LENGTH}`: its gates" in (tmp_path / "other.md").read_text()


def test_a_row_can_be_another_with_settings_changed() -> None:
    name = "default:query_span=512+keep_value=0.9+mean_correction=true"
    changed = methods([name])[name].settings
    assert (changed.query_span, changed.keep_value, changed.mean_correction) == (512, 0.9, True)
    assert changed.replace(query_span=1024, keep_value=0.95, mean_correction=False) == methods()["default"].settings
    for wrong in ("default:span=512", "default:mean_correction=1", "default:query_span=half"):
        with pytest.raises(ValueError):
            methods([wrong])
    assert "nobody:query_span=512" not in methods(["nobody:query_span=512"])


@pytest.mark.parametrize("name", sorted(set(methods()) - {"attn_gate", "dense"}))
def test_every_method_is_served_on_the_cpu(tiny: Any, name: str) -> None:
    context = make("single-noise", tiny.codec, 900, "0:0")
    # Blocks of 128 would leave nothing to choose from.
    small = changed(name) if name == "quoka" else changed(name, block_size=16)
    result = one(tiny, context, small)
    assert result.work.density is not None
    assert 0 < result.work.density <= 1


def test_quoka_in_torch_is_the_librarys(tiny: Any, monkeypatch: Any) -> None:
    contexts = [make("multikey-essay", tiny.codec, LENGTH, f"0:{i}", 1 + i) for i in range(2)]
    theirs = prefill.run(tiny, contexts, methods()["quoka"], LIMITS)
    monkeypatch.setattr(tiny.engine, "torch_quoka", True)
    ours = prefill.run(tiny, contexts, methods()["quoka"], LIMITS, theirs.logits)
    assert ours.work == theirs.work
    # As above; the lists are the same, but for ties.
    assert (ours.logits - theirs.logits).abs().max() <= 1.5e-4 * theirs.logits.abs().max()
    dense = one(tiny, contexts[0], methods()["dense"])
    assert (dense.logits - ours.logits[: len(dense.logits)]).abs().max() > 0.1 * dense.logits.abs().max()


def test_two_methods_come_to_the_same_density(tiny: Any, tmp_path: Path) -> None:
    folder = Folder(tmp_path, facts(STUDY, tiny, "f32"))
    bench = Bench(STUDY, tiny, LENGTH, folder)
    found = [bench.at_density(changed(x, block_size=16), 0.4) for x in ("sampled_exact-group", "flashprefill-union")]
    assert [row.name for row in found] == ["sampled_exact-group@0.4", "flashprefill-union@0.4"]
    for row in found:
        context = make("single-essay", tiny.codec, LENGTH, "1:1")
        assert one(tiny, context, row).work.density == pytest.approx(0.4, rel=0.25)
    assert set(json.loads((tmp_path / "notes.json").read_text())["keep"]) == set(folder.keep)


def test_a_probe_sees_what_lists_miss(tiny: Any) -> None:
    contexts = [make("single-essay", tiny.codec, LENGTH, "0:0")]
    sample = probe.Sample(tiny, contexts, LIMITS)
    whole = sample.line(changed("default", keep="density", keep_value=1.0, **FREE))
    assert (whole["density"], whole["executed"]) == (1.0, 1.0)
    assert max(whole["error"]) < 1e-5 and min(whole["mass"]) > 1 - 1e-5
    half = sample.line(changed("default", keep="density", keep_value=0.5, **FREE))
    less = sample.line(changed("default", keep="density", keep_value=0.1, **FREE))
    exact = sample.line(changed("oracle", keep="density", keep_value=0.5, **FREE))
    for layer in range(2):
        assert 0.4 < half["density"] <= half["mass"][layer] <= exact["mass"][layer] + 1e-3 < 1
        assert less["mass"][layer] < half["mass"][layer]
        assert less["error"][layer] > half["error"][layer] > 0.01
    corrected = sample.line(changed("default", keep="density", keep_value=0.5, mean_correction=True, **FREE))
    # The same lists; what they miss is made up for in part.
    assert corrected["mass"] == pytest.approx(half["mass"])
    assert corrected["error"] != half["error"]


def test_the_number_is_found_whichever_way_densities_run() -> None:
    table = methods()
    for name, density_at in (("default", lambda x: x**2), ("flashprefill-union", lambda x: 1 - x**0.5)):
        assert find_keep_value(table[name], 0.2, density_at)[1] == pytest.approx(0.2, rel=0.03)


def test_a_study_goes_on_where_it_stopped_and_repeats_a_row(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(model, "load", lambda *_: tiny)
    asked = f"--out {tmp_path} --lengths {LENGTH} --tasks single-noise,multikey-essay --items 3 --batch 2 --questions 2"
    asked += f" --chunk {LIMITS.chunk} --dense-below {LIMITS.dense_below} --device cpu --model here --no-probe"
    asked += " --main sampled_exact-group --methods dense,sampled_exact-group"
    assert cli.main(asked.split()) == 0
    first = (tmp_path / "items.jsonl").read_text()
    # One round: two contexts of each task, through two rows.
    assert len(first.splitlines()) == 2 * 2 * 2
    assert cli.main(asked.split()) == 0
    assert (tmp_path / "items.jsonl").read_text() == first
    # A line that a kill has cut off is made again.
    (tmp_path / "items.jsonl").write_text(first + first[:50])
    assert cli.main([*asked.split()[:-1], "dense,streaming"]) == 0
    both = (tmp_path / "items.jsonl").read_text()
    assert both.startswith(first)
    assert len(both.splitlines()) == 2 * 2 * 3
    assert {p.name for p in tmp_path.iterdir()} == {
        *(f"report{end}" for end in (".csv", ".md", ".svg", "-layers.csv")),
        *("items.jsonl", "study.json", "notes.json"),
    }
    assert "| streaming | 6 (4) |" in (tmp_path / "report.md").read_text()
    record = tmp_path / "of" / "record"
    record.parent.mkdir()
    assert cli.main(["--out", str(tmp_path), "--report", "--record", str(record)]) == 0
    assert record.with_suffix(".md").read_text() == (tmp_path / "report.md").read_text()
    assert str(tmp_path) not in record.with_suffix(".md").read_text()
    assert cli.main([*asked.split(), "--repro", f"multikey-essay,{LENGTH},1,streaming"]) == 0
    wrong = both.replace('"executed":', '"executed":1')
    (tmp_path / "items.jsonl").write_text(wrong)
    assert cli.main([*asked.split(), "--repro", f"multikey-essay,{LENGTH},1,streaming"]) == 1
    assert cli.main([*asked.split(), "--seed", "5"]) == 2


def test_a_study_of_a_checkpoint_with_a_few_items_of_some_rows(tmp_path: Path) -> None:
    source, out = checkpoint(tmp_path / "model"), tmp_path / "out"
    asked = f"--model {source} --out {out} --lengths 900,1000 --tasks single-noise --items 3 --few 1 --chunk 256"
    asked += " --device cpu --methods dense,default,streaming --density .5 --at-density default"
    assert cli.main(asked.split()) == 0
    lines = [json.loads(x) for x in (out / "items.jsonl").read_text().splitlines()]
    # Main rows first, all lengths along with one another; then the others, behind a dense that is not written again.
    assert [x["length"] for x in lines if x["method"] == "dense"] == [900, 1000] * 3
    names = [line["method"] for line in lines]
    assert names == [*["dense", "default", "default@0.5"] * 6, "streaming", "streaming"]
    kept = json.loads((out / "notes.json").read_text())["keep"]
    assert {x["keep_value"] for x in lines if x["method"] == "default@0.5"} == {
        float(f"{x:.5g}") for x in kept.values()
    }
    text = (out / "report.md").read_text()
    assert "| default@0.5 | 3 (3) |" in text
    assert "| default~6 |" in text
    # A template's frame is found, and text comes back as it went.
    read = model.load(source, "cpu", "f32").codec
    assert read.frame == codec().frame
    assert read.decode(list(make("single-essay", read, 900, "0:0").ids)).startswith("U:Read the text")


def test_contexts_made_by_other_processes_are_the_same(tiny: Any) -> None:
    groups = [list(protocol._made(STUDY, tiny.codec, processes)) for processes in (0, 2)]
    assert groups[0] == groups[1]
    assert len(groups[0]) == 4


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
    folder, rows = Folder(tmp_path, facts(STUDY, tiny, "f32")), Rows(methods()["dense"], [], [])
    measure(Run(STUDY, tiny, folder, Clock(1e-9)), {LENGTH: rows})
    assert not folder.records


def test_a_batch_is_begun_only_if_all_its_rows_have_time(monkeypatch: Any) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    clock = Clock(100.0, 30.0)
    for row in ("a", "b"):
        clock.note(8, row, 20.0)
    assert clock.has_time(8, ["a", "b"])
    now = 61.0
    assert clock.has_time(8, ["a"]) and not clock.has_time(8, ["a", "b"])
    assert clock.may(8, "a")
    clock.note(8, "a", 10.0)
    assert not clock.may(8, "a") and clock.may(9, "a")


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
