"""``python -m compactattn eval``: measures, resumes, reports; ``--repro`` makes one row again."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from ..errors import CompactAttnError

_DESCRIPTION = """Accuracy of sparse prefill, paired with dense attention: the same prompts, greedy, the same chunks.

Writes items.jsonl (one line an item), report.csv, report.md and report-LENGTH.svg below --out; a second call goes on
where the first one stopped. RULER and LongBench-v2 themselves: docs/accuracy.md."""
_ROWS = (
    "dense,default,flashprefill-union,flashprefill-block_sparse,sampled_exact-group,pooled_mass-head,two_level,oracle"
)


def main(arguments: list[str] | None = None) -> int:
    """0: every row that was asked for is there; 3: some are not, and the report says why; 2: wrong arguments."""
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
    from .. import load_library
    from .clock import Clock

    # Importing torch and loading the model are of the time.
    clock = Clock(asked.seconds)
    # First of all: importing the backend loads the package's own.
    if asked.library:
        load_library(asked.library.absolute())
    from . import model, protocol

    if asked.report:
        facts = json.loads((asked.out / "study.json").read_text())
        return _report(protocol.Folder(asked.out, facts), facts)
    others = [] if asked.repro or asked.shard else _others(arguments, asked.workers)
    device = asked.device or ("cuda" if _sees_gpu() else "cpu")
    dtype = asked.dtype or ("f16" if device == "cuda" else "f32")
    subject = model.load(asked.model or model.cached_smollm2(), device, dtype, asked.adapter)
    study = _study(asked)
    facts = protocol.facts(study, subject, dtype)
    folder = protocol.Folder(asked.out, facts, study.shard[0])
    if asked.repro:
        return _repro(asked.repro, study, subject, folder)
    rows = {length: _rows(asked, study, subject, length, folder) for length in study.lengths}
    protocol.measure(study, subject, rows, folder, clock)
    if study.shard[0]:
        return 0
    for other in others:
        if code := other.wait():
            raise ValueError(f"a worker ended with {code}; its message stands above")
    folder.read()
    return _report(folder, facts)


def _report(folder, facts: dict[str, object]) -> int:  # type: ignore[no-untyped-def]
    from . import report

    paths = report.write(folder.records, facts, folder.gaps, folder.path)
    print((folder.path / "report.md").read_text())
    print(*paths, sep="\n", file=sys.stderr)
    return 3 if folder.gaps else 0


def _others(arguments: list[str], workers: int) -> list[subprocess.Popen[bytes]]:
    """All workers but this one: one process cannot give a GPU enough to do while the model is small."""
    command = [sys.executable, "-m", "compactattn.eval", *arguments]
    return [subprocess.Popen([*command, "--shard", f"{i}/{workers}"]) for i in range(1, workers)]


def _rows(asked: argparse.Namespace, study, subject, length: int, folder) -> list:  # type: ignore[no-untyped-def, type-arg]
    """The methods as they come, then those that are asked for at a density."""
    from .methods import methods
    from .protocol import at_density

    table = methods()
    names = [name for name in _names(asked.methods, list(table)) if name != "dense"]
    found = [table["dense"], *(table[name] for name in names)]
    for target in asked.density:
        wanted = [table[name] for name in _names(asked.at_density, list(table)) if not table[name].missing]
        set_to = (at_density(study, subject, method, target, length, folder) for method in wanted)
        found += [row for row in set_to if row is not None]
    return found


def _repro(where: str, study, subject, folder) -> int:  # type: ignore[no-untyped-def]
    """Makes the records of ``TASK,LENGTH,INDEX,METHOD`` again and says whether the folder's are the same."""
    from .clock import Clock
    from .methods import methods
    from .protocol import item

    task, length, index, name = where.split(",")
    base, _, target = name.partition("@")
    row = methods()[_names(base, list(methods()))[0]]
    if target:
        key = f"{name}:{length}"
        if key not in folder.keep:
            raise ValueError(f"{key}: {folder.path} has no number for it; wanted one of {', '.join(folder.keep)}")
        row = row.at(folder.keep[key], float(target))
    rows = [methods()["dense"], row] if base != "dense" else [row]
    place = (int(length), task, int(index))
    found = item(study, subject, rows, place, lambda _, reason: sys.exit(f"{name}: not run: {reason}"), Clock(0))
    made = [record for records in found for record in records if record["method"] == name]
    old = [r for r in folder.records if (r["length"], r["task"], r["index"], r["method"]) == (*place, name)]
    print(*(json.dumps(record) for record in made), sep="\n")
    same = [_without_time(r) for r in made] == [_without_time(r) for r in old]
    print("the same as recorded" if same else f"not as recorded ({len(old)} records)", file=sys.stderr)
    return 0 if same or not old else 1


