"""The GPU images inside a built library: images.py FILE prints one line an image, "sha256  bytes", in file order.

Two builds of the same sources by the same compiler print the same lines.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from pathlib import Path


def images(binary: bytes) -> list[bytes]:
    """Every fat binary in the bytes of a file, with its header."""
    found, at = [], binary.find(MAGIC)
    while at >= 0:
        _, version, header, size = HEADER.unpack_from(binary, at)
        end = at + 1
        if (version, header) == (1, HEADER.size):
            end = at + header + size
            found.append(binary[at:end])
        at = binary.find(MAGIC, end)
    return found


def main() -> None:
    """Prints the list; 1 as exit code if there is none."""
    found = images(Path(sys.argv[1]).read_bytes())
    for image in found:
        print(f"{hashlib.sha256(image).hexdigest()}  {len(image)}")
    sys.exit(0 if found else 1)


# A fat binary starts with a magic number, a version, the header's size and that of what follows it.
MAGIC = bytes.fromhex("50ed55ba")
HEADER = struct.Struct("<IHHQ")

if __name__ == "__main__":
    main()
