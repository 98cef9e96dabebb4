"""Every block of code of every document is accounted for: it is drawn, or runs in CI, or has the record of a run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "tests/data/README.md"]
DRAWING = "a drawing"

# Blocks that do not carry a mark of their own: page, how they begin, the file that runs them, and the words there by
# which it does. A test takes its block from the document; a step of CI has the same words.
ELSEWHERE = [
    ("README.md", "make demo", ".ci/run", "step make demo\nstep make test\n"),
    ("README.md", "engine: q, k_cache", DRAWING, ""),
    ("README.md", "def compact_attention", "tests/python/test_readme.py", "blocks()[0]"),
    ("README.md", "import numpy as np, compactattn", "tests/python/test_readme.py", "blocks()[1:]"),
    ("README.md", "import torch, compactattn", "tests/gpu/check_install.sh", "tests/gpu/check_torch.py"),
    ("README.md", "import compactattn.hf", "tests/python/test_hf.py", 'r"```py\\n(.*?)```", readme'),
    ("README.md", "COMPACTATTN_MODE=compactattn vllm serve", "tests/vllm/test_register.py", "vllm serve .*$"),
    ("README.md", "find_package(compactattn", "tests/cpp/CMakeLists.txt", "find_package(compactattn"),
    ("README.md", "use compactattn::settings", "Makefile", "rustdoc --test README.md"),
    (
        "README.md",
        "cuda/toolkit.sh &&",
        ".ci/run",
        'README_BUILD="cuda/toolkit.sh && COMPACTATTN_CUDA=require cargo build',
    ),
    ("ARCHITECTURE.md", "engine: q, k_cache", DRAWING, ""),
    ("ARCHITECTURE.md", "python_plugin (ctypes)", DRAWING, ""),
    ("CONTRIBUTING.md", "make demo", ".ci/run", "step make docs"),
    ("RELEASING.md", "COMPACTATTN_KERNEL_CACHE=", ".ci/run", "step make dist\nstep make test-dist\n"),
    ("RELEASING.md", "make reproducible", "tests/bench/record/cpu/2026-11-22-packages.txt", "$ make reproducible"),
    ("method.md", "batch -> plan", DRAWING, ""),
    ("tests/data/README.md", "compactattn extract", "tests/cli.rs", "extract_copies_a_layer_bit_for_bit"),
]
# Targets that documents name and CI does not run, each with what stands for them.
BY_HAND = {
    "audit": "Makefile",  # Asks an advisory database over the network.
    "big-pool": ".ci/run",  # These run within `make gates`.
    "classes": ".ci/run",
    "exact": ".ci/run",
    "fuzz-coverage": "tests/bench/record/cpu/2026-11-22-reliability.txt",
    "means": ".ci/run",
    "metamorphic": ".ci/run",
    "perturb": ".ci/run",
    "reuse": ".ci/run",
    "soak": ".ci/run",
    "tables": ".ci/run",
    "header": "tests/header.rs",  # Writes what that test compares.
    "install": "tests/cpp/run.sh",  # `make test-cpp`, of `make test`.
    "ranks": "tests/python/test_ranks.py",  # The same in miniature, within `make test-hf`.
    "reproducible": "tests/bench/record/cpu/2026-11-22-packages.txt",
    "sanitize-candle": "tests/bench/record/cpu/2026-11-22-packages.txt",
    "tsan": "tests/bench/record/cpu/2026-11-22-reliability.txt",
    "test-vllm": "tests/bench/record/cpu/2026-11-22-packages.txt",
}


class Block(NamedTuple):
    """Some lines of a page, fenced or indented, and the comment above them."""

    page: str
    mark: str
    language: str
    code: str

    def starts(self, page: str, words: str) -> bool:
        """Whether it is that block; comments of a shell do not count."""
        lines = [line.strip() for line in self.code.splitlines()]
        return self.page in (page, f"docs/{page}") and next(
            line for line in lines if line and not line.startswith("#")
        ).startswith(words)


def blocks() -> Iterator[Block]:
    """Of all pages."""
    fenced = re.compile(r"^(?:<!-- ([^\n]*) -->\n)?```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
    indented = re.compile(r"(?<=\n\n)((?: {4}.*\n)+)")
    for path in PAGES:
        page, text = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        yield from (Block(page, *found) for found in fenced.findall(text))
        yield from (Block(page, "", "", found) for found in indented.findall(fenced.sub("", text)))


def read(name: str) -> str:
    """A file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_block_is_drawn_or_runs_or_has_a_record() -> None:
    found = list(blocks())
    assert len(found) > 25
    for block in found:
        # test_docs.py runs these.
        if block.mark in ("run", "run until it serves") and block.page.startswith("docs/"):
            continue
        record = re.fullmatch(r"not run: .*; (?:record|test): (\S+)", block.mark)
        places = [entry for entry in ELSEWHERE if block.starts(entry[0], entry[1])]
        assert bool(record) + len(places) == 1, f"{block.page} has a block that nothing accounts for: {block}"
        assert not record or (ROOT / record[1]).is_file(), block.mark
        for _, _, place, words in places:
            assert place == DRAWING or words in read(place), f"{place} no longer has {words}"


def test_every_account_is_of_a_block_that_is_there() -> None:
    found = list(blocks())
    for page, words, *_ in ELSEWHERE:
        assert sum(block.starts(page, words) for block in found) == 1, (page, words)


def test_every_make_target_that_a_document_names_runs_in_ci_or_by_hand_with_a_record() -> None:
    steps = set(re.findall(r"^ *step make ([\w-]+)", read(".ci/run"), re.MULTILINE))
    named = {target for path in PAGES for target in MAKE.findall(path.read_text(encoding="utf-8"))}
    assert len(named) > 15 and named <= steps | BY_HAND.keys(), named - steps - BY_HAND.keys()
    assert not steps & BY_HAND.keys()
    for target, place in BY_HAND.items():
        assert target in named | {"perturb"} and (ROOT / place).is_file(), target
        assert not place.startswith("tests/bench/record") or f"make {target}" in read(place), target


def test_the_table_of_what_ci_runs_has_every_step() -> None:
    table = read("docs/policy.md").split("## What CI runs")[1].split("\nOn GPUs")[0]
    told = set(re.findall(r"`(?:make )?([\w-]+)`", table))
    steps = set(re.findall(r"^ *step (?:make )?([\w-]+)", read(".ci/run"), re.MULTILINE)) - {"bash", "env"}
    assert steps <= told, steps - told


def test_what_is_skipped_without_torch_runs_where_it_is() -> None:
    recipe = read("Makefile")
    given = re.search(r"WITH_TORCH := .*,(.*)\)", recipe)
    assert given
    for path in sorted((ROOT / "tests/python").glob("test_*.py")):
        if re.search(r'importorskip\("(torch|ml_dtypes|jax)"', path.read_text(encoding="utf-8")):
            known = path.name.removeprefix("test_") in given[1].split() or f"tests/python/{path.name}" in recipe
            assert known, f"{path.name} runs nowhere"


# As documents write it: in code marks, at the start of a line, after another command.
MAKE = re.compile(r"(?:`|^ *|&& |COMPACTATTN_TEST_SDIST=1 )make ([a-z][a-z-]*)", re.MULTILINE)
