"""Asks one question of this machine: times systems side by side, after checking their answers.

python3 tests/bench/bench.py tests/bench/definitions/dense.toml --out build/bench
python3 tests/bench/bench.py QUESTION.toml --out DIR --repro 'h32k8_d128_b1_q1024_kv131072,ours-dense,16,1'

Wanted: Python 3.11, torch with CUDA, one GPU; for all peers `pip install flashinfer-python vllm`. Those that are not
installed are reported, with the reason. Writes
QUESTION.csv, QUESTION.txt (environment, what is missing, one line a row to repeat it) and QUESTION-*.svg below --out.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

# Beside this file, wherever it is started from.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import check
import plots
import report
import torch
from problem import Problem
from report import Row
from shapes import CONTIGUOUS, Cell, Question
from systems import ALL, Prepared
from systems.base import Refused
from timing import Times, measure


@dataclass(frozen=True)
class Wanted:
    """Which rows to make; None = all of them."""

    systems: tuple[str, ...]
    repro: tuple[str, str, int, float] | None = None

    def cell(self, cell: Cell) -> bool:
        """Whether the cell has such a row."""
        if self.repro is None:
            return True
        case, name, page, density = self.repro
        same_share = ALL[name].reads_all or cell.density == density
        return str(cell.shape) == case and page in (cell.page_size, CONTIGUOUS) and same_share


def main() -> int:
    """Exit code 0: all rows are there. 3: some are not, and the report says why. 1: an answer was wrong. 2: no GPU."""
    args = _arguments()
    if not torch.cuda.is_available():
        print("bench.py: torch sees no GPU, and times are taken on nothing else", file=sys.stderr)
        return 2
    question = Question.load(args.question)
    if args.library:
        from systems.ours import package

        package().load_library(args.library.absolute())
    wanted = Wanted(tuple(args.systems or question.systems), _repro(args.repro))
    if wanted.repro:
        wanted = Wanted((wanted.repro[1],), wanted.repro)
    book = report.Book(question, args.question, args.out)
    present = []
    for name in wanted.systems:
        if reason := ALL[name].missing():
            book.missing(name, "all cases", reason)
        else:
            present.append(name)
    done: set[tuple[str, str, int]] = set()
    for cell in question.cells:
        if present and wanted.cell(cell):
            _ask(cell, question, [name for name in present if _is_due(name, cell, done)], book)
    book.close()
    if not args.no_plots:
        plots.draw(book.csv_path, args.out)
    return 1 if book.wrong else 3 if book.gaps else 0


def _is_due(name: str, cell: Cell, done: set[tuple[str, str, int]]) -> bool:
    """Systems without pages answer once a shape, those that read everything once a page size too."""
    system = ALL[name]
    if system.paged and not system.reads_all:
        return True
    key = (name, str(cell.shape), cell.page_size if system.paged else CONTIGUOUS)
    again = key in done
    done.add(key)
    return not again


def _ask(cell: Cell, question: Question, names: list[str], book: report.Book) -> None:
    if not names:
        return
    problem = Problem(cell, question)
    where = f"{cell.shape} page {cell.page_size} density {cell.density:g}"
    prepared: dict[str, Prepared] = {}
    errors: dict[str, float | None] = {}
    for name in names:
        try:
            system = ALL[name].prepare(problem)
            errors[name] = _error(system, problem)
        except Refused as reason:
            book.missing(name, where, str(reason))
            continue
        except Exception as error:  # a peer may fail in any way; the others still answer
            book.missing(name, where, f"{type(error).__name__}: {error}")
            continue
        limit = check.TOLERANCE if system.exact else question.max_rel_err
        if errors[name] is not None and limit is not None and not errors[name] <= limit:
            book.is_wrong(name, where, f"relative error {errors[name]:.2e}, at most {limit:.2e}")
            continue
        prepared[name] = system
    times = measure({name: it.runner for name, it in prepared.items()}, question.repeats, question.warmups)
    for name, each in times.items():
        book.add(_row(name, cell, prepared[name], each, errors[name]))
    del problem, prepared
    torch.cuda.empty_cache()


def _error(system: Prepared, problem: Problem) -> float | None:
    out = system.runner.calls[0]()
    torch.cuda.synchronize()
    if system.unchecked:
        return None
    rows, worst = system.rows(out), system.exact
    return check.relative_error(problem, rows, causal=system.causal, lists=system.lists, span=system.span, worst=worst)


def _row(name: str, cell: Cell, system: Prepared, times: Times, error: float | None) -> Row:
    chosen = system.density()
    density = cell.density if chosen is None else chosen
    rate = 0.0 if system.unchecked else cell.shape.flop(density) / times.median / 1e9
    page = cell.page_size if ALL[name].paged else CONTIGUOUS
    return Row(cell, name, page, density, times, rate, error)


def _repro(text: str | None) -> tuple[str, str, int, float] | None:
    if text is None:
        return None
    case, system, page, density = text.split(",")
    return case, system, int(page), float(density)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", type=Path, help="a TOML file of tests/bench/definitions")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is written")
    parser.add_argument("--systems", nargs="+", choices=sorted(ALL), help="instead of the question's own")
    parser.add_argument("--repro", metavar="CASE,SYSTEM,PAGE,DENSITY", help="one row again")
    parser.add_argument("--library", type=Path, help="libcompactattn.so, instead of the installed package's")
    parser.add_argument("--no-plots", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
