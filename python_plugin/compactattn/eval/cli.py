"""``python -m compactattn eval``: measures, resumes, reports; ``--repro`` makes one row again."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from ..errors import CompactAttnError

_DESCRIPTION = """Accuracy of sparse prefill, paired with dense attention: the same prompts, greedy, the same chunks.

Writes items.jsonl (a line a context and row), report.csv, report.md, report.svg and report-layers.csv below --out; a
second call goes on where the first one stopped. RULER and LongBench-v2 themselves: docs/accuracy.md."""
_ROWS = (
    "dense,default,flashprefill-union,flashprefill-block_sparse,sampled_exact-group,pooled_mass-head,two_level,oracle"
)


def main(arguments: list[str] | None = None) -> int:
    """0: every row that was asked for is there, with all its items; 3: not so: the report says why; 2: wrong call."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    try:
        return _run(asked, sys.argv[1:] if arguments is None else arguments)
    except ImportError as error:
        print(f"compactattn eval: wanted torch, transformers and numpy: {error}", file=sys.stderr)
    except (ValueError, OSError, CompactAttnError) as error:
        print(f"compactattn eval: {error}", file=sys.stderr)
    return 2


def _run(asked: argparse.Namespace, arguments: list[str]) -> int:
    from .clock import Clock
    from .folder import Folder

    if asked.report:
        return _report(Folder(asked.out, None), asked.record)
    # Importing torch and loading the model are of the time.
    clock = Clock(asked.seconds, asked.row_seconds)
    # First of all: importing the backend loads the package's own.
    if asked.library:
        from .. import load_library

        load_library(asked.library.absolute())
    from . import model, protocol

    device = asked.device or ("cuda" if _sees_gpu() else "cpu")
    dtype = asked.dtype or ("f16" if device == "cuda" else "f32")
    subject = model.load(asked.model or model.cached_smollm2(), device, dtype, asked.adapter, asked.gates)
    study = _study(asked, device)
    folder = Folder(asked.out, protocol.facts(study, subject, dtype))
    if asked.repro:
        return _repro(asked, study, subject, folder)
    folder.begin(_place(arguments, device))
    try:
        rows = {length: _rows(asked, study, subject, length, folder) for length in study.lengths}
        protocol.measure(protocol.Run(study, subject, folder, clock), rows)
    finally:
        folder.end(clock.elapsed)
    return _report(folder, asked.record)


def _report(folder: Any, record: Path | None) -> int:
    from . import report

    paths = report.write(folder, record or folder.path / "report")
    print(paths[1].read_text())
    print(*paths, sep="\n", file=sys.stderr)
    return 3 if folder.absent else 0


def _rows(asked: argparse.Namespace, study: Any, subject: Any, length: int, folder: Any) -> Any:
    """The methods as they come, then those that are asked for at a density; what their lists miss is probed here."""
    from .bench import Bench
    from .methods import methods
    from .protocol import Rows

    table = methods(asked.methods.split(","), gates=bool(asked.gates))
    bench = Bench(study, subject, length, folder)
    names = [name for name in _names(asked.methods, list(table)) if name != "dense"]
    at_names = names if asked.at_density == "all" else _names(asked.at_density, list(table))
    at_names = [name for name in at_names if name != "dense" and not table[name].missing]
    main, few = list[Any](), list[Any]()
    for name in dict.fromkeys([*names, *at_names]):
        # At a density a method is as main, or not, as it is by itself.
        own = [table[name]] if name in names else []
        targets = asked.density if name in at_names else []
        set_to = (bench.at_density(table[name], target) for target in targets)
        (main if name in _names(asked.main, list(table)) else few).extend([*own, *(one for one in set_to if one)])
    if asked.probe:
        bench.look([*main, *few])
    return Rows(table["dense"], main, few)


