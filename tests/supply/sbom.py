"""Bill of materials in CycloneDX 1.6 JSON: every crate that may ship, and the toolchain of the GPU images.

    python3 tests/supply/sbom.py [OUT]      # build/sbom.cdx.json by default; runs `cargo metadata --locked`

Same lock file, same bytes: no time stamp, and a serial number made from the contents.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
READERS = ("nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm")


def metadata() -> dict[str, Any]:
    """What cargo knows of the resolved graph, all features on."""
    command = ["cargo", "metadata", "--locked", "--format-version", "1", "--all-features"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def checksums(lock: str) -> dict[tuple[str, str], str]:
    """SHA-256 of each registry crate, by name and version, as Cargo.lock has it."""
    found = {}
    for block in lock.split("[[package]]")[1:]:
        fields = dict(line.split(" = ", 1) for line in block.splitlines() if " = " in line)
        if "checksum" in fields:
            key = (fields["name"].strip('"'), fields["version"].strip('"'))
            found[key] = fields["checksum"].strip('"')
    return found


def shipped(graph: dict[str, Any]) -> tuple[str, dict[str, list[str]]]:
    """The root's id, and for each package in reach the ids it depends on; tests' dependencies left out."""
    nodes = {node["id"]: node for node in graph["resolve"]["nodes"]}
    root = graph["resolve"]["root"]
    reach: dict[str, list[str]] = {}
    queue = [root]
    while queue:
        node = nodes[queue.pop()]
        if node["id"] in reach:
            continue
        kept = [dep["pkg"] for dep in node["deps"] if any(kind["kind"] != "dev" for kind in dep["dep_kinds"])]
        reach[node["id"]] = sorted(kept)
        queue.extend(kept)
    return root, reach


def component(package: dict[str, Any], sums: dict[tuple[str, str], str], kind: str) -> dict[str, Any]:
    """One crate as CycloneDX has it."""
    name, version = package["name"], package["version"]
    made: dict[str, Any] = {
        "type": kind,
        "bom-ref": f"pkg:cargo/{name}@{version}",
        "name": name,
        "version": version,
        "purl": f"pkg:cargo/{name}@{version}",
    }
    if package.get("license"):
        made["licenses"] = [{"expression": package["license"].replace("/", " OR ")}]
    if (name, version) in sums:
        made["hashes"] = [{"alg": "SHA-256", "content": sums[name, version]}]
    return made


def toolchain(pins: str) -> list[dict[str, Any]]:
    """The pinned wheels behind the kernel images: CUTLASS, the compiler with its headers; no readers of code."""
    made = []
    for name, version in (line.split("==") for line in pins.splitlines() if "==" in line):
        if name in READERS:
            continue
        licence = "BSD-3-Clause" if name == "nvidia-cutlass" else "LicenseRef-NVIDIA-Proprietary"
        ref = f"pkg:pypi/{name}@{version}"
        fields = {"type": "library", "bom-ref": ref, "name": name, "version": version, "purl": ref}
        made.append({**fields, "licenses": [{"expression": licence}]})
    return made


def bill(graph: dict[str, Any], lock: str, pins: str) -> dict[str, Any]:
    """The document, of what cargo knows, the lock file and the pins of `cuda/requirements.txt`."""
    root, reach = shipped(graph)
    packages = {package["id"]: package for package in graph["packages"]}
    sums = checksums(lock)
    ref = {key: f"pkg:cargo/{packages[key]['name']}@{packages[key]['version']}" for key in reach}
    components = [component(packages[key], sums, "library") for key in reach if key != root]
    wheels = toolchain(pins)
    edges = [{"ref": ref[key], "dependsOn": sorted(ref[dep] for dep in deps)} for key, deps in reach.items()]
    next(edge for edge in edges if edge["ref"] == ref[root])["dependsOn"] += [made["bom-ref"] for made in wheels]
    body: dict[str, Any] = {
        "metadata": {"component": component(packages[root], sums, "library")},
        "components": sorted(components + wheels, key=lambda made: str(made["bom-ref"])),
        "dependencies": sorted(edges, key=lambda made: str(made["ref"])),
    }
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest()
    serial = uuid.UUID(bytes=digest[:16], version=4)
    head = {"bomFormat": "CycloneDX", "specVersion": "1.6", "serialNumber": f"urn:uuid:{serial}", "version": 1}
    return head | body


def main() -> None:
    """Writes the document."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "sbom.cdx.json"
    pins = (ROOT / "cuda" / "requirements.txt").read_text()
    made = bill(metadata(), (ROOT / "Cargo.lock").read_text(), pins)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(made, indent=1) + "\n")
    print(f"{out}: {len(made['components'])} components")


if __name__ == "__main__":
    main()
