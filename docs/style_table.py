"""The tree against thirty qualities of well-kept libraries, each by a command: style_table.py > style_table.md.

A row is at its bar, or it has the reason why not; a row that only a person can judge says so. With ``--check`` rows
that style_table.md judges otherwise are printed, and are a failure: numbers may drift, judgements may not.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAGES = ("batch", "plan", "select", "union", "table", "attend", "combine")
GENERATED = {"include/compactattn.h", "Cargo.lock", "examples/candle/Cargo.lock"}
LANGUAGES = {
    "rs": "rust",
    "cu": "cuda",
    "cuh": "cuda",
    "h": "cuda",
    "py": "python",
    "cpp": "cpp",
    "hpp": "cpp",
    "c": "c",
}
Row = tuple[str, str, str, str]


def tracked() -> list[str]:
    """Every file of the repository."""
    return subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()


def read(name: str) -> str:
    """A file's text."""
    return (ROOT / name).read_text(encoding="utf-8", errors="replace")


def sources(*suffixes: str, under: str = "") -> list[str]:
    """Hand-written sources."""
    return [f for f in FILES if f.startswith(under) and f.rpartition(".")[2] in suffixes and f not in GENERATED]


def ok(good: bool, reason: str = "") -> str:
    """The last cell."""
    return "yes" if good else f"no: {reason}"


def sizes() -> Iterator[Row]:
    """Rows 2 to 5."""
    lines = {name: read(name).count("\n") for name in sources(*LANGUAGES)}
    over = [name for name, count in lines.items() if count > (600 if name.endswith("kernel.cuh") else 500)]
    largest = max(lines, key=lambda name: lines[name])
    shown = f"{lines[largest]} (`{largest}`)"
    yield "2", "largest hand-written file, lines", shown, ok(not over, ", ".join(over))
    median = {
        kind: round(statistics.median(lines[name] for name in sources(*kind.split(), under=under)))
        for kind, under in (("rs", "rust/"), ("cu cuh h", "cuda/"), ("py", "python_plugin/"))
    }
    shown = ", ".join(f"{count} ({kind})" for kind, count in median.items())
    good = all(120 <= count <= 250 for count in median.values())
    yield (
        "3",
        "median file, lines; 120 to 250",
        shown,
        ok(good, "files are smaller: a kernel, its data and its arithmetic are files of their own"),
    )
    host = max(
        functions(
            sources("rs", under="rust/"), r"^( *)(?:pub(?:\([a-z]+\))? )?(?:const |unsafe |extern \"C\" )*fn (\w+)"
        )
    )
    device = max(
        functions(
            sources("cu", "cuh", under="cuda/"), r"^( {0,2})(?!.*\b(?:struct|namespace|enum|union|class)\b)\w.*?(\w+)\("
        )
    )
    shown = f"{device[0]} (`{device[1]}`), {host[0]} (`{host[1]}`)"
    yield (
        "4",
        "longest function, device at most 200, host 80",
        shown,
        ok(device[0] <= 200 and host[0] <= 80, "see name"),
    )
    most = max((parameters(code), name) for name, code in public_functions())
    yield "5", "most parameters of a public function; 6", f"{most[0]} (`{most[1]}`)", ok(most[0] <= 6, "see name")


def functions(names: list[str], pattern: str) -> Iterator[tuple[int, str]]:
    """Lengths of functions in formatted code: from the head to the brace that closes at its indentation."""
    for name in names:
        lines = read(name).splitlines()
        for start, line in enumerate(lines):
            head = re.match(pattern, line)
            if not head or line.rstrip().endswith(";"):
                continue
            body = next((n for n in range(start, min(start + 30, len(lines))) if lines[n].endswith(("{", ";"))), None)
            if body is None or lines[body].endswith(";"):
                continue
            close = head[1] + "}"
            end = next((n for n in range(body + 1, len(lines)) if lines[n] in (close, close + ";")), None)
            if end is not None:
                yield end - start + 1, head[2]


