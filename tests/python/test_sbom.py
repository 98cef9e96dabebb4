"""The bill of materials has what CycloneDX 1.6 requires, and every crate that ships."""

import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("sbom", ROOT / "tests/supply/sbom.py")
assert SPEC and SPEC.loader
sbom = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(sbom)


def test_required_fields_references_and_hashes() -> None:
    files = (ROOT / "Cargo.lock").read_text(), (ROOT / "cuda/requirements.txt").read_text()
    made = sbom.bill(sbom.metadata(), *files)
    assert (made["bomFormat"], made["specVersion"], made["version"]) == ("CycloneDX", "1.6", 1)
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", made["serialNumber"])
    refs = [part["bom-ref"] for part in made["components"]]
    assert len(refs) == len(set(refs)) > 10
    for part in made["components"]:
        assert part["type"] == "library" and part["name"] and part["version"] and part["licenses"], part
        crate = part["purl"].startswith("pkg:cargo/")
        assert not crate or re.fullmatch(r"[0-9a-f]{64}", part["hashes"][0]["content"]), part
    known = {*refs, made["metadata"]["component"]["bom-ref"]}
    for entry in made["dependencies"]:
        assert {entry["ref"], *entry["dependsOn"]} <= known
    names = {part["name"] for part in made["components"]}
    assert {"half", "libc", "safetensors", "serde_json", "nvidia-cutlass", "nvidia-cuda-nvcc"} <= names
    assert not names & {"proptest", "nvidia-cuda-cuobjdump"}, "tests' dependencies do not ship"
    again = sbom.bill(sbom.metadata(), *files)
    assert json.dumps(made) == json.dumps(again)
