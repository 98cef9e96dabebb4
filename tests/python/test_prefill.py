"""The prefill sweep without a GPU: rows and their order, stages by name, prefills on the CPU, ranks by gloo."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from prefill_rows import BENCH, made_up, sweep

pytest.importorskip("tomllib", reason="the bench wants Python 3.11")
pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("bench_modules")


def test_rows_come_in_the_order_in_which_they_matter() -> None:
    rows = sweep().rows()
    keys = [row.key for row in rows]
    assert len(set(keys)) == len(rows) == 2 * 2 * (3 + 2 + 2)
    first = [system for _, system in keys[:5]]
    assert first == ["vllm-fa3", "fa2-copies", "ours-dense", "ours-op-0.17", "ours-op-0.30"]
    assert [row.shape.context for row in rows[:10]] == [131072] * 5 + [8192] * 5
    # Then another method, at one density and then the next, then another chunk.
    assert [row.key[1] for row in rows[10:13]] == ["xattention-0.17", "xattention-0.30", "xattention-0.17"]
    assert rows[13].shape.chunk == 512 and rows[13].shape.context == 131072
    # A chunk that does not divide a context has no row.
    assert {row.shape.context for row in sweep(contexts=[8192, 1536]).rows()} == {8192, 1536}
    assert {row.shape.context for row in sweep(contexts=[8192, 1536], chunks=[1024]).rows()} == {8192}


def test_one_row_brings_its_peers_and_an_unknown_one_is_refused() -> None:
    from sweep import repeated

    case = "h32k8_d128_b1_q1024_kv8192"
    for row in [row for row in sweep().rows() if row.method not in ("vllm-fa3", "fa2-copies")]:
        again = repeated(",".join(row.key))
        assert again[-1] == row and [it.system for it in again[:-1]] == ["vllm-fa3", "fa2-copies"]
    for key in (f"{case},ours", f"{case},", "ours-op-0.30", "x,ours-op-0.30"):
        with pytest.raises(ValueError):
            repeated(key)


def test_time_is_not_overrun_by_a_row_whose_like_is_known() -> None:
    from sweep import Pace

    long, short = sweep(methods=["dense"], chunks=[1024]).rows()[1::3]
    assert (long.method, long.shape.context, short.shape.context) == ("fa2-copies", 131072, 8192)
    pace = Pace(limit_s=10.0)
    assert pace.fits(long, 9.0) and not pace.fits(long, 10.5)
    pace.learn(long, 5.0)
    assert pace.fits(long, 4.9) and not pace.fits(long, 5.1) and pace.fits(short, 9.9)
    assert Pace(limit_s=None).fits(long, 1e9)


def test_a_slow_run_moves_no_row_and_parts_are_of_one_run(small: Any) -> None:
    fast, middle, slow = ((1.0, 1.0, 4.0, 1.0, 9.0), (2.0, 1.0, 4.0, 1.0, 9.0), (1.0, 1.0, 90.0, 1.0, 0.0))
    runs = [small._Parts(run) for run in (slow, fast, middle)]
    assert small._middle([runs]) == ([93.0, 7.0, 8.0], small._Parts(middle), 0)
    # Each run is its slower rank's: 93, 10, 8; the middle one is the other rank's.
    late = small._Parts((1.0, 1.0, 7.0, 1.0, 0.0))
    assert small._middle([runs, [runs[1], late, runs[1]]]) == ([93.0, 10.0, 8.0], late, 1)
    small.RUNS = 3
    numbers = [*slow, *fast, *middle, 0.1, 0.2]
    assert small._cut(numbers) == [slow, fast, middle]


def test_rows_that_a_folder_has_are_not_measured_again(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import argparse

    from prefill_report import Book
    from tensor_parallel import Group

    rows = sweep(families=["h4k2_d64_b1"], contexts=[1024], chunks=[256]).rows()
    book = Book(tmp_path)
    book.open()
    book.add(made_up(*rows[2].key, 10.0, ranks=1))
    # Two GPUs' row of the same name answers another question.
    book.add(made_up(*rows[3].key, 10.0, ranks=2))
    seen: list[Any] = []
    monkeypatch.setattr(small, "_lines", lambda layer, row, package: seen.append(row) or [])
    small._measure_all(rows, argparse.Namespace(out=tmp_path, seconds=None, started=0.0, ranks=1), Group())
    assert seen == [*rows[:2], *rows[3:]]


def test_a_row_is_repeated_or_kept_not_both(
    small: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["prefill.py", "--out", "x", "--resume", "--repro", "case,ours-dense"])
    with pytest.raises(SystemExit) as ended:
        small._arguments()
    assert ended.value.code == 2 and "--repro measures a row again, --resume keeps it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kernel", "stage"),
    [
        ("compactattn_plan_spans", "plan"),
        ("compactattn_plan_work_means_bf16", "plan"),
        ("compactattn_summaries_bf16", "means"),
        ("compactattn_cells_read_bf16", "select"),
        ("compactattn_pooled_lists_bf16", "select"),
        ("compactattn_keep_rows", "union"),
        ("compactattn_union_table_wide", "union"),
        ("compactattn_attend_sm90_bf16_d128", "attend"),
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<...>>>", "attend"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attend"),
        ("void at::native::index_elementwise_kernel<...>", None),
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTT", None),
    ],
)
def test_a_kernel_is_of_one_stage(kernel: str, stage: str | None) -> None:
    from stages import stage_of

    assert stage_of(kernel) == stage


def test_an_early_start_costs_nothing() -> None:
    from stages import Kernel, added

    kernels = [
        Kernel("compactattn_attend_x", 4_000_000, 9_000_000),
        Kernel("compactattn_select_x", 0, 3_000_000),
        # Begins while the one before runs; counts from its end.
        Kernel("compactattn_union_table", 2_000_000, 4_000_000),
        Kernel("gemm", 9_000_000, 20_000_000),
        Kernel("compactattn_plan_spans", 10_000_000, 15_000_000),
    ]
    times = added(kernels)
    assert times == {"plan": 0.0, "means": 0.0, "select": 3.0, "union": 1.0, "attend": 5.0}


def test_every_kernel_of_the_library_has_a_stage() -> None:
    from stages import STAGES, stage_of

    sources = [path.read_text() for path in (BENCH.parents[1] / "cuda").rglob("*.cu")]
    names = {name for text in sources for name in re.findall(r"compactattn_[a-z0-9_]+(?=\()", text)}
    assert len(names) > 10 and {stage_of(name) for name in names} == set(STAGES)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Tiny prefills on the CPU."""
    import module
    import prefill

    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "HIDDEN", 64)
    monkeypatch.setattr(prefill, "RUNS", 2)
    return prefill


