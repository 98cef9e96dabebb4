"""What a run leaves behind: CSV rows as they come, the environment, the gaps, and how to repeat each row."""

from __future__ import annotations

import csv
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from root import ROOT
from shapes import Cell, Question
from timing import Times

COLUMNS = ["question", "case", "system", "page", "density", "ms_median", "ms_min", "ms_max", "tflops", "rel_err"]


@dataclass(frozen=True)
class Row:
    """One system on one cell."""

    cell: Cell
    system: str
    # 0 = contiguous.
    page: int
    # What was read, where the system chose; else the cell's.
    density: float
    times: Times
    # 0 for a single stage.
    tflops: float
    # None where there is no answer to check.
    rel_err: float | None


class Book:
    """Rows are on disk as soon as they are known; a run that is cut short leaves what it had."""

    def __init__(self, question: Question, definition: Path, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._question, self._definition = question, definition
        self.csv_path, self._text_path = out / f"{question.name}.csv", out / f"{question.name}.txt"
        self.gaps: list[str] = []
        self.wrong: list[str] = []
        self._repro: list[str] = []
        self._file = self.csv_path.open("w", newline="")
        self._csv = csv.writer(self._file)
        self._csv.writerow(COLUMNS)
        self._file.flush()

    def add(self, row: Row) -> None:
        """Writes a row."""
        t, shape = row.times, row.cell.shape
        error = "" if row.rel_err is None else f"{row.rel_err:.2e}"
        numbers = [f"{x:.4f}" for x in (row.density, t.median, t.least, t.most)]
        self._csv.writerow([self._question.name, shape, row.system, row.page, *numbers, f"{row.tflops:.1f}", error])
        self._file.flush()
        where = f"{shape} page {row.page:3d} density {row.density:.3f}"
        spread = f"{t.median:8.3f} ms ({t.least:.3f}..{t.most:.3f})"
        print(f"{where} {row.system:22s} {spread} {row.tflops:6.1f} TFLOP/s error {error}", flush=True)
        key = f"{shape},{row.system},{row.page},{row.cell.density:g}"
        self._repro.append(f"python3 tests/bench/bench.py {self._file_name()} --out DIR --repro {shlex.quote(key)}")

    def missing(self, system: str, where: str, reason: str) -> None:
        """A row that will not be there."""
        self.gaps.append(f"{system}, {where}: {reason}")
        print(f"missing: {self.gaps[-1]}", flush=True)

    def is_wrong(self, system: str, where: str, reason: str) -> None:
        """An answer that was wrong, and so was not timed."""
        self.wrong.append(f"{system}, {where}: {reason}")
        print(f"WRONG: {self.wrong[-1]}", flush=True)

    def close(self) -> None:
        """Writes the text beside the rows."""
        self._file.close()
        question = self._question
        lines = [question.asks, "", *environment(), ""]
        lines += [f"warm-ups {question.warmups}, then median of {question.repeats} calls, systems in random turn;"]
        lines += [f"data {question.data}, layout {question.layout}, copies of the data in turn", ""]
        lines += ["Wrong answers, not timed:", *(self.wrong or ["none"]), ""]
        lines += ["Not measured:", *(self.gaps or ["nothing"]), ""]
        lines += ["To repeat a row:", *self._repro]
        self._text_path.write_text("\n".join(lines) + "\n")

    def _file_name(self) -> str:
        path = self._definition.resolve()
        return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name)


def environment() -> list[str]:
    """What the numbers depend on."""
    lines = [f"python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores"]
    if torch.cuda.is_available():
        lines.append(f"GPU {torch.cuda.get_device_name()}; {_gpu()}")
    lines.append(f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    for package in ("compactattn", "flashinfer-python", "vllm"):
        try:
            lines.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{package}: no installed package of that name")
    ours = sys.modules.get("compactattn")
    if ours is not None:
        try:
            lines.append(ours.build_info())
        except ours.CompactAttnError as error:
            lines.append(str(error))
    return lines


def _gpu() -> str:
    fields = "driver_version,clocks.max.sm,clocks.sm,power.limit,temperature.gpu,mig.mode.current"
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        return f"nvidia-smi: {error}"
