"""What can be timed, by name. A system that is not here says why; it is never left out in silence."""

from __future__ import annotations

from systems.base import Prepared, System
from systems.flashinfer import FlashInfer
from systems.ours import Attend, Forward, Stage
from systems.torch_sdpa import Sdpa
from systems.vllm_fa3 import VllmFa3

ALL: dict[str, System] = {
    system.name: system
    for system in (
        Forward("ours-dense", mode="dense"),
        Attend("ours-group", heads_per_list=0),
        Attend("ours-head", heads_per_list=1),
        Attend("ours-tile", heads_per_list=1, span=128),
        Attend("ours-tile-group", heads_per_list=0, span=128),
        Forward("ours-op", mode="compactattn"),
        Forward("ours-op-block64", mode="compactattn", block_size=64),
        Forward("ours-op-block128", mode="compactattn", block_size=128),
        Forward("ours-op-means", mode="compactattn", mean_correction=True),
        Forward("ours-op-flashprefill", selector="flashprefill"),
        Forward("ours-op-pooled_mass", selector="pooled_mass"),
        Forward("ours-op-two_level", selector="two_level"),
        Stage("select"),
        Stage("select", selector="flashprefill"),
        Stage("select", selector="pooled_mass"),
        Stage("select", selector="two_level"),
        Stage("union"),
        Stage("table"),
        Stage("attend"),
        Sdpa("cudnn"),
        Sdpa("fa2"),
        FlashInfer("fa3"),
        FlashInfer("fa2"),
        FlashInfer("fa3", with_plan=True),
        VllmFa3(),
    )
}

__all__ = ["ALL", "Prepared", "System"]