@pytest.mark.parametrize(
    "method",
    ["dense", "ours", "two_level", "flashprefill-union", "flashprefill-block_sparse", "xattention", "attn_gate"],
)
def test_a_chunked_prefill_through_the_module_is_judged(
    small: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import check
    import methods
    import module
    import torch
    from shapes import Shape
    from systems.ours import package

    layer = module.Module(Shape.parse("h4k2_d64_b2_q256_kv1024"), seed=2)
    attention = methods.build(package(), method, 0.3)
    assert small._worst_error(layer, attention) < check.TOLERANCE
    # One that reads the page after the right one.
    write = module.Paged.write
    monkeypatch.setattr(module.Paged, "write", lambda self, k, v, past: write(self, k.roll(1, 1), v, past))
    assert not small._worst_error(layer, attention) < check.TOLERANCE
    # One whose last head alone is NaN.
    sick = torch.tensor([1.0, float("nan")])[:, None]
    monkeypatch.setattr(module.Paged, "write", lambda self, k, v, past: write(self, (k * sick).bfloat16(), v, past))
    assert not small._worst_error(layer, attention) < check.TOLERANCE


def test_the_copying_peer_is_judged_too(small: Any) -> None:
    import check
    import module
    from shapes import Shape

    layer = module.Module(Shape.parse("h4k2_d64_b2_q256_kv1024"), seed=2)
    assert small._worst_error(layer, module.Fa2WithCopies()) < check.TOLERANCE
    short = module.Module(Shape.parse("h4k2_d64_b2_q256_kv256"), seed=2)
    assert small._worst_error(short, module.Fa2WithCopies()) < check.TOLERANCE


def test_a_union_is_made_to_read_the_share_and_says_what_a_row_asked_for(small: Any) -> None:
    import methods
    import module
    from shapes import Shape
    from systems.ours import package

    layer = module.Module(Shape.parse("h4k2_d64_b1_q512_kv8192"), seed=2)
    attention = methods.build(package(), "flashprefill-union", 0.4)
    attention._settings = attention._settings.replace(dense_below_kv_len=0)
    small._prefill(layer, attention)
    assert attention.calibrate()
    small._prefill(layer, attention)
    # Short pasts read more than the last chunk: that is what the second time is for.
    assert attention.calibrate()
    small._prefill(layer, attention)
    assert 0.35 < attention.density() < 0.45
    inflation = attention.inflation()
    # 2 heads x 4 tiles of 128 queries: at least as much as one of them, at most 8 times.
    assert inflation is not None and 1.2 < inflation <= 8
    told = methods.build(package(), "ours", 0.4)
    small._prefill(layer, told)
    assert not told.calibrate() and told.inflation() is None


RANK = """
import argparse, sys
from pathlib import Path
sys.path[:0] = [{bench!r}, {package!r}]
import compactattn
if {library!r}:
    compactattn.load_library(Path({library!r}))
import module, prefill, tensor_parallel, torch
torch.set_num_threads(1)
module.HIDDEN, prefill.RUNS = 64, 2
group = tensor_parallel.Group.from_env("gloo")
{extra}
args = argparse.Namespace(out=Path({out!r}), seconds=None, started=0.0, contexts=[1024], chunks=[256],
                          methods=["dense", "ours"], densities=[0.4, 0.3], shapes=["h4k2_d64_b1"], ranks=2, repro=None)
prefill._measure_all([row for row in prefill._rows(args) if row.method != "vllm-fa3"], args, group)
group.close()
"""


def launched(tmp_path: Path, library: str | None, extra: str = "", limit_s: float = 120.0) -> tuple[str, Any]:
    import compactattn
    import tensor_parallel
    from prefill_report import Book

    book = Book(tmp_path)
    book.open()
    package = str(Path(compactattn.__file__).parents[1])
    code = RANK.format(bench=str(BENCH), package=package, library=library, extra=extra, out=str(tmp_path))
    return tensor_parallel.launch([sys.executable, "-c", code], 2, limit_s), book


def test_a_row_is_the_slower_ranks_and_one_writes_it(tmp_path: Path, library: str | None) -> None:
    extra = """
import time
forward, build = module.Module.forward, prefill.methods.build
def late(self, attention, past, mark):
    def marked():
        if group.rank == 1 and attention.name == "ours-dense":
            time.sleep(0.05)
        mark()
    return forward(self, attention, past, marked)
def broken(package, method, density):
    if group.rank == 1 and density == 0.4:
        raise RuntimeError("no such thing here")
    return build(package, method, density)
module.Module.forward, prefill.methods.build = late, broken
"""
    failure, book = launched(tmp_path, library, extra)
    assert failure == ""
    rows = {row.system: row for row in book.rows()}
    assert set(rows) == {"fa2-copies", "ours-dense", "ours-op-0.30"}
    assert all(row.ranks == 2 and row.parts["reduce"] > 0 and row.ms > 0 for row in rows.values())
    # 4 chunks of 5 parts, each 50 ms late on one rank; its own sum waits for nobody.
    slow = rows["ours-dense"]
    assert slow.ms > 4 * 4 * 50 and slow.parts["reduce"] < slow.ms / 2
    # What one rank cannot do none does.
    unseen = {(system, "its stages: no GPU") for system in rows}
    assert {(gap.system, gap.reason) for gap in book.gaps()} == unseen | {("ours-op-0.40", "another rank could not")}


def test_what_was_timed_and_is_no_number_is_wrong(tmp_path: Path, library: str | None) -> None:
    extra = """
prefill.RUNS, measured = 1, prefill._measured
def spoilt(layer, attention, row):
    if attention.name == "ours-dense" and group.rank == 1:
        attend = attention.attend
        attention.attend = lambda q, past: attend(q, past) * float("nan")
    return measured(layer, attention, row)
prefill._measured = spoilt
"""
    failure, book = launched(tmp_path, library, extra)
    assert failure == ""
    assert "ours-dense" not in {row.system for row in book.rows()}
    wrong = [(gap.system, gap.reason) for gap in book.gaps() if gap.kind == "wrong"]
    assert wrong == [("ours-dense", "what was timed is not finite")]


def test_an_answer_that_is_wrong_on_one_rank_is_wrong(tmp_path: Path, library: str | None) -> None:
    extra = """
prefill.RUNS, worst = 1, prefill._worst_error
def spoilt(layer, attention):
    error = worst(layer, attention)
    return float("nan") if group.rank == 1 and attention.name == "ours-dense" else error
prefill._worst_error = spoilt
"""
    failure, book = launched(tmp_path, library, extra)
    assert failure == ""
    assert "ours-dense" not in {row.system for row in book.rows()}
    wrong = [(gap.system, gap.reason) for gap in book.gaps() if gap.kind == "wrong"]
    assert wrong == [("ours-dense", "relative error nan on rank 1")]


def test_a_rank_that_dies_ends_the_other(tmp_path: Path, library: str | None) -> None:
    extra = """
import os
forward = module.Module.forward
def dies(self, attention, past, mark):
    if group.rank == 1 and attention.name == "ours-dense" and past:
        os._exit(7)
    return forward(self, attention, past, mark)
module.Module.forward = dies
"""
    begin = time.monotonic()
    failure, book = launched(tmp_path, library, extra)
    # Whichever is seen first: the one that died, or the other one's broken connection.
    assert "ended with status" in failure and time.monotonic() - begin < 100
    assert [row.system for row in book.rows()] == ["fa2-copies"]


def test_a_rank_that_hangs_is_ended(tmp_path: Path) -> None:
    import tensor_parallel

    code = f"import os, time\nopen({str(tmp_path)!r} + '/' + os.environ['RANK'], 'w').write(str(os.getpid()))\n"
    code += "time.sleep(0 if os.environ['RANK'] == '0' else 600)"
    failure = tensor_parallel.launch([sys.executable, "-c", code], 2, 2.0)
    assert failure == "ranks [1] were still running after 2 s: all were ended"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "1").read_text()), 0)


def test_without_a_gpu_nothing_is_timed(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "prefill.py"), "--out", str(tmp_path / "out")]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert ran.returncode == 2 and "no GPU" in ran.stderr and not (tmp_path / "out").exists()


def test_the_command_that_repeats_a_row_needs_nothing_else(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["prefill.py", "--out", "x", "--ranks", "2"])
    command = small._repro(small._arguments()).split()
    key = "h16k4_d128_b8_q2048_kv8192,flashprefill-union-0.25"
    monkeypatch.setattr(sys, "argv", [*command[1:], "--repro", key])
    args = small._arguments()
    assert args.ranks == 2 and [",".join(row.key) for row in small._rows(args)][-1] == key
