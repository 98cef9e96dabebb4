"""What a prefill sweep leaves behind: ratios, parts that add up, plots that can be read, rows of older records."""

from __future__ import annotations

import csv
import math
import re
from itertools import combinations
from pathlib import Path

import pytest
from prefill_rows import BENCH, CASE, made_up, sweep

pytest.importorskip("tomllib", reason="the bench wants Python 3.11")
pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("bench_modules")

# Of how much parts of a record may miss its module, by GPUs.
NEAR = {1: 0.0, 2: 0.01}


def test_the_report_has_ratios_the_published_row_gaps_and_commands(tmp_path: Path) -> None:
    import prefill_report
    from prefill_report import Book, Gap

    rows = [
        made_up(CASE.format(kv), system, ms * kv / 32768, **changes)
        for kv in (131072, 32768)
        for system, ms, changes in (
            ("vllm-fa3", 100.0, {"density": 1.0}),
            ("fa2-copies", 220.0, {"density": 1.0, "page": 0}),
            ("ours-op-0.17", 40.0, {}),
            ("flashprefill-union-0.17", 50.0, {"inflation": 2.5}),
        )
    ]
    book = Book(tmp_path)
    book.open()
    for row in rows:
        book.add(row)
    book.add(Gap("missing", CASE.format(32768), "quoka-0.17", "Unsupported: on the CPU only"))
    assert [(it.case, it.system, it.ms) for it in book.rows()] == [(it.case, it.system, it.ms) for it in rows]
    planned = sweep(families=["h16k4_d128_b8"], contexts=[65536], chunks=[1024], methods=["dense"]).rows()
    report = prefill_report.write(book, planned, "about", "python3 prefill.py --out DIR --ranks 2", "", 2)
    text = (tmp_path / "prefill.md").read_text()
    # Module 40 against 100 and 220; op and kernel, made of the same shares, against as much.
    ours = "| 32K | ours-op-0.17 | 0.170 |  | 40.0 (39.0 to 46.0) | 2.50 | 5.50 | 20.0 | 2.50 | 5.50 | 10.0 | 2.50"
    assert ours in text and "| 32K | flashprefill-union-0.17 | 0.170 | 2.5 | 50.0" in text
    # The published numbers of 32K, once, beside the first row that is not a peer.
    beside = [line for line in text.splitlines() if "Compact-FP 1.27" in line]
    assert len(beside) == 1 and beside[0].endswith("| ours-op-0.17 | 0.170 | 5.50 | 2.50 | 2 |")
    assert "Compact-FP 2.72" in text and "4ed4d7d" in text
    assert "--ranks 2 --repro 'h16k4_d128_b8_q1024_kv32768,ours-op-0.17'" in text
    assert any("quoka" in gap for gap in report.gaps) and sum("no time left" in gap for gap in report.gaps) == 3
    assert report.wrong == []
    late = prefill_report.write(book, planned, "about", "command", "rank 1 ended with status 7", 2)
    assert late.notes[0] == "rank 1 ended with status 7" and sum("status 7" in gap for gap in late.gaps) == 3


def test_rows_of_another_number_of_gpus_are_no_part_of_a_report(tmp_path: Path) -> None:
    import prefill_report
    from prefill_report import Book

    book = Book(tmp_path)
    book.open()
    book.add(made_up(CASE.format(32768), "vllm-fa3", 100.0, ranks=1))
    book.add(made_up(CASE.format(32768), "ours-op-0.17", 40.0))
    planned = sweep(families=["h16k4_d128_b8"], contexts=[32768], chunks=[1024], methods=["dense"]).rows()
    report = prefill_report.write(book, planned, "about", "command", "", 2)
    text = (tmp_path / "prefill.md").read_text()
    assert "| 32K | vllm-fa3 |" not in text and "| 32K | ours-op-0.17 | 0.170 |  | 40.0 (39.0 to 46.0) |  |  |" in text
    assert any("vllm-fa3" in gap for gap in report.gaps) and len(book.rows()) == 2


def test_components_add_up_and_are_drawn(tmp_path: Path) -> None:
    import plots
    import prefill_report

    rows = [
        made_up(CASE.format(kv), system, ms)
        for kv in (32768, 65536)
        for system, ms in (("vllm-fa3", 100.0), ("ours-op-0.17", 40.0))
    ]
    parts = prefill_report.components(rows[1])
    assert sum(parts.values()) == pytest.approx(rows[1].ms + rows[1].parts["reduce"])
    assert list(parts) == ["project", "write", *rows[1].stages, "rest", "output", "sum"]
    drawn = plots.draw_prefills([prefill_report._drawn(row) for row in rows], tmp_path)
    stem = "prefill-h16k4_d128_b8_q1024-2-GPUs"
    assert [path.name for path in drawn] == [f"{stem}-{it}.svg" for it in ("over-vllm-fa3", "stack-32K", "stack-64K")]
    speedup, stack = drawn[0].read_text(), drawn[1].read_text()
    # 100 ms against 40: 2.5 on an axis that ends at 3.
    height = plots.HEIGHT - plots.BOTTOM
    assert f'cy="{height - 2.5 / 3 * (height - plots.TOP):.1f}"' in speedup
    # A quarter of 100 ms and of 40 in the attend kernel, on one scale.
    long, short = (float(it) for it in re.findall(r'width="([0-9.]+)"[^>]*><title>attend ', stack))
    assert long / short == pytest.approx(2.5, rel=0.01) and stack.count("<title>select ") == 2


