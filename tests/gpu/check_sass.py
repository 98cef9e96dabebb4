#!/usr/bin/env python3
"""Reads the machine code of a build's kernels: check_sass.py CARGO_MESSAGES (`make kernels`) or FOLDER of fatbins.

Says whether every kernel is there for every architecture, made of the instructions it was written for. A kernel that
compiles and is right can still have lost its tensor-core or copy instructions, or keep its tile in local memory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

ARCHS = ("sm_80", "sm_90a", "sm_100a", "sm_120a")
DTYPES = ("bf16", "fp16")
HEAD_DIMS = (64, 96, 128, 256)

ALONE = (
    "plan_spans",
    "check_lists",
    "summaries_e4m3",
    "fill_scores",
    "cells_mass",
    "cells_lists",
    "mass_lists",
    "mass_lists_short",
    "two_level_candidates",
    "two_level_mass",
    "flashprefill_relate",
    "keep_rows",
    "union_table",
    "union_table_wide",
    "table",
    "plan_work",
    "export_padded",
    "export_counts",
    "export_starts",
    "export_csr",
)
# One for each dtype.
TYPED = (
    "summaries",
    "cells_read",
    "cells_read_candidates",
    "cells_pool",
    "pooled_lists",
    "sample_rows",
    "sample_rows_held",
    "flashprefill",
    "xattention",
    "xattention_mass",
    "attn_gate_keys",
    "attn_gate",
    "merge",
    "plan_work_means",
)
# One for each dtype and head_dim.
SIZED = ("attend_sm80",)

# Every kernel, by architecture.
EVERYWHERE = {
    *(f"compactattn_{name}" for name in ALONE),
    *(f"compactattn_{name}_{dtype}" for name in TYPED for dtype in DTYPES),
    *(f"compactattn_{name}_{dtype}_d{dim}" for name in SIZED for dtype in DTYPES for dim in HEAD_DIMS),
    *(f"compactattn_attend_sm80_{dtype}_d{dim}_means" for dtype in DTYPES for dim in HEAD_DIMS),
    *(
        f"compactattn_{name}_{dtype}_e4m3"
        for name in ("cells_read", "cells_read_candidates", "cells_pool")
        for dtype in DTYPES
    ),
    *(
        f"compactattn_attend_sm80_{dtype}_e4m3_d{dim}{end}"
        for dtype in DTYPES
        for dim in (64, 128)
        for end in ("", "_means")
    ),
}
EXPECTED = {arch: set(EVERYWHERE) for arch in ARCHS}
EXPECTED["sm_90a"] |= {
    f"compactattn_{name}_sm90_{dtype}_d{dim}"
    for name in ("attend", "cells_read", "cells_read_candidates", "cells_read_pairs")
    for dtype in DTYPES
    for dim in (64, 128, 256)
}
EXPECTED["sm_90a"] |= {f"compactattn_attend_sm90_{dtype}_d{dim}_means" for dtype in DTYPES for dim in (64, 128, 256)}
EXPECTED["sm_90a"] |= {f"compactattn_flashprefill_sm90_{dtype}_d{dim}" for dtype in DTYPES for dim in (64, 128)}
for arch in ("sm_80", "sm_120a"):
    EXPECTED[arch] |= {
        f"compactattn_{name}_small_{dtype}_d256"
        for name in ("cells_read", "cells_read_candidates", "cells_pool")
        for dtype in DTYPES
    }

# By the start of a kernel's name, the first that fits: tensor cores, then the copies that run beside them.
WANTED = {
    "compactattn_attend_sm90_": {"HGMMA", "UTMALDG"},
    "compactattn_attend_sm80_": {"HMMA", "LDGSTS"},
    "compactattn_cells_read_sm90_": {"HGMMA", "UTMALDG"},
    "compactattn_cells_read_candidates_sm90_": {"HGMMA", "UTMALDG"},
    "compactattn_cells_read_pairs_sm90_": {"HGMMA", "UTMALDG"},
    "compactattn_cells_read_": {"HMMA", "LDGSTS"},
    "compactattn_cells_pool_": {"HMMA", "LDGSTS"},
    "compactattn_pooled_lists_": {"HMMA", "LDGSTS"},
    "compactattn_flashprefill_relate": set(),
    "compactattn_flashprefill_sm90_": {"HGMMA", "UTMALDG"},
    "compactattn_flashprefill_": {"HMMA", "LDGSTS"},
    "compactattn_xattention_mass_": set(),
    "compactattn_xattention_": {"HMMA", "LDGSTS"},
}
# Stores to and loads from local memory: registers that did not suffice.
LOCAL = {"STL", "LDL"}

# Exponentials of one tile, a thread, where all of them stand before the wait for O += P V (held waits of traits.h).
HELD = {"_d128": 64}
# Where a warpgroup passes its turn on before it exponentiates (turns).
TURNS = ("_d64",)

# Where Q is read from shared memory its operands differ from warpgroup to warpgroup.
CARRIED = ("_d256",)

# Instructions between products of one tile, and fewer than between those of two.
TILE_APART = 40

# An instruction's line without its address: predicate, opcode with suffixes, operands.
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*[^;]*);", re.MULTILINE)
# An instruction's line: address, predicate, opcode.
OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)


def main(arguments: list[str]) -> int:
    """Prints one line for each fault; 0 without any."""
    if len(arguments) != 1:
        sys.exit(__doc__)
    folder = kernels_folder(Path(arguments[0]))
    faults: list[str] = []
    found: dict[str, dict[str, set[str]]] = {arch: {} for arch in ARCHS}
    paths = sorted(folder.glob("*.fatbin"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        listings = list(pool.map(disassembled, paths))
    for path, listing in zip(paths, listings, strict=True):
        arch = path.stem.rsplit(".", 1)[1]
        faults += order_faults(listing)
        made_for = set(re.findall(r"^\s*arch = (\w+)", listing, re.MULTILINE))
        if made_for != {arch} or "Fatbin ptx code" in listing:
            faults.append(f"{path.name}: wanted machine code for {arch} alone, holds {sorted(made_for)}")
        found.setdefault(arch, {}).update(opcodes(listing))
    for arch, kernels in found.items():
        wanted = EXPECTED.get(arch, set())
        faults += [f"{name} is missing for {arch}" for name in sorted(wanted - set(kernels))]
        faults += [f"{name} for {arch} is none of the kernels listed here" for name in sorted(set(kernels) - wanted)]
        faults += [fault for name, used in kernels.items() for fault in faults_of(name, arch, used)]
    print("\n".join(faults) or f"{sum(map(len, found.values()))} kernels in order: {folder}")
    return bool(faults)


def kernels_folder(argument: Path) -> Path:
    """A folder as it is; of cargo's messages the output folder of this library's build script."""
    if argument.is_dir():
        return argument
    messages = [json.loads(line) for line in argument.read_text().splitlines() if line.startswith("{")]
    ran = [m for m in messages if m["reason"] == "build-script-executed" and "compactattn" in m["package_id"]]
    if not ran:
        sys.exit(f"{argument}: no message of the build script of compactattn")
    return Path(ran[-1]["out_dir"]) / "kernels"


def disassembled(path: Path) -> str:
    """What cuobjdump prints; it and nvdisasm lie beside nvcc or on PATH."""
    nvcc = path.parent / "nvcc"
    beside = [str(Path(nvcc.read_text()).parent)] if nvcc.exists() else []
    search = os.pathsep.join([*beside, os.environ.get("PATH", "")])
    tool = shutil.which("cuobjdump", path=search)
    if tool is None:
        sys.exit("cuobjdump is missing; cuda/toolkit.sh installs one")
    return subprocess.check_output([tool, "-sass", str(path)], text=True, env={**os.environ, "PATH": search})


def opcodes(listing: str) -> dict[str, set[str]]:
    """Opcodes without their suffixes, by kernel."""
    _, *parts = re.split(r"^\s*Function : ", listing, flags=re.MULTILINE)
    return {part.split(None, 1)[0]: set(OPCODE.findall(part)) for part in parts}


def order_faults(listing: str) -> list[str]:
    """What the assembler moved in the steps of the sm_90a kernels; measured: tests/bench/record/h100.

    Kernels stay right, and lose up to a seventh of their speed, where products of scores and of values are not in
    flight together, where the wait for the second is lifted over the exponentials that should hide them, where a turn
    is passed on only after them, or where operands of products are carried from registers of each lane.
    """
    _, *parts = re.split(r"^\s*Function : ", listing, flags=re.MULTILINE)
    faults = []
    for part in parts:
        name = part.split(None, 1)[0]
        code = INSTRUCTION.findall(part)
        if name.startswith("compactattn_attend_sm90_"):
            faults += [f"{name}: {fault}" for fault in step_faults(name, code)]
        elif carries(code):
            faults.append(f"{name}: operands of products come from registers of each lane (R2UR among HGMMA)")
    return faults


def carries(code: list[str]) -> bool:
    """Whether operands of one tile's products differ from lane to lane for all that the assembler knows.

    A turn that depends on what was read as 16 bytes from shared memory, or that not all lanes may leave together, is
    enough for that; cells_read_sm90 lost 3 us of 105 (tests/bench/record/h100/2026-11-23-select-latency.txt).
    """
    products = [i for i, op in enumerate(code) if op.startswith("HGMMA")]
    tiles = [(i, j) for i, j in pairwise(products) if j - i < TILE_APART]
    return any(op.startswith("R2UR") for i, j in tiles for op in code[i:j])


def step_faults(name: str, code: list[str]) -> list[str]:
    """The same for one kernel: its step with a mask, that of other tiles, which is looked at, then that of means."""
    steps, name = (3, name.removesuffix("_means")) if name.endswith("_means") else (2, name)
    waits = [i for i, op in enumerate(code) if op.startswith("WARPGROUP.DEPBAR.LE gsb0, 0x1")]
    if len(waits) != steps:
        return [f"{len(waits)} steps wait for scores alone, wanted {steps}: products do not overlap"]
    wait, faults = waits[1], []
    arrive = max(i for i in range(wait) if code[i].startswith("WARPGROUP.ARRIVE"))
    products = [i for i in range(arrive, wait) if code[i].startswith("HGMMA")]
    if sum("gsb0" in code[i] for i in products) != 2 or any("DEPBAR" in op for op in code[arrive:wait]):
        faults.append("products of scores and of values are not issued together")
    if not name.endswith(CARRIED) and any(op.startswith("R2UR") for op in code[products[0] : wait]):
        faults.append("operands of products come from registers of each lane (R2UR among HGMMA)")
    after = code[wait + 1 :]
    done = next((i for i, op in enumerate(after) if op.startswith("WARPGROUP.DEPBAR.LE gsb0, 0x0")), len(after))
    for end, exponentials in HELD.items():
        before = sum(op.startswith("MUFU.EX2") for op in after[:done])
        if name.endswith(end) and before < exponentials:
            faults.append(f"{before} of {exponentials} exponentials stand before the wait for values")
    first = next((i for i, op in enumerate(after) if op.startswith("MUFU.EX2")), 0)
    if name.endswith(TURNS) and not any(op.startswith("BAR.ARV") for op in after[:first]):
        faults.append("the turn is passed on after exponentials")
    return faults


def overlaps(name: str) -> bool:
    """Whether launches let it start early (rust/cuda/kernels.rs, OVERLAPPING), so that it must wait by itself."""
    rust = (Path(__file__).resolve().parents[2] / "rust/cuda/kernels.rs").read_text()
    names = re.findall(r'"(\w+)"', rust.split("const OVERLAPPING", 1)[1].split("];", 1)[0])
    return re.sub(r"(_bf16|_fp16)?(_e4m3)?(_d\d+(_means)?)?$", "", name.removeprefix("compactattn_")) in names


def faults_of(name: str, arch: str, used: set[str]) -> list[str]:
    """What a kernel lacks or should not have."""
    wanted = next((wanted for start, wanted in WANTED.items() if name.startswith(start)), set())
    if arch != "sm_80" and overlaps(name):
        wanted = wanted | {"ACQBULK"}
    faults = [f"{name} for {arch} has no {opcode}" for opcode in sorted(wanted - used)]
    return faults + [f"{name} for {arch} uses local memory: {opcode}" for opcode in sorted(LOCAL & used)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