def public_functions() -> Iterator[tuple[str, str]]:
    """Names and parameter lists of the C header and of public Rust functions."""
    yield from re.findall(r"^\w[\w *]*?(compactattn_\w+)\(([^;{]*)\);", read("include/compactattn.h"), re.MULTILINE)
    for name in sources("rs", under="rust/"):
        yield from re.findall(
            r"^ *pub fn (\w+)(?:<[^>]*>)?\(([^{;]*?)\)(?: ->|\s*\{|\s*where)", read(name), re.MULTILINE
        )


def parameters(code: str) -> int:
    """Commas at the top level, and one more."""
    flat = re.sub(r"<[^<>]*>|\([^()]*\)|\[[^\[\]]*\]", "", code)
    return sum(1 for each in flat.split(",") if each.strip() not in ("", "void", "&self", "&mut self", "self"))


def duplicates() -> Iterator[Row]:
    """Row 6: places where twelve lines in a row stand in two files of one language."""
    where: dict[tuple[str, tuple[str, ...]], set[str]] = defaultdict(set)
    total = 0
    for name in sources(*LANGUAGES):
        if name.startswith("tests/"):
            continue
        lines = [line.strip() for line in read(name).splitlines() if line.strip()]
        total += len(lines)
        for n in range(len(lines) - 11):
            window = tuple(lines[n : n + 12])
            # Imports and closing braces are alike everywhere.
            if sum(len(line) for line in window) > 240:
                where[(LANGUAGES[name.rpartition(".")[2]], window)].add(name)
    pairs = {tuple(sorted(names)) for names in where.values() if len(names) > 1}
    rate = 1e4 * len(pairs) / total
    yield "6", "pairs of files that share 12 lines, per 10,000; 5", f"{rate:.1f}", ok(rate <= 5, str(sorted(pairs)[:4]))


def words() -> Iterator[Row]:
    """Rows 1, 7, 9."""
    yield (
        "1",
        "a newcomer finds the kernel in a minute",
        "path is stage word, architecture, kernel.cuh",
        ok(False, "not timed: needs strangers with a clock"),
    )
    header = read("include/compactattn.h")
    homes = [stage for stage in STAGES if not any(f in FILES for f in (f"rust/{stage}.rs", f"rust/{stage}/mod.rs"))]
    folders = [s for s in STAGES[1:] if not any(f.startswith(f"cuda/{s}/") for f in FILES)]
    calls = [s for s in STAGES[1:] if f"compactattn_{s}" not in header]
    shown = "Rust module, CUDA folder, C name" if not homes + folders + calls else f"missing: {homes + folders + calls}"
    yield "7", "one word from API to kernel", shown, ok(not homes + folders + calls, "see left")
    fields = re.findall(r"^\s+(?:const )?\w[\w ]*\*\s*(?:const )?\w+;\s*(//.*)?$", read("cuda/params.h"), re.MULTILINE)
    shaped = [comment for comment in fields if "[" in comment]
    yield (
        "9",
        "a shape on every pointer of params.h",
        f"{len(shaped)} of {len(fields)}",
        ok(len(shaped) == len(fields), "single structs have none"),
    )


