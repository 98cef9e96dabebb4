"""Every snippet of docs/ runs as written, or says why it does not; what is generated is what its script prints."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import sysconfig
import urllib.request
from pathlib import Path

import compactattn
import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"(?:<!-- (run|run until it serves|not run: [^>]+) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
RUNNABLE = {"sh", "python"}


def snippets() -> list[tuple[str, str, str, str]]:
    """Page, what the comment above says, language, code."""
    found = []
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        found += [(page.stem, mark, language, code) for mark, language, code in BLOCK.findall(text)]
    return [each for each in found if each[2] in RUNNABLE]


MARKED = [(page, language, code) for page, mark, language, code in snippets() if mark == "run"]


def test_every_snippet_runs_or_says_why_not() -> None:
    silent = [(page, code) for page, mark, _, code in snippets() if not mark]
    assert silent == [] and len(MARKED) >= 6


@pytest.mark.parametrize(
    ("language", "code"),
    [each[1:] for each in MARKED],
    ids=[f"{page}{n}" for n, (page, _, _) in enumerate(MARKED)],
)
def test_a_snippet_does_what_it_says(language: str, code: str, tmp_path: Path) -> None:
    tool = Path(sysconfig.get_path("scripts")) / "compactattn"
    if language == "sh" and "compactattn " in code and not tool.exists():
        pytest.skip("no tool: make test-python installs it")
    command = ["bash", "-euo", "pipefail", "-c", code] if language == "sh" else [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def environment() -> dict[str, str]:
    """A reader's: the tool and the package are there, $ROOT is the source tree."""
    scripts, package = sysconfig.get_path("scripts"), Path(compactattn.__file__).parents[1]
    path = f"{scripts}:{os.environ['PATH']}"
    return {**os.environ, "ROOT": str(ROOT), "PATH": path, "PYTHONPATH": str(package)}


def test_the_exporter_serves_what_the_page_says() -> None:
    ((code, address),) = [
        (code, re.findall(r"--serve (\S+)", code)[0])
        for _, mark, _, code in snippets()
        if mark == "run until it serves"
    ]
    if not (Path(sysconfig.get_path("scripts")) / "compactattn").exists():
        pytest.skip("no tool: make test-python installs it")
    (folder,) = (Path(word) for word in code.split() if word.startswith("/dev/shm/"))
    folder.mkdir(exist_ok=True)
    with socket.socket() as mine:
        # Somebody else's exporter may run here: then at another port, else as written.
        if mine.connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))) == 0:
            mine.close()
            with socket.create_server(("127.0.0.1", 0)) as free:
                elsewhere = f"127.0.0.1:{free.getsockname()[1]}"
            code, address = code.replace(address, elsewhere), elsewhere
    counters = folder / f"test_{os.getpid()}.json"
    counters.write_text(f'{{"pid": {os.getpid()}, "split_steps": 12, "plans": []}}')
    server = subprocess.Popen(["bash", "-c", f"exec {code}"], env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout and address in server.stdout.readline()
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            assert f'compactattn_split_steps_total{{pid="{os.getpid()}"}} 12' in answer.read().decode()
    finally:
        server.kill()
        server.wait()
        counters.unlink()


def test_the_capacity_page_is_what_its_script_prints() -> None:
    printed = subprocess.check_output([sys.executable, str(DOCS / "capacity.py")], text=True)
    page = (DOCS / "capacity.md").read_text(encoding="utf-8")
    assert page.split("<!-- capacity.py -->\n\n")[1].split("\n<!-- end of")[0] == printed


def test_the_support_page_has_the_cpus_answers() -> None:
    # Those of GPUs want a library with kernels: tests/package compares the whole page.
    spec = importlib.util.spec_from_file_location("support", DOCS / "support.py")
    assert spec and spec.loader
    support = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(support)
    page = (DOCS / "support.md").read_text(encoding="utf-8")
    found = support.probe("cpu")
    assert len(found) > 20
    for row, answer in found.items():
        name = row.removeprefix("selector ").removeprefix("feature ")
        wanted = [f"| {name} | {answer} |", f"| `{name}` | {answer} |"]
        assert any(each in page for each in wanted), wanted


def test_the_abi_page_has_every_function_struct_and_enum_of_the_header(tmp_path: Path) -> None:
    header = ROOT / "include" / "compactattn.h"
    page = subprocess.check_output([sys.executable, str(DOCS / "abi.py"), str(header)], text=True)
    text = header.read_text(encoding="utf-8")
    functions = set(re.findall(r"^(?:\w+ )*\w+[ *]+(compactattn_\w+)\(", text, re.MULTILINE))
    structs = set(re.findall(r"^(?:typedef )?(?:struct|enum) (compactattn_\w+)\s*\{?$", text, re.MULTILINE))
    assert len(functions) > 20 and len(structs) > 15
    for name in functions | structs:
        # Handles are opaque: there is nothing to tell of them.
        opaque = f"struct {name};" in text and f"struct {name} {{" not in text
        assert opaque or f"### {name}\n" in page, name


def test_links_between_pages_lead_somewhere() -> None:
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            # Made of the header when the site is built.
            assert target == "abi.md" or (DOCS / target).exists(), f"{page.name}: {target}"
            # `make docs` puts records beside the pages; nothing else outside of docs/ is on the site.
            assert not target.startswith("..") or target.startswith("../tests/bench/record/"), f"{page.name}: {target}"


def test_every_page_has_its_place_in_the_sites_menu_and_in_the_index() -> None:
    menu = set(re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    pages = {page.name for page in DOCS.glob("*.md")} | {"abi.md"}
    listed = set(re.findall(r"\]\((\w+\.md)\)", (DOCS / "index.md").read_text(encoding="utf-8")))
    assert menu == pages == listed | {"index.md"}


def test_every_project_that_the_faq_cites_is_named_at_its_end() -> None:
    page, projects = (DOCS / "faq.md").read_text(encoding="utf-8").split("## Projects")
    cited = set(re.findall(r"([\w-]+)#\d+", page))
    assert len(cited) > 10 and cited == set(re.findall(r"`([\w-]+)`", projects))


def test_every_make_target_that_documents_name_is_there() -> None:
    targets = set(re.findall(r"^([\w /-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    known = {word for line in targets for word in line.split()}
    for page in [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob(".github/*/*.md")]:
        text = page.read_text(encoding="utf-8")
        named = set(re.findall(r"(?:`|^ {4}|^|&& )make ([a-z][a-z-]*)", text, re.MULTILINE))
        assert named <= known, f"{page.name}: {named - known}"


def test_the_board_is_json_that_grafana_imports() -> None:
    board = json.loads((DOCS / "grafana.json").read_text(encoding="utf-8"))
    assert board["schemaVersion"] >= 36 and len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
