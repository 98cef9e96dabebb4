"""The README's Python code runs as written; its semantics and its matrix are the library's."""

from __future__ import annotations

import re
from pathlib import Path

import compactattn
import numpy as np
import pytest
from cases import Case

README = Path(__file__).parents[2] / "README.md"


def blocks() -> list[str]:
    """Python code of the README, in order."""
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def run(code: str) -> dict[str, object]:
    """The names a block leaves behind."""
    names: dict[str, object] = {"np": np}
    exec(compile(code, str(README), "exec"), names)
    return names


def test_the_semantics_block_says_what_forward_computes() -> None:
    plain = run(blocks()[0])["compact_attention"]
    block, keep = 16, {1, 4, 5}
    case = Case([(40, 203)], seed=9)
    settings = compactattn.Settings.of("external").replace(block_size=block, dense_below_kv_len=0)
    settings = settings.replace(sink_blocks=0, local_blocks=0, density_guard=1.0)
    batch = compactattn.Batch.of(*case.inputs())
    plan = compactattn.plan_for(batch, settings=settings)
    sizes = plan.sizes()
    masks = np.zeros((sizes.select_rows, case.num_q_heads, sizes.mask_words), np.uint32)
    masks[:, :, 0] = sum(1 << j for j in keep)
    out, lse = np.empty_like(case.inputs()[0]), np.empty((case.num_q_heads, 40), np.float32)
    plan.forward(batch, out, lse, external=compactattn.Selection(masks=masks))
    kept = np.isin(np.arange((203 - 40) // block), list(keep))
    q, k, v = case.q, case.tokens(0, case.k), case.tokens(0, case.v)
    for head in range(case.num_q_heads):
        kv_head = head * case.num_kv_heads // case.num_q_heads
        one = plain(q[:, head], k[:, kv_head], v[:, kv_head], kept, block, 1 / np.sqrt(case.head_dim))
        # f32 sums of 203 terms of size 4 at most: 203 roundings of 2^-24 each, doubled for the two products.
        np.testing.assert_allclose(out[:, head], one[0], rtol=0, atol=203 * 4 * 2**-23)
        np.testing.assert_allclose(lse[head], one[1], rtol=0, atol=203 * 4 * 2**-23)


def rows_of(text: str, heading: str) -> dict[str, list[str]]:
    """A Markdown table below a heading: first cell to the others."""
    lines = text.split(f"{heading}")[1].split("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0].replace("`", ""): row[1:] for row in cells}


def test_the_matrix_says_what_the_library_answers() -> None:
    # docs/support.md is the library's own words; test_docs.py and tests/package hold it to them.
    answers = (README.parent / "docs" / "support.md").read_text(encoding="utf-8")
    models, selectors = rows_of(answers, "## Models"), rows_of(answers, "## Selectors")
    said = {row: cells[0] for row, cells in rows_of(README.read_text(encoding="utf-8"), "## What is supported").items()}
    gpus = {gpu for column in models[""][1:] for gpu in column.split(", ")}
    for gpu in gpus:
        assert gpu in said["devices"] or (gpu.startswith("8.") and "8.x" in said["devices"]), gpu
    cpu, on_gpu = models["dtype"][0], set(models["dtype"][1:])
    assert (
        on_gpu == {"bf16, f16"}
        and cpu == "bf16, f16, f32"
        and said["dtypes"].startswith("bf16, f16; on the CPU f32 too")
    )
    e4m3 = set(models["the same, cache of e4m3"][1:])
    assert len(e4m3) == 1 and f"GPU: head_dim {e4m3.pop()}" in said["dtypes"]
    assert set(models["head_dim, dense lists"]) == {said["head_dim"].split(";")[0].split(" (")[0]}
    assert {cell.split(", ")[-1] for cell in models["query heads per KV head"]} == {
        re.findall(r"groups up to (\d+)", said["head_dim"])[0]
    }
    assert set(models["page_size"]) == {said["page_size"].split(" (")[0]}
    nowhere = {name for name, cells in selectors.items() if all(cell == "none / none" for cell in cells[1:])}
    assert nowhere == set(re.findall(r"`(\w+)`", said["CPU only so far"].split(";")[0]))
    not_e4m3 = {
        name for name, cells in selectors.items() if name and all(cell.endswith("/ none") for cell in cells[1:])
    }
    assert not_e4m3 - nowhere == set(re.findall(r"not (\w+), (\w+)\)", said["dtypes"])[0])


@pytest.mark.parametrize("code", blocks()[1:])
def test_every_other_block_runs_as_written(code: str) -> None:
    if 'device="cuda"' in code:
        pytest.skip("needs a GPU: tests/gpu/check_torch.py runs it there")
    names = run(code)
    assert np.isfinite(np.asarray(names["out"])).all()