def _repro(asked: argparse.Namespace, study: Any, subject: Any, folder: Any) -> int:
    """Makes the lines of ``TASK,LENGTH,INDEX,METHOD`` again, in its batch; says whether the folder's are the same."""
    from .clock import Clock
    from .methods import methods
    from .protocol import Group, Run, batch

    task, length, index, name = asked.repro.split(",")
    base, _, target = name.partition("@")
    table = methods([base, *asked.main.split(",")], gates=bool(asked.gates))
    row = table[_names(base, list(table))[0]]
    if target:
        key = f"{name}:{length}"
        if key not in folder.keep:
            raise ValueError(f"{key}: {folder.path} has no number for it; wanted one of {', '.join(folder.keep)}")
        row = row.at(folder.keep[key], float(target))
    rows = [table["dense"], row] if base != "dense" else [row]
    size = study.contexts_of(int(length))
    main = base in _names(asked.main, list(table))
    group = Group(int(length), task, int(index) // size * size, size, main)
    contexts = [study.context(subject.codec, task, group.length, group.first + i) for i in range(size)]
    made_by = batch(Run(study, subject, folder, Clock(0)), rows, group, contexts)
    found = [line for lines in made_by for line in lines]
    place = {"length": group.length, "task": task, "index": int(index), "method": name}
    made, old = ([line for line in lines if place.items() <= line.items()] for lines in (found, folder.lines))
    print(*(json.dumps(line) for line in made), sep="\n")
    same = [_without_time(line) for line in made] == [_without_time(line) for line in old]
    print("the same as recorded" if same else f"not as recorded ({len(old)} lines)", file=sys.stderr)
    return 0 if same or not old else 1


def _without_time(line: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in line.items() if name != "seconds"}


def _study(asked: argparse.Namespace, device: str) -> Any:
    from .protocol import Study
    from .tasks import TASKS

    values = {field.name: getattr(asked, field.name) for field in dataclasses.fields(Study)}
    values["tasks"] = tuple(_names(asked.tasks, list(TASKS)))
    values["lengths"] = tuple(asked.lengths)
    # A CPU has enough to do with one.
    values["batch"] = asked.batch or (0 if device == "cuda" else 1)
    return Study(**values)


def _place(arguments: list[str], device: str) -> dict[str, object]:
    """What measures: the command, on what, and what it takes density for."""
    import torch  # type: ignore[import-not-found, unused-ignore]
    import transformers  # type: ignore[import-not-found, unused-ignore]

    from .report import BY_PAIRS

    own = [one for i, one in enumerate(arguments) if not {one, *arguments[max(0, i - 1) : i]} & _PLACES]
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"command": shlex.join(["compactattn", "eval", *own]), "device": name, "density": BY_PAIRS, **versions}


def _names(text: str, known: list[str]) -> list[str]:
    names = known if text == "all" else [name for name in text.split(",") if name]
    if wrong := [name for name in names if name not in known]:
        raise ValueError(f"{', '.join(wrong)}: wanted some of {', '.join(known)}")
    return names


def _sees_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _lengths(text: str) -> list[int]:
    """``8k,32k`` or plain numbers."""
    return [int(x[:-1]) * 1024 if x.lower().endswith("k") else int(x) for x in text.split(",")]


def _numbers(text: str) -> list[float]:
    return [float(x) for x in text.split(",") if x]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "compactattn eval", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_what(parser.add_argument)
    _add_how(parser.add_argument)
    return parser


def _add_what(add: Any) -> None:
    add("--out", type=Path, required=True, help="folder of the records; one that is there is gone on with")
    add("--model", type=Path, help="checkpoint folder, or SmolLM2's GGUF (default: the one `make` has cached)")
    add("--adapter", type=Path, help="safetensors of compactattn.eval.finetune")
    add("--gates", type=Path, help="safetensors of compactattn.eval.gates, for the row attn_gate")
    add("--device", choices=["cpu", "cuda"], help="default: the GPU if torch sees one")
    add("--dtype", choices=["f32", "f16", "bf16"], help="default: f16 on a GPU, f32 elsewhere")
    add("--library", type=Path, help="the native library, instead of the package's own")
    add("--lengths", type=_lengths, default=[8192], help="tokens of a prompt with its answer: 8k,16k,32k")
    add("--tasks", default="all", help="names with commas, or all")
    add("--methods", default=_ROWS, help="rows, with commas, or all; also default:query_span=512+keep_value=.98")
    add("--density", type=_numbers, default=[], help="densities for the rows of --at-density: .1,.2")
    add(
        "--at-density", default="default,flashprefill-union", help="rows set to each --density; all: those of --methods"
    )
    add("--report", action="store_true", help="measure nothing: tables and plots of what --out holds")
    add("--record", type=Path, metavar="STEM", help="write STEM.csv, STEM.md, .. instead of report.csv, .. in --out")
    add("--repro", metavar="TASK,LENGTH,INDEX,METHOD", help="make one context's lines again")


def _add_how(add: Any) -> None:
    add("--items", type=int, default=0, help="items (questions) a length, in whole rounds; 0: until --seconds are up")
    add("--few", type=int, default=0, help="items of the rows that are not --main; 0: as many")
    add("--main", default="default", help="rows that have all --items, beside dense")
    add("--questions", type=int, default=8, help="questions a context, of tasks with several")
    add("--seconds", type=float, default=0.0, help="ends after so many; 0: no limit")
    add("--row-seconds", type=float, default=0.0, help="a row of a length takes no more batches after so many")
    add("--batch", type=int, default=0, help="contexts that go through the model together; 0: 131072 tokens, CPU: one")
    add("--seed", type=int, default=0)
    add("--chunk", type=int, default=2048, help="tokens of a prefill chunk")
    add("--dense-below", type=int, default=0, help="dense below so many tokens; 0: a quarter of the length")
    add("--slack", type=int, default=4, help="greedy tokens beyond the expected answer's length")
    add("--dense-final", choices=["all", "main", "none"], default="all", help="rows asked with a dense question, too")
    add("--no-probe", dest="probe", action="store_false", help="leave out captured mass and output error of each layer")


# Options whose values are places of one machine.
_PLACES = frozenset({"--out", "--model", "--adapter", "--gates", "--library", "--record"})