def test_no_two_systems_of_a_sweep_look_alike(tmp_path: Path) -> None:
    import methods
    import plots
    import prefill
    import prefill_report

    axes = {"contexts": [65536, 32768], "chunks": [1024], "densities": prefill.DENSITIES}
    planned = sweep(methods=list(methods.METHODS), **axes).rows()
    rows = [made_up(*row.key, 10.0 + i, ranks=1) for i, row in enumerate(planned)]
    figure = plots.draw_prefills([prefill_report._drawn(row) for row in rows], tmp_path)[0].read_text()
    systems = {row.system for row in rows}
    assert len(systems) > 14
    # The lines across the plot have several points; those beside the names have none.
    lines = re.findall(r'<path d="M[^"]*L[^"]*" fill="none" stroke="(#[0-9a-f]{6})"', figure)
    assert len(lines) == len(set(lines)) == len(systems)
    assert len({plots.style(i) for i in range(60)}) == 60
    parts = prefill_report.components(made_up(CASE.format(32768), "ours-op-0.17", 40.0))
    assert len(parts) <= len(plots.COLOURS)


def test_colours_are_told_apart_and_are_those_of_the_accuracy_plot() -> None:
    import plots
    from compactattn.eval import plot

    assert plots.COLOURS == plot.COLOURS
    # CIE 1976: 2.3 is just seen side by side; ten times that also in thin lines apart.
    assert min(math.dist(lab(one), lab(other)) for one, other in combinations(plots.COLOURS, 2)) > 23


def lab(colour: str) -> tuple[float, float, float]:
    """CIELAB of `#rrggbb` in sRGB, white D65."""
    shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
    rows = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    x, y, z = (sum(a * b for a, b in zip(row, linear, strict=True)) / sum(row) for row in rows)
    fx, fy, fz = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


def test_a_rest_below_zero_is_told_and_the_row_still_adds_up(tmp_path: Path) -> None:
    import plots
    import prefill_report
    from prefill_report import Book

    slow = made_up("h32k8_d128_b1_q1024_kv65536", "ours-op-0.17", 40.0, ranks=1)
    slow.stages["attend"] = 30.0
    parts = prefill_report.components(slow)
    # The op is 20 ms; of kernels there are 0.1 + 2.5 + 0.2 + 30.
    assert parts["rest"] == pytest.approx(-12.8) and sum(parts.values()) == pytest.approx(40.0)
    book = Book(tmp_path)
    book.open()
    book.add(slow)
    prefill_report.write(book, [], "about", "command", "", 1)
    assert "| 30.00 | -12.80 | 5.00 |" in (tmp_path / "prefill.md").read_text()
    bar = plots.draw_prefills([prefill_report._drawn(slow)], tmp_path)[0].read_text()
    assert 'width="-' not in bar and ">rest -12.80<" in bar and ">40<" in bar


@pytest.mark.parametrize("record", ["h100/2026-11-23-prefill-sweep", "h200/2026-11-22-prefill-tp2"])
def test_recorded_rows_add_up_to_their_module(record: str) -> None:
    import prefill_report
    from prefill_report import Measured

    with (BENCH / f"record/{record}.csv").open(newline="") as file:
        rows = [Measured.parse(row) for row in csv.DictReader(file)]
    assert len(rows) > 10
    for row in rows:
        total = row.ms + (row.parts["reduce"] if row.ranks > 1 else 0.0)
        # Twelve numbers of three decimals. Two GPUs: the slower one of each run then, of all runs for the parts.
        assert sum(prefill_report.components(row).values()) == pytest.approx(total, abs=0.006, rel=NEAR[row.ranks])


def test_records_of_before_the_median_are_read(tmp_path: Path) -> None:
    from prefill_report import Book, Measured

    for name in ("prefill", "prefill-b1"):
        with (BENCH / f"record/h100/2026-11-22-{name}.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        rows = [Measured.parse(line) for line in lines]
        assert [f"{row.ms:.3f}" for row in rows] == [line["ms_mean"] for line in lines]
        assert {(row.ms_min, row.ms_max, row.span) for row in rows} == {(None, None, "")}
    # Read into a book of today they stay what they are.
    book = Book(tmp_path)
    book.open()
    for row in rows:
        book.add(row)
    assert book.rows() == rows


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    from prefill_report import Book, Gap

    book = Book(tmp_path)
    book.open(keep=True)
    book.add(made_up(CASE.format(32768), "vllm-fa3", 100.0))
    book.add(Gap("missing", CASE.format(32768), "ours-dense", "out of memory"))
    again = Book(tmp_path)
    again.open(keep=True)
    assert [row.system for row in again.rows()] == ["vllm-fa3"] and again.gaps() == []
    again.open()
    assert again.rows() == []
    book.rows_path.write_text("question,case\n")
    with pytest.raises(ValueError, match="other columns"):
        book.open(keep=True)
