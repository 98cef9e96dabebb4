"""SmolLM2 for the checks beside this file; its reader is the package's."""

from compactattn.eval.smollm2 import File

__all__ = ["File"]
