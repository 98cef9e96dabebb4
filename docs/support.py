"""What is supported, asked of the library itself: support.py prints the tables of support.md.

Each cell is what ``compactattn_supports`` answers, the same code that refuses a plan. GPUs need not be there: tests'
stand-in for the driver says which one it is and how much memory a block may share. Wants a library with GPU kernels and
a C compiler.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CPU = "CPU"
# Compute capabilities that there are kernels for, and one that there are none for.
GPUS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0", "10.3")
HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 256, 512)
PAGE_SIZES = (1, 8, 16, 32, 64, 128, 256, 512)
GROUPS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32, 64, 128)
KV_LENS = tuple(1 << bits for bits in range(10, 25))
NUM_REQS = tuple(1 << bits for bits in range(13))
FEATURES = {"sliding_window": 4096, "logits_soft_cap": 30.0, "attention_sinks": True, "alibi": True}
BASE = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128, "page_size": 16, "dtype": "bf16",
        "max_num_reqs": 4, "max_total_q": 2048, "max_kv_len": 131_072}  # fmt: skip
Answers = dict[str, str]


def probe(device: str) -> Answers:
    """Row to cell, of one device; run in a process of its own, as a process has one driver."""
    from compactattn import Plan, PlanDesc, Settings
    from compactattn._abi import Selector
    from compactattn.context import Context
    from compactattn.errors import CompactAttnError

    try:
        on = Context(device)
    except CompactAttnError as error:
        return {"": str(error)}

    def reason(**changes: Any) -> str | None:
        return Plan.supports(PlanDesc(**{**BASE, **changes}), on)

    def served(name: str, values: tuple[Any, ...], **changes: Any) -> str:
        return ", ".join(str(value) for value in values if reason(**{name: value}, **changes) is None) or "none"

    made = {
        "`dtype`": served("dtype", ("bf16", "f16", "f32")),
        "`page_size`": served("page_size", PAGE_SIZES),
        "query heads per KV head": ", ".join(str(n) for n in GROUPS if reason(num_q_heads=2 * n) is None),
        "`max_kv_len`, up to at least": served("max_kv_len", KV_LENS).split(", ")[-1],
        "`max_num_reqs`, up to at least": served("max_num_reqs", NUM_REQS).split(", ")[-1],
        "`head_dim`, dense lists": served("head_dim", HEAD_DIMS, settings=Settings.of("dense")),
        "the same, cache of e4m3": served("head_dim", HEAD_DIMS, settings=Settings.of("dense"), kv_dtype="e4m3"),
    }
    for selector in Selector:
        if selector != Selector.DENSE:
            name = selector.name.lower()
            made[f"selector {name}"] = " / ".join(selected(name, kv_dtype, reason) for kv_dtype in (None, "e4m3"))
    for name, value in FEATURES.items():
        made[f"feature {name}"] = reason(**{name: value}) or "served"
    made["feature head_dim 80"] = reason(head_dim=80) or "served"
    made["feature page_size 1"] = reason(page_size=1) or "served"
    return made


def selected(name: str, kv_dtype: str | None, reason: Any) -> str:
    """Head dimensions that a selector serves."""
    from compactattn import Settings

    found = []
    for head_dim in HEAD_DIMS:
        changes: dict[str, Any] = {"settings": Settings.of(name), "head_dim": head_dim, "kv_dtype": kv_dtype}
        with tempfile.TemporaryDirectory() as folder:
            if name == "attn_gate":
                changes |= {
                    "gate_weights_path": gate(Path(folder), head_dim),
                    "rope_inv_freq": (1.0,) * (head_dim // 2),
                }
            if reason(**changes) is None:
                found.append(head_dim)
    return ", ".join(map(str, found)) or "none"


def gate(folder: Path, head_dim: int) -> str:
    """A file of gate weights, zeros: shapes are all that a plan asks for."""
    extents = [BASE["num_q_heads"], 3 * head_dim, head_dim]
    size = 2 * extents[0] * extents[1] * extents[2]
    entry = {"dtype": "BF16", "shape": extents, "data_offsets": [0, size]}
    header = json.dumps({"model.layers.0.self_attn.attn_gate.mask_linear_k.weight": entry}).encode()
    file = folder / "gate.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    return str(file)


def every_device(driver: Path) -> Iterator[tuple[str, Answers]]:
    """Device to its answers."""
    command = [sys.executable, __file__]
    yield CPU, json.loads(subprocess.check_output([*command, "cpu"], text=True))
    for gpu in GPUS:
        env = {**os.environ, "COMPACTATTN_LIBCUDA": str(driver), "FAKE_CUDA": f"cc{gpu.replace('.', '')}"}
        env.pop("CUDA_VISIBLE_DEVICES", None)
        yield gpu, json.loads(subprocess.check_output([*command, "cuda:0"], text=True, env=env))


def stand_in(folder: Path) -> Path:
    """The driver of tests/gpu/counting_driver.c, compiled."""
    library, source = folder / "libcuda.so.1", ROOT / "tests" / "gpu" / "counting_driver.c"
    flags = ["-std=gnu11", "-O1", "-shared", "-fPIC", "-pthread"]
    subprocess.run(["cc", *flags, "-o", str(library), str(source), "-ldl"], check=True)
    return library


def alike(answers: dict[str, Answers]) -> dict[str, Answers]:
    """Devices that answer the same, as one."""
    groups: list[tuple[list[str], Answers]] = []
    for device, found in answers.items():
        same = next((names for names, other in groups if other == found), None)
        if same is None:
            groups.append(([device], found))
        else:
            same.append(device)
    return {", ".join(names): found for names, found in groups}


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def page(answers: dict[str, Answers]) -> str:
    """The generated part of support.md."""
    served = {device: found for device, found in answers.items() if "" not in found}
    columns = alike(
        {device: {k: v for k, v in found.items() if "feature" not in k} for device, found in served.items()}
    )
    rows = list(next(iter(columns.values())))
    plain = [[row, *(found[row] for found in columns.values())] for row in rows if not row.startswith("selector ")]
    selectors = [
        [f"`{row.removeprefix('selector ')}`", *(found[row] for found in columns.values())]
        for row in rows
        if row.startswith("selector ")
    ]
    words = {row: {found[row] for found in served.values()} for row in answers[CPU] if "feature" in row}
    assert all(len(each) == 1 for each in words.values()), words
    refused = [[f"`{row.removeprefix('feature ')}`", each.pop()] for row, each in words.items()]
    refused += [[f"a GPU of {device}", found[""]] for device, found in answers.items() if "" in found]
    parts = [
        "## Models\n\n" + table(["", *columns], plain),
        "## Selectors: `head_dim` with a 16-bit cache / with one of e4m3\n\n" + table(["", *columns], selectors),
        "## What is refused, in the library's words\n\n" + table(["asked for", "answer"], refused),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Of one device as JSON, or the page's tables."""
    if len(sys.argv) > 1:
        print(json.dumps(probe(sys.argv[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(page(dict(every_device(stand_in(Path(folder))))), end="")


if __name__ == "__main__":
    main()