def rust() -> Iterator[Row]:
    """Rows 8, 10, 11, 12, 13, 14, 15."""
    cargo, header = read("Cargo.toml"), read("include/compactattn.h")
    yield "8", "docs of every public item", "`missing_docs` denied", ok('missing_docs = "deny"' in cargo)
    blocks = sum(len(re.findall(r"\bunsafe \{", read(name))) for name in sources("rs", under="rust/"))
    yield (
        "10",
        "unsafe justified where it stands",
        f"{blocks} blocks, lint denied",
        ok('undocumented_unsafe_blocks = "deny"' in cargo),
    )
    codes = re.findall(r"COMPACTATTN_(?:OK|E_\w+) = (\d+)", header)
    yield "11", "one error type, values never reused", f"{len(codes)} codes", ok(len(codes) == len(set(codes)) > 20)
    yield (
        "12",
        "refusal before launch, with the reason",
        "`compactattn_supports`",
        ok("compactattn_supports(" in header),
    )
    named = re.findall(r'const \w+: &str = "(COMPACTATTN_\w*[A-Z])"', read("rust/config.rs"))
    variables = [name for name in named if name not in NO_RESULT]
    why = "mode and settings must reach the worker processes of engines; read in one place, shown by doctor"
    yield "13", "variables that change a result; 0", ", ".join(variables), ok(not variables, why)
    named = [
        f
        for f in FILES
        if f.startswith(("rust/", "cuda/", "include/")) and re.search(r"torch|numpy|vllm", read(f).lower())
    ]
    yield "14", "core free of frameworks", f"{len(named)} files name one", ok(not named, ", ".join(named))
    why = "each writes entry points or twins of the header, of which the languages can make no list"
    macros = [
        len(re.findall(r"^\s*#\s*define \w+\(", read(f), re.MULTILINE))
        for f in sources("cu", "cuh", "h", under="cuda/")
    ]
    rules = [len(re.findall(r"\bmacro_rules!", read(f))) for f in sources("rs", under="rust/")]
    yield (
        "15",
        "function-like macros, 3 in cuda and 3 in rust",
        f"{sum(macros)} and {sum(rules)}",
        ok(max(sum(macros), sum(rules)) <= 3, why),
    )


def tests() -> Iterator[Row]:
    """Rows 16 to 22."""
    constants = sum(
        len(re.findall(r"constexpr (?:int|bool|float|uint32_t) k\w+ =", read(f)))
        for f in sources("cu", "cuh", "h", under="cuda/")
    )
    why = "whether a reason is a good one needs a reader"
    yield "16", "tuning numbers are data with a reason", f"{constants} named constants", ok(False, why)
    laws = re.findall(r"fn (\w+)\(", read("tests/laws.rs"))
    yield "17", "laws named as sentences", f"{len(laws)} in tests/laws.rs", ok(len(laws) >= 7)
    run = read("tests/gpu/run.sh") + read("tests/c/sanitize.sh") + read(".ci/run")
    tools = [
        t
        for t in ("memcheck", "racecheck", "initcheck", "synccheck", "address", "thread", "undefined", "miri")
        if t in run
    ]
    yield "18", "sanitizers", ", ".join(tools), ok(len(tools) >= 6, "see left")
    why = "judged, not diffed: check_sass.py holds registers, spills, waits and the order of instructions"
    yield "19", "machine code visible in review", "`tests/gpu/check_sass.py`", ok(False, why)
    records = [f for f in FILES if f.startswith("tests/bench/record/") and f.endswith((".csv", ".txt"))]
    yield "20", "speed claims reproducible", f"{len(records)} records", ok(len(records) > 10)
    yield "21", "header generated, committed, compared", "`tests/header.rs`", ok("tests/header.rs" in FILES)
    header = read("include/compactattn.h")
    structs = re.findall(r"struct compactattn_(\w+) \{\n(.*?)\n\}", header, re.DOTALL)
    first = [name for name, body in structs if "struct_size" not in body and name != "tensor"]
    yield "22", "ABI can grow", f"{len(structs)} structs, tensor by value", ok(not first, f"no struct_size: {first}")


