"""A study's rows: which are due, which are not there and why, what the next run brings; on a tiny random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch and transformers: make test-hf")
pytest.importorskip("transformers", reason="needs torch and transformers: make test-hf")

from compactattn.eval.clock import Clock  # noqa: E402
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
