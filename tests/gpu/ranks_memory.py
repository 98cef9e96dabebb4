"""Memory of a GPU that the library of this process holds, as tests/gpu/counting_driver.c tells it.

What a GPU says of its free memory is everybody's; who shares one can judge its own by this alone. The library loads the
driver that ``COMPACTATTN_LIBCUDA`` names; with ``FAKE_CUDA=forward`` that one hands all calls on, and keeps account.
"""

from __future__ import annotations

import ctypes
import os

WANTED = "COMPACTATTN_LIBCUDA must name tests/gpu/counting_driver.c, built, and FAKE_CUDA say forward"


def held() -> int | None:
    """Bytes of the GPU, and of pinned host memory; None where nobody counts."""
    path = os.environ.get("COMPACTATTN_LIBCUDA")
    if not path or "forward" not in os.environ.get("FAKE_CUDA", ""):
        return None
    # The library that is loaded already, if it is.
    count = getattr(ctypes.CDLL(path), "fake_bytes", None)
    if count is None:
        return None
    count.restype = ctypes.c_size_t
    return int(count())