def documents() -> Iterator[Row]:
    """Rows 23 to 30."""
    pictures = [
        f
        for f in ("README.md", "ARCHITECTURE.md", "rust/lib.rs")
        if re.search(r"batch\W+plan\W+select\W+union", read(f))
    ]
    yield "23", "architecture in one picture", ", ".join(pictures), ok(len(pictures) == 3)
    line = next(n for n, text in enumerate(read("README.md").splitlines(), 1) if text.startswith("```"))
    yield "24", "first code a reader can run, README line; 40", str(line), ok(line <= 40, "too far down")
    block = re.search(r"```python\n(def compact_attention.*?)```", read("README.md"), re.DOTALL)
    count = len(block[1].splitlines()) if block else 0
    yield "25", "semantics in plain code, and it is a test", f"{count} lines", ok(0 < count <= 16, "missing")
    misuse = [f for f in FILES if f.startswith("tests/capi_bad_")]
    cases = sum(len(re.findall(r"#\[test\]", read(f))) for f in misuse)
    yield "26", "plan cannot be misused", f"{cases} tests in {len(misuse)} files", ok(cases > 10)
    lint = read("Makefile").split("\nlint:")[1].split("\n\n")[0]
    tools = [tool for tool in ("fmt", "clippy", "doc", "clang-format", "ruff", "mypy") if tool in lint]
    yield "27", "formatters and linters in CI", ", ".join(tools), ok(len(tools) >= 5)
    log = subprocess.check_output(["git", "log", "--no-merges", "--format=%s"], cwd=ROOT, text=True).splitlines()
    named = sum(bool(re.match(r"[\w./, +-]+: \S", subject)) and len(subject) <= 60 for subject in log) / max(
        len(log), 1
    )
    yield (
        "28",
        "commits `area: what`, at most 60 characters; 95 %",
        f"{named:.0%} of {len(log)}",
        ok(named >= 0.95, "see left"),
    )
    everything = "\n".join(read(f) for f in FILES if not f.startswith("tests/bench/record") and "/data/" not in f)
    # Cargo, pytest and hatch find these by their place.
    found = [f for f in sources("rs", "cuh", "py", "h") if "tests/" not in f and "hatch_build" not in f]
    unnamed = [f for f in found if Path(f).stem not in everything and "__" not in f]
    vendored = [f for f in FILES if "third_party" in f or "vendor" in f]
    yield (
        "29",
        "nothing dead, nothing vendored",
        f"{len(unnamed)} unreferenced sources, {len(vendored)} vendored",
        ok(not unnamed + vendored, str(unnamed + vendored)),
    )
    stale = list(stale_paths())
    yield "30", "paths in documents that do not exist", str(len(stale)), ok(not stale, ", ".join(stale))


def stale_paths() -> Iterator[str]:
    """Paths in code marks of documents that the repository does not have."""
    known = set(FILES) | {str(parent) for name in FILES for parent in Path(name).parents}
    for page in (f for f in FILES if f.endswith(".md") and "/" not in f.removeprefix("docs/")):
        for path in re.findall(r"`([\w./-]+/[\w.-]+)`", read(page)):
            if path.split("/")[0] in {
                "rust",
                "cuda",
                "tests",
                "docs",
                "include",
                "cpp_shim",
                "python_plugin",
                "packaging",
            }:
                inside = path.rstrip("/") in known or f"{path}.rs" in known or any(f.startswith(path) for f in known)
                if not inside:
                    yield f"{page}: {path}"


def judgements(table: str) -> dict[str, str]:
    """Quality to last cell."""
    cells = [line.split(" | ") for line in table.splitlines() if re.match(r"\| \d", line)]
    return {" | ".join(row[:2]): row[-1] for row in cells}


FILES = tracked()
# Where the driver lies, who watches, whether lists are looked at twice: no result of sound input depends on them.
NO_RESULT = {"COMPACTATTN_LIBCUDA", "COMPACTATTN_NVTX", "COMPACTATTN_CHECK"}


def main() -> None:
    """Prints the table in the order of its numbers, or checks the one that is kept."""
    parts = (sizes, duplicates, words, rust, tests, documents)
    rows = sorted((row for part in parts for row in part()), key=lambda row: int(row[0]))
    out = ["# Style", "", "Made by `python3 docs/style_table.py`; the numbers are those of the tree it was run in.", ""]
    out += ["| # | quality; bar | measured | at its bar |", "|---|---|---|---|"]
    out += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    made = "\n".join(out) + "\n"
    if sys.argv[1:] != ["--check"]:
        sys.stdout.write(made)
        return
    kept, found = judgements(read("docs/style_table.md")), judgements(made)
    wrong = [
        f"{row}: kept {kept.get(row)}, found {found.get(row)}"
        for row in kept | found
        if kept.get(row) != found.get(row)
    ]
    wrong += [f"{row}: no reason" for row, cell in found.items() if not re.match(r"yes |no: \w", cell)]
    sys.exit(
        "\n".join(["docs/style_table.md is not what the tree is; style_table.py renews it", *wrong]) if wrong else 0
    )


if __name__ == "__main__":
    main()
