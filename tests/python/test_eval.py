"""Prompts with exact answers, and the statistics of pairs, against counting by brute force. Needs no torch."""

from __future__ import annotations

import csv
import re
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
from compactattn.eval import cli, layers, plot, words
from compactattn.eval.folder import Folder
from compactattn.eval.report import BY_PAIRS, rows, write
from compactattn.eval.statistics import mcnemar, paired_interval
from compactattn.eval.tasks import SEVERAL, TASKS, Context, make
from eval_models import Bytes, codec

CODEC = codec()
LENGTH = 6000
RECORD = Path(__file__).parents[1] / "bench/record/h100"


def text_of(context: Context) -> str:
    return Bytes().decode(list(context.ids))


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_is_its_seeds_and_fills_its_length(task: str) -> None:
    first, again, other = (make(task, CODEC, LENGTH, seed) for seed in ("0:1", "0:1", "0:2"))
    assert first == again
    assert first.ids != other.ids
    whole = len(first.ids) + max(len(q.tail) + len(q.answer) for q in first.questions)
    # Which words lead is known only when the text stands: they may be longer than those it was fitted for.
    assert whole == LENGTH or (task == "frequent-words" and abs(whole - LENGTH) < 30)


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_is_its_references(task: str) -> None:
    (question,) = make(task, CODEC, LENGTH, "0:0").questions
    said = Bytes().decode(list(question.answer))
    assert said == " " + ", ".join(question.references)


@pytest.mark.parametrize("task", ["single-noise", "single-essay", "single-uuid", "multikey-essay", "multikey-uuid"])
def test_a_needle_says_the_answer_once_and_of_this_key(task: str) -> None:
    context = make(task, CODEC, LENGTH, "0:3")
    (question,) = context.questions
    key = Bytes().decode(list(question.tail)).split("access code of ")[1].split("?")[0]
    assert text_of(context).count(f"The access code of {key} is {question.references[0]}.") == 1
    assert text_of(context).count(f"access code of {key} ") == 1


@pytest.mark.parametrize("task", SEVERAL)
def test_several_questions_ask_for_different_things_of_one_text(task: str) -> None:
    context = make(task, CODEC, LENGTH, "0:0", questions=3)
    assert len({question.answer for question in context.questions}) == 3
    for question in context.questions:
        for reference in question.references:
            assert reference in text_of(context)


def test_variables_are_traced_from_the_text_alone() -> None:
    context = make("tracking", CODEC, LENGTH, "0:0", questions=2)
    value_of: dict[str, str] = {}
    for sentence in text_of(context).split("."):
        words_of = sentence.split()
        if words_of[:1] == ["Let"]:
            value_of[words_of[1]] = value_of.get(words_of[-1], words_of[-1])
    for question in context.questions:
        asked = Bytes().decode(list(question.tail)).split("Which variables are ")[1].split(",")[0]
        assert tuple(name for name, value in value_of.items() if value == asked) == question.references


def test_two_hops_are_followed_through_the_text_alone() -> None:
    context = make("two-hop", CODEC, LENGTH, "0:0", questions=3)
    text = text_of(context)
    for question in context.questions:
        key = Bytes().decode(list(question.tail)).split(" is also")[0].strip()
        alias = text.split(f"{key} is also called ")[1].split(".")[0]
        assert text.split(f"The access code of {alias} is ")[1][:7] == question.references[0]
        # One hop alone does not reach it.
        assert f"code of {key} is" not in text


@pytest.mark.parametrize(("task", "count"), [("common-words", 10), ("frequent-words", 3)])
def test_the_words_asked_for_lead_by_count(task: str, count: int) -> None:
    context = make(task, CODEC, 3 * LENGTH, "0:0")
    counts: dict[str, int] = {}
    for word in text_of(context).partition("\n\n")[2].split():
        counts[word] = counts.get(word, 0) + 1
    leaders = sorted(counts, key=lambda word: -counts[word])[: count + 1]
    assert counts[leaders[count - 1]] > counts[leaders[count]]
    assert set(leaders[:count]) == set(context.questions[0].references)


def test_the_question_stands_where_its_task_says() -> None:
    for task, place in (("question-first", 0.0), ("question-middle", 0.5)):
        text = text_of(make(task, CODEC, LENGTH, "0:0"))
        assert abs(text.index("Answer this question") / len(text) - place) < 0.15


def test_names_stay_different() -> None:
    assert len(set(words.names(Random(0), 500))) == 500


def test_mcnemar_is_the_share_of_coin_throws_as_lopsided() -> None:
    for lost, won in product(range(6), range(6)):
        throws = list(product((0, 1), repeat=lost + won))
        as_lopsided = [t for t in throws if abs(2 * sum(t) - len(t)) >= abs(lost - won)]
        assert mcnemar(lost, won) == pytest.approx(len(as_lopsided) / len(throws))
    # By hand: 2 * (1 + 5) / 2^5.
    assert mcnemar(1, 4) == 0.375
    # 2^1200 is no float.
    assert mcnemar(600, 600) == 1.0


