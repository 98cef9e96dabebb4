"""What check_sass.py says of the order of instructions, on code made up here. No GPU, no compiler."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

GPU = Path(__file__).parents[1] / "gpu"
SCORES = ["WARPGROUP.ARRIVE", "HGMMA.64x128x16.F32.BF16 R24, R132, gdesc[UR16], R24, gsb0"]
VALUES = ["HGMMA.64x64x16.F32.BF16 R88, R136, gdesc[UR16].tnspB, R88, gsb0"]
SCORES_DONE, ALL_DONE = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
EXP = ["MUFU.EX2 R24, R24"]
MASKED = [*SCORES, *VALUES, SCORES_DONE, "FMNMX R24, R24, R25, !PT", ALL_DONE, *EXP * 64]


@pytest.fixture(autouse=True)
def _modules() -> Iterator[None]:
    sys.path.insert(0, str(GPU))
    yield
    sys.path.remove(str(GPU))
    sys.modules.pop("check_sass", None)


def faults(name: str, code: list[str]) -> list[str]:
    """Of a listing as cuobjdump prints it, the step with a mask first."""
    import check_sass

    lines = [f"        /*{16 * i:04x}*/              @!P0 {op} ;   /* 0x0 */" for i, op in enumerate([*MASKED, *code])]
    return check_sass.order_faults("\n".join([f"\t\tFunction : compactattn_attend_sm90_bf16_{name}", *lines]))


def test_the_orders_that_were_measured_pass() -> None:
    assert faults("d128", [*SCORES, *VALUES, SCORES_DONE, *EXP * 64, ALL_DONE]) == []
    assert faults("d64", [*SCORES, *VALUES, SCORES_DONE, "BAR.ARV R10, 0x100", ALL_DONE, *EXP * 64]) == []
    assert faults("d256", [*SCORES, "R2UR UR10, R24", *VALUES, SCORES_DONE, ALL_DONE, *EXP * 32]) == []


@pytest.mark.parametrize(
    ("name", "code", "fault"),
    [
        ("d128", [*SCORES, *VALUES, SCORES_DONE, *EXP, ALL_DONE, *EXP * 63], "1 of 64 exponentials"),
        ("d128", [*SCORES, "R2UR UR10, R24", *VALUES, SCORES_DONE, *EXP * 64, ALL_DONE], "R2UR"),
        ("d128", [*SCORES, ALL_DONE, *VALUES, SCORES_DONE, *EXP * 64, ALL_DONE], "not issued together"),
        ("d128", [*SCORES, ALL_DONE, *EXP * 64, *VALUES, ALL_DONE], "1 steps wait"),
        ("d64", [*SCORES, *VALUES, SCORES_DONE, *EXP, "BAR.ARV R10, 0x100", ALL_DONE, *EXP * 63], "the turn"),
    ],
)
def test_what_the_assembler_moves_is_named(name: str, code: list[str], fault: str) -> None:
    (found,) = faults(name, code)
    assert fault in found