def _without_time(record: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in record.items() if name != "seconds"}


def _study(asked: argparse.Namespace):  # type: ignore[no-untyped-def]
    from .protocol import Study
    from .tasks import TASKS

    values = {field.name: getattr(asked, field.name) for field in dataclasses.fields(Study)}
    values["tasks"] = tuple(_names(asked.tasks, list(TASKS)))
    values["lengths"] = tuple(asked.lengths)
    values["shard"] = asked.shard or (0, asked.workers)
    return Study(**values)


def _names(text: str, known: list[str]) -> list[str]:
    names = known if text == "all" else [name for name in text.split(",") if name]
    if wrong := [name for name in names if name not in known]:
        raise ValueError(f"{', '.join(wrong)}: wanted some of {', '.join(known)}")
    return names


def _sees_gpu() -> bool:
    import torch  # type: ignore[import-not-found, unused-ignore]

    return bool(torch.cuda.is_available())


def _lengths(text: str) -> list[int]:
    """``8k,32k`` or plain numbers."""
    return [int(x[:-1]) * 1024 if x.lower().endswith("k") else int(x) for x in text.split(",")]


def _shard(text: str) -> tuple[int, int]:
    i, _, n = text.partition("/")
    return int(i), int(n)


def _numbers(text: str) -> list[float]:
    return [float(x) for x in text.split(",") if x]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "compactattn eval", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the records; one that is there is gone on with")
    add("--model", type=Path, help="checkpoint folder, or SmolLM2's GGUF (default: the one `make` has cached)")
    add("--adapter", type=Path, help="safetensors of compactattn.eval.finetune")
    add("--device", choices=["cpu", "cuda"], help="default: the GPU if torch sees one")
    add("--dtype", choices=["f32", "f16", "bf16"], help="default: f16 on a GPU, f32 elsewhere")
    add("--library", type=Path, help="the native library, instead of the package's own")
    add("--lengths", type=_lengths, default=[8192], help="tokens of a prompt with its answer: 8k,16k,32k")
    add("--tasks", default="all", help="names with commas, or all")
    add("--contexts", type=int, default=0, help="contexts a task and length; 0: until --seconds are up")
    add("--questions", type=int, default=4, help="questions a context, of tasks with several")
    add("--seconds", type=float, default=0.0, help="ends after so many; 0: no limit")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=1, help="processes that share the GPU; each loads the model")
    add("--shard", type=_shard, help=argparse.SUPPRESS)
    add("--methods", default=_ROWS, help="rows as they come, with commas, or all")
    add("--density", type=_numbers, default=[], help="densities for the rows of --at-density: .1,.2")
    add("--at-density", default="default,flashprefill-union", help="rows that are set to each --density")
    add("--chunk", type=int, default=1024, help="tokens of a prefill chunk")
    add("--dense-below", type=int, default=0, help="dense below so many tokens; 0: a quarter of the length")
    add("--slack", type=int, default=4, help="greedy tokens beyond the expected answer's length")
    add(
        "--no-dense-final",
        dest="dense_final",
        action="store_false",
        help="leave out the column with a dense last chunk",
    )
    add("--report", action="store_true", help="measure nothing: tables and plots of what --out holds")
    add("--repro", metavar="TASK,LENGTH,INDEX,METHOD", help="make one context's records again")
    return parser
