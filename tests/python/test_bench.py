"""The bench's own arithmetic: questions load, names are read back, answers are judged, plots are drawn. No GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"
tomllib = pytest.importorskip("tomllib", reason="the bench wants Python 3.11")
pytestmark = pytest.mark.usefixtures("bench_modules")


def test_every_question_loads_and_names_its_cases() -> None:
    from shapes import Question, Shape

    questions = [Question.load(path) for path in sorted((BENCH / "definitions").glob("*.toml"))]
    wanted = {"dense", "sparse", "op", "contexts", "trace", "long", "pages", "densities"}
    assert wanted <= {question.name for question in questions}
    for question in questions:
        assert question.repeats >= 10 and question.warmups >= 3 and question.asks and question.cells
        for cell in question.cells:
            assert Shape.parse(str(cell.shape)) == cell.shape


@pytest.mark.parametrize("name", ["h32k8_d128_b1_q1024", "h32k5_d128_b1_q16_kv64", "h8k8_d64_b1_q65_kv64", "x"])
def test_a_shape_that_is_none_is_refused(name: str) -> None:
    from shapes import Shape

    with pytest.raises(ValueError, match=name):
        Shape.parse(name)


def test_an_unknown_key_is_refused(tmp_path: Path) -> None:
    from shapes import Question

    path = tmp_path / "q.toml"
    path.write_text('question = "q"\nasks = "?"\nsystems = []\nrepeat = 3\ncases = []\n')
    with pytest.raises(ValueError, match="repeat"):
        Question.load(path)


def test_plots_show_each_system_against_context(tmp_path: Path) -> None:
    import plots

    head = "question,case,system,page,density,ms_median,ms_min,ms_max,tflops,rel_err"
    rows = [
        f"q,h8k2_d64_b1_q64_kv{kv},{system},{page},{density},{ms},1,1,{rate},1e-3"
        for kv in (8192, 16384)
        for system, page, density, ms, rate in (
            ("cudnn", 0, 1, 4.0, 600),
            ("ours-op", 16, 0.2, 2.0, 700),
            ("ours-select", 16, 1, 0.5, 0),
        )
    ]
    (tmp_path / "q.csv").write_text("\n".join([head, *rows]))
    written = {path.name: path.read_text() for path in plots.draw(tmp_path / "q.csv", tmp_path)}
    assert set(written) == {f"q-h8k2_d64_b1_q64-page16-{what}.svg" for what in ("speedup", "tflops", "stages")}
    speedup = written["q-h8k2_d64_b1_q64-page16-speedup.svg"]
    assert ">ours-op<" in speedup and ">cudnn<" in speedup and ">select<" not in speedup
    # 4 ms against 2 ms: the line of ours-op lies at the top of an axis that ends at 2, cudnn's half way up.
    assert f'cy="{plots.TOP:.1f}"' in speedup
    assert f'cy="{(plots.TOP + plots.HEIGHT - plots.BOTTOM) / 2:.1f}"' in speedup


def problem(
    data: str, density: float, page_size: int, layout: str = "HND", lists: str = "random", list_cv: float = 0.0
) -> Any:
    import problem as problems
    from shapes import Cell, Question, Shape

    problems.ROTATED_BYTES = 1
    cell = Cell(Shape.parse("h8k2_d64_b2_q256_kv2048"), page_size, density)
    few = {"dense_below_kv_len": 0}
    question = Question("q", "?", data, layout, (), (cell,), 10, 3, None, few, lists, list_cv, "", 0, seed=3)
    return problems.Problem(cell, question, "cpu")


@pytest.mark.parametrize(
    ("name", "density", "page_size"),
    [
        ("ours-dense", 1.0, 16),
        ("ours-dense", 0.3, 16),
        ("ours-group", 0.3, 16),
        ("ours-head", 0.3, 64),
        ("ours-group", 0.5, 256),
        ("ours-tile", 0.4, 16),
        ("ours-tile-group", 0.4, 64),
    ],
)
@pytest.mark.parametrize("data", ["random", "planted"])
def test_ours_is_right_and_a_wrong_answer_is_found(data: str, name: str, density: float, page_size: int) -> None:
    pytest.importorskip("torch")
    import check
    from systems import ALL

    made = problem(data, density, page_size)
    system = ALL[name].prepare(made)
    out = system.rows(system.runner.calls[0]())
    judge = {"causal": system.causal, "lists": system.lists, "span": system.span}
    assert check.relative_error(made, out, **judge) < check.TOLERANCE
    # Answers to another question: the second copy's, one without the mask, one over other lists, and none.
    assert check.relative_error(made, system.runner.calls[1](), **judge) > check.TOLERANCE
    assert check.relative_error(made, out, **judge | {"causal": False}) > check.TOLERANCE
    if system.lists:
        assert check.relative_error(made, out, **judge | {"lists": 0}) > check.TOLERANCE
    assert not check.relative_error(made, out * float("nan"), **judge) <= check.TOLERANCE


def test_a_table_has_as_many_rows_as_a_step_of_its_requests_can_have() -> None:
    pytest.importorskip("torch")
    from systems import ALL, ours

    made, system = problem("random", 0.4, 16), ALL["ours-tile"]
    settings = ours.package().Settings.of("external").replace(block_size=128, query_span=128, heads_per_list=1)
    plan = system._plan(made, settings)
    table = ours._table(made, made.copies[0], plan, (made.shape.num_q_heads, 128))
    # 2 requests of 2 tiles could also be one of a token and one of 4 tiles less that.
    assert table.counts.shape[0] == plan.sizes().list_rows == 5 * made.shape.num_q_heads


def test_what_reads_everything_answers_once_a_shape_and_page_size() -> None:
    pytest.importorskip("torch")
    import bench
    from shapes import Cell, Shape

    shape, done = Shape.parse("h8k2_d64_b2_q256_kv2048"), set[tuple[str, str, int]]()
    cells = [Cell(shape, page, density) for page in (16, 64) for density in (0.1, 0.2)]
    due = {name: [bench._is_due(name, cell, done) for cell in cells] for name in ("ours-dense", "ours-head", "cudnn")}
    assert due["ours-dense"] == [True, False, True, False]
    assert due["ours-head"] == [True] * 4 and due["cudnn"] == [True, False, False, False]
    again = bench.Wanted(("ours-dense",), (str(shape), "ours-dense", 16, 1.0))
    assert [again.cell(cell) for cell in cells] == [True, True, False, False]


def test_lists_hold_the_share_that_was_asked_for_and_the_chunk() -> None:
    pytest.importorskip("torch")
    kept = problem("random", 0.5, 16).kept(2)
    assert kept.shape == (2, 1, 2, 16) and bool((kept.sum(-1) == 8).all())
    assert bool(kept[..., -2:].all()) and not bool((kept[:, 0, 0] == kept[:, 0, 1]).all())
    by_tile = problem("random", 0.5, 16).kept(2, 128)
    assert by_tile.shape == (2, 2, 2, 16) and bool((by_tile.sum(-1) == 8).all())
    assert bool(by_tile[:, :, :, 14].all()) and bool((by_tile[..., 15] == by_tile.new_tensor([[0], [1]])).all())


def test_uneven_lists_are_as_uneven_as_asked_and_read_as_much() -> None:
    torch = pytest.importorskip("torch")
    from lists import uneven

    drawn = uneven(100.0, 0.4, (2, 8), torch.Generator().manual_seed(5)).double()
    assert abs(float(drawn.mean()) - 100) < 1 and abs(float(drawn.std(correction=0) / drawn.mean()) - 0.4) < 0.01
    lengths = problem("random", 0.5, 16, list_cv=0.4).kept(2).sum(-1)
    assert int(lengths.min()) < int(lengths.max())


def test_lists_by_mass_hold_more_of_it_than_random_ones() -> None:
    pytest.importorskip("torch")
    import check
    from systems import ALL

    errors = {}
    for lists in ("random", "mass"):
        made = problem("planted", 0.4, 16, lists=lists)
        assert bool((made.kept(8).sum(-1) == made.kept(2).sum(-1)[..., :1]).all())
        out = ALL["ours-head"].prepare(made).runner.calls[0]()
        errors[lists] = check.relative_error(made, out, causal=True, lists=0, worst=False)
    assert errors["mass"] < errors["random"] / 2


@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_one_request_a_kv_head_means_the_same_attention(page_size: int) -> None:
    torch = pytest.importorskip("torch")
    import check
    from systems import rows

    made = problem("planted", 0.3, page_size)
    shape, copy = made.shape, made.copies[0]
    (k, v), q = rows.caches(made, copy), rows.pack(copy.tensors.q, shape)
    out = torch.empty_like(q)
    for row, pages in enumerate(rows.pages(made, copy)):
        mine = slice(row * shape.chunk, (row + 1) * shape.chunk)
        keys, values = (x[pages].flatten(0, 2).double() for x in (k, v))
        logits = torch.einsum("qhd,kd->hqk", q[mine].double(), keys) * made.sm_scale
        hidden = torch.ones(shape.chunk, len(keys), dtype=torch.bool).triu(len(keys) - shape.chunk + 1)
        weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
        out[mine] = torch.einsum("hqk,kd->qhd", weights, values).bfloat16()
    answer = rows.unpack(out, shape)
    assert check.relative_error(made, answer, causal=True, lists=shape.num_kv_heads) < check.TOLERANCE


def test_the_op_reads_less_and_says_how_much() -> None:
    pytest.importorskip("torch")
    import check
    from systems import ALL

    made = problem("planted", 1.0, 16, layout="NHD")
    for name in ("ours-op", "ours-op-flashprefill", "ours-op-pooled_mass", "ours-op-two_level"):
        system = ALL[name].prepare(made)
        out = system.runner.calls[0]()
        density = system.density()
        assert density is not None and 0.125 < density < 1
        assert check.TOLERANCE < check.relative_error(made, out, causal=True, lists=0) < 0.5
