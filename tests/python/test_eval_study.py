"""A study's rows: which are due, which are not there and why, what the next run brings; on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch and transformers: make test-hf")
pytest.importorskip("transformers", reason="needs torch and transformers: make test-hf")

from compactattn.eval import cli, model, prefill, probe, protocol  # noqa: E402
from compactattn.eval.bench import Bench  # noqa: E402
from compactattn.eval.clock import Clock  # noqa: E402
from compactattn.eval.engine import Refused  # noqa: E402
from compactattn.eval.folder import Folder  # noqa: E402
from compactattn.eval.methods import methods  # noqa: E402
from compactattn.eval.protocol import Rows, Run, Study, facts, measure  # noqa: E402
from eval_models import subject  # noqa: E402

LENGTHS = (900, 1000)
STUDY = Study(("single-noise",), LENGTHS, 4, 0, 1, 0, 512, 256, "none", 2)


@pytest.fixture(scope="module")
def tiny() -> Any:
    return subject()


def rows() -> dict[int, Rows]:
    table = methods()
    return {length: Rows(table["dense"], [table["default"]], [table["streaming"]]) for length in LENGTHS}


def go(tiny: Any, path: Path, clock: Clock | None = None) -> Folder:
    folder = Folder(path, facts(STUDY, tiny, "f32"))
    measure(Run(STUDY, tiny, folder, clock or Clock(0)), rows())
    return Folder(path, None)


def held(folder: Folder) -> dict[str, int]:
    """How many contexts of each row and length."""
    found: dict[str, int] = {}
    for line in folder.lines:
        key = f"{line['method']}:{line['length']}"
        found[key] = found.get(key, 0) + 1
    return found


ALL = {f"{row}:{length}": 4 for row in ("dense", "default", "streaming") for length in LENGTHS}


def test_a_batch_that_a_kill_has_cut_is_made_whole(tiny: Any, tmp_path: Path) -> None:
    whole = go(tiny, tmp_path)
    assert held(whole) == ALL
    path = tmp_path / "items.jsonl"
    kept = [x for x in path.read_text().splitlines(True) if '"index":1,' not in x or '"method":"default"' not in x]
    assert len(kept) == 22
    path.write_text("".join(kept))
    again = go(tiny, tmp_path)
    assert held(again) == ALL
    # What was there is as it was.
    assert path.read_text().startswith("".join(kept))


def failing(monkeypatch: Any, errors: dict[tuple[str, int], Exception], after: int = 0) -> list[tuple[str, int]]:
    """Batches of these rows and lengths fail, from the so manieth on; which batches were tried."""
    run, tried = prefill.run, list[tuple[str, int]]()

    def broken(subject: Any, contexts: Any, row: Any, *more: Any) -> Any:
        length = min(LENGTHS, key=lambda n: abs(n - len(contexts[0].ids) - 40))
        tried.append((row.name, length))
        if (row.name, length) in errors and tried.count((row.name, length)) > after:
            raise errors[row.name, length]
        return run(subject, contexts, row, *more)

    monkeypatch.setattr(prefill, "run", broken)
    return tried


def test_what_one_length_refuses_others_have(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    for _ in range(2):
        with monkeypatch.context() as own:
            tried = failing(own, {("default", 1000): Refused("too long")})
            folder = go(tiny, tmp_path)
        assert held(folder) == {key: n for key, n in ALL.items() if key != "default:1000"}
        assert folder.absent == {"default:1000": "too long"}
    # For good: not tried again.
    assert ("default", 1000) not in tried


@pytest.mark.parametrize("row", ["default", "dense"])
def test_memory_that_ran_out_is_the_next_runs_to_find(tiny: Any, tmp_path: Path, monkeypatch: Any, row: str) -> None:
    with monkeypatch.context() as own:
        tried = failing(own, {(row, 1000): torch.OutOfMemoryError("CUDA out of memory.\nMore")}, after=1)
        folder = go(tiny, tmp_path)
    # Once is enough in a run.
    assert tried.count((row, 1000)) == 2
    assert folder.absent[f"{row}:1000"] == "2 of 4 items: CUDA out of memory."
    if row == "dense":
        assert folder.absent["streaming:1000"] == "0 of 4 items: no dense row to compare with"
    else:
        assert held(folder) == ALL | {"default:1000": 2} and len(folder.absent) == 1
    again = go(tiny, tmp_path)
    assert held(again) == ALL and not again.absent


def test_notes_without_a_length_keep_no_row_away(tiny: Any, tmp_path: Path) -> None:
    folder = Folder(tmp_path, facts(STUDY, tiny, "f32"))
    old = {"keep": {}, "gaps": {"default": "CUDA out of memory", "nobody": "its gates"}, "runs": []}
    (tmp_path / "notes.json").write_text(json.dumps(old))
    assert Folder(tmp_path, None).absent == old["gaps"]
    folder = go(tiny, tmp_path)
    assert held(folder) == ALL
    assert folder.absent == {"nobody": "its gates"}


def test_a_row_that_is_not_probed_or_set_is_measured(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    method = methods()["streaming"]
    for passing in (True, False):
        folder = Folder(tmp_path, facts(STUDY, tiny, "f32"))
        bench = Bench(STUDY, tiny, 1000, folder)
        with monkeypatch.context() as own:
            if passing:
                own.setattr(probe.Sample, "line", fails)
                own.setattr(Bench, "_search", fails)
            else:
                own.setattr(Bench, "_search", lambda *_: (0.3, 0.2))
            bench.look([method])
            set_to = bench.at_density(method, 0.2)
        main = [one for one in (set_to, method) if one]
        measure(Run(STUDY, tiny, folder, Clock(0)), {n: Rows(methods()["dense"], main, []) for n in LENGTHS})
        assert held(folder)["streaming:1000"] == 4
        missing = {"probe of streaming:1000": "out of memory", "streaming@0.2:1000": "out of memory"}
        assert Folder(tmp_path, None).absent == (missing if passing else {})


def test_what_time_leaves_out_is_said_until_it_is_there(
    tiny: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(model, "load", lambda *_: tiny)
    asked = f"--out {tmp_path} --lengths 900 --tasks single-noise --batch 2 --questions 1 --chunk 256 --dense-below 512"
    asked += " --device cpu --model here --no-probe --methods dense,default,streaming"
    for items, said in (("0", "no items"), ("4", "0 of 4 items")):
        assert cli.main([*asked.split(), "--items", items, "--seconds", "1e-9"]) == 3
        told = capsys.readouterr().out
        for row in ("dense", "default", "streaming"):
            assert f"- `{row}:900`: {said}: time was up" in told
    assert cli.main([*asked.split(), "--items", "4", "--row-seconds", "1e-9"]) == 3
    assert "- `default:900`: 2 of 4 items: its --row-seconds were up" in capsys.readouterr().out
    assert cli.main(["--out", str(tmp_path), "--report"]) == 3
    assert cli.main([*asked.split(), "--items", "4"]) == 0
    assert "Not run" not in capsys.readouterr().out.split("Accuracy of")[-1]
    assert cli.main(["--out", str(tmp_path), "--report"]) == 0


def test_a_run_that_was_killed_says_so(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(protocol, "batch", killed)
    with pytest.raises(KeyboardInterrupt):
        go(tiny, tmp_path)
    assert Folder(tmp_path, None).absent == dict.fromkeys(ALL, "0 of 4 items: the run was cut off")