def test_the_interval_is_that_of_all_resamples() -> None:
    values = [0.0, 1.0, -1.0, 3.0, 0.5]
    means = sorted(sum(draw) / 5 for draw in product(values, repeat=5))
    found = paired_interval(values, range(5), resamples=200_000)
    assert found.mean == pytest.approx(0.7)
    # 3,125 resamples: a step of the percentile's neighbourhood, and the sampling error of 200,000, within 0.05.
    assert found.low == pytest.approx(means[round(0.025 * 3124)], abs=0.05)
    assert found.high == pytest.approx(means[round(0.975 * 3124)], abs=0.05)


def test_items_of_one_context_stay_together() -> None:
    together = paired_interval([1.0, 1.0, -1.0, -1.0] * 2, ["a", "a", "b", "b"] * 2)
    # Two contexts: both means are reached by drawing one of them twice, a quarter of all draws each.
    assert (together.low, together.high) == (-1.0, 1.0)
    apart = paired_interval([1.0, 1.0, -1.0, -1.0] * 2, range(8))
    assert apart.high < 1.0


def test_nothing_to_take_a_mean_of_is_said() -> None:
    with pytest.raises(ValueError, match="no items"):
        paired_interval([], [])


def record(task: str, index: int, method: str, recall: float, final: str = "own") -> dict[str, object]:
    head = {"length": 100, "task": task, "index": index, "question": 0, "method": method, "final": final}
    return head | {"recall": recall, "nll": 1.0, "kl": 0.0, "flips": 0.0, "density": 0.5, "executed": 0.6}


def test_a_row_pairs_with_dense_and_names_its_worst_task() -> None:
    records = [record("easy", i, "dense", 1.0) for i in range(4)] + [record("hard", i, "dense", 0.0) for i in range(4)]
    records += [record("easy", i, "ours", float(i > 0)) for i in range(4)]
    records += [record("hard", i, "ours", float(i == 0)) for i in range(4)]
    records += [record("easy", i, "ours", 1.0, "dense") for i in range(4)]
    # Dense never met this one: it is no pair.
    records.append(record("easy", 9, "ours", 0.0))
    row = next(r for r in rows(records) if (r.scope, r.method) == ("all tasks", "ours"))
    assert (row.items, row.contexts, row.lost, row.won, row.p) == (8, 8, 1, 1, 1.0)
    assert (row.accuracy, row.difference.mean, row.dense_final) == (0.5, 0.0, 1.0)
    assert (row.worst, row.worst_difference) == ("easy", -25.0)
    able = next(r for r in rows(records) if (r.scope, r.method) == ("able tasks", "ours"))
    assert (able.items, able.accuracy, able.dense_accuracy) == (4, 0.75, 1.0)
    fewer = [r for r in records if r["method"] == "dense" or r["task"] == "easy"]
    row = next(r for r in rows(fewer) if (r.scope, r.method) == ("all tasks", "ours"))
    # Dense is 50 % on all it has, and here stands for what both have.
    assert (row.items, row.accuracy, row.dense_accuracy) == (4, 0.75, 1.0)


def test_a_report_says_which_runs_pooled_the_questions(tmp_path: Path) -> None:
    folder = Folder(tmp_path, {"model": "tiny"})
    # A line and a run of before: they are read as they stand.
    answers = [[0, "own", 1.0, True, 1.0, 0.0, 0.0]]
    line = {"length": 100, "task": "easy", "index": 0, "method": "dense", "density": None, "executed": 0.7}
    folder.add([line | {"keep_value": 0.9, "seconds": 1.0, "answers": answers}])
    folder.begin({"command": "compactattn eval"})
    again = Folder(tmp_path, None)
    text = write(again, tmp_path / "report")[1].read_text()
    assert "pooled the questions' own chunks" in text and "| dense | 0.700 |" in text
    folder.runs[:] = [{"command": "compactattn eval", "density": BY_PAIRS}]
    assert "pooled" not in write(folder, tmp_path / "report")[1].read_text()


def test_a_torn_line_goes_and_the_others_stay_where_they_are(tmp_path: Path, monkeypatch: Any) -> None:
    folder, path = Folder(tmp_path, {"model": "tiny"}), tmp_path / "items.jsonl"
    lines = [{"length": 100, "task": "easy", "index": i, "method": "dense", "answers": []} for i in range(3)]
    folder.add(lines[:2])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"length":100,"ta')
    again = Folder(tmp_path, None)
    assert again.lines == lines[:2]

    def never(*_: Any) -> None:
        raise AssertionError("written anew: a kill here would lose every line")

    monkeypatch.setattr(Path, "write_text", never)
    monkeypatch.setattr(Path, "write_bytes", never)
    again.add(lines[2:])
    assert path.read_bytes().startswith(whole)
    assert Folder(tmp_path, None).lines == lines
    # The first line of all may be the torn one.
    with path.open("wb") as file:
        file.write(b"{")
    again.add(lines[:1])
    assert Folder(tmp_path, None).lines == lines[:1]


def test_a_report_of_no_study_makes_nothing(tmp_path: Path, capsys: Any) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for path in (tmp_path / "typo", empty):
        assert cli.main(["--out", str(path), "--report"]) == 2
        assert f"{path}: wanted the --out of a study" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [empty] and not list(empty.iterdir())


def probed(method: str, density: float, error: float) -> dict[str, object]:
    return {"method": method, "density": density, "executed": 1.1 * density, "error": [error / 2, 3 * error / 2]}


def test_density_at_equal_error_lies_on_our_curve() -> None:
    curve = [probed("default~0", 0.4, 0.01), probed("default~1", 0.2, 0.04), probed("default", 0.3, 9.0)]
    # Halfway between in the logarithm of the error, whatever the layers' share of it.
    density, executed = layers.ours_at(curve, [0.01, 0.03])
    assert (density, executed) == (pytest.approx(0.3), pytest.approx(0.33))
    assert layers.ours_at(curve, [0.05]) is None
    assert layers.ours_at(curve[:1], [0.01]) is None


def test_the_share_of_the_unions_pages_is_at_equal_error() -> None:
    union = [probed(f"{layers.FAITHFUL}~{i}", *at) for i, at in enumerate(((0.8, 0.01), (0.4, 0.05), (0.2, 0.09)))]
    # Halfway in error is halfway in density, 0.6 and 0.3; the union's own rows at their numbers are no points of it.
    probes = [*union, probed(layers.FAITHFUL, 0.1, 0.03)]
    assert layers.share_of_union(probes, probed("default", 0.3, 0.03)) == pytest.approx(0.5)
    assert layers.share_of_union(probes, probed("default@0.2", 0.2, 0.07)) == pytest.approx(2 / 3)
    for outside in (0.009, 0.091):
        assert layers.share_of_union(probes, probed("default", 0.3, outside)) is None
    corrected = probed("default", 0.3, 0.03) | {"mean_correction": True}
    assert (layers.corrects(corrected), layers.corrects(probed("default", 0.3, 0.03))) == (True, False)
    for other in (f"{layers.FAITHFUL}@0.2", "default~3"):
        assert layers.share_of_union(probes, probed(other, 0.3, 0.03)) is None


def test_the_report_says_the_shares_of_the_record() -> None:
    with (RECORD / "2026-11-23-eval-layers.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    probes: dict[tuple[str, str], dict[str, Any]] = {}
    for line in lines:
        numbers = {name: float(line[name]) for name in ("density", "executed")} | {"keep_value": 0.0, "contexts": 3}
        fresh = {"length": int(line["length"]), "method": line["method"], "mass": [], "error": [], **numbers}
        own = probes.setdefault((line["length"], line["method"]), fresh)
        own["mass"].append(float(line["mass"]))
        own["error"].append(float(line["error"]))
    shares = {}
    for length in (8192, 16384, 32768):
        text = layers.tables(list(probes.values()), length)
        cells = [row.strip("| ").split(" | ") for row in text[text.index(layers._SHARE_HEAD[0]) + 2 :] if row]
        shares[length] = {row[0].strip("*"): (row[1].strip() == "yes", row[-1]) for row in cells}
    # What docs/accuracy.md says.
    assert [shares[at]["default"] for at in shares] == [(False, "0.53"), (False, "0.52"), (False, "0.51")]
    at_20 = [shares[at][f"{layers.OURS_WITH_MEANS}@0.2"] for at in shares]
    assert at_20 == [(True, "0.48"), (True, "0.50"), (True, "0.50")]
    assert [shares[at]["default@0.2"] for at in shares] == [(False, "0.55"), (False, "0.59"), (False, "0.56")]
    # The union's curve ends before that error.
    assert "sampled_exact-group@0.2" not in shares[8192]


def test_marks_of_the_plot_are_distinct_by_method() -> None:
    bases = [f"method-{i}" for i in range(18)]
    points = [plot.Point(name + at, 9, 30.0, -1.0, -2.0, 0.0) for name in bases for at in ("", "@0.2")]
    drawn = plot.scatter("8192 tokens", points)
    marks = re.findall(
        r'<path transform="[^"]*" (d="[^"]*") stroke="(#[0-9a-f]{6})"[^>]* fill="([^"]*)"><title>', drawn
    )
    assert len(marks) == len(set(marks)) == 36
    # A method has one colour and outline, of its own; what was asked for a density is hollow.
    assert len({colour for _, colour, _ in marks}) == 18
    assert all(own[:2] == asked[:2] and asked[2] == "white" for own, asked in zip(marks[::2], marks[1::2], strict=True))
    assert len({plot.style(i) for i in range(60)}) == 60
