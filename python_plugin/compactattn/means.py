"""Block means kept beside a KV pool, for selectors that read summaries: needed on CUDA, cheaper on the CPU."""

from __future__ import annotations

from . import stages
from .batch import Batch
from .plan import Plan
from .selection import Summaries


class BlockMeans:
    """Owns one layer's block means for a whole pool, in the pool's own memory space.

    Give what :meth:`update` returns to ``forward``. The means are sealed with bits of the keys they are of (see
    ``Summaries``), so a step whose KV write nobody announced, a page used again or a sequence rolled back leaves none
    stale. ``seals=False``: the caller sees to it that an update follows every KV write. The memory is made by the first
    update: ``summary_bytes`` of the plan, twice that with ``values``, which mean correction needs.
    """

    def __init__(self, plan: Plan, *, layer: int = 0, values: bool = False, seals: bool = True) -> None:
        self._plan, self._layer, self._values, self._seals = plan, layer, values, seals
        self.summaries: Summaries | None = None

    def update(self, batch: Batch, *, which: str = "completed", stream: int | None = None) -> Summaries:
        """Writes the means of the blocks that the step completes and, with seals, of those whose keys have changed.

        ``all``: of all whole blocks, which without seals is due after a prefix hit or a swap-in. The first update
        always writes all whole blocks of the batch's requests: there was no memory before it. ``stream``: cudaStream_t
        that wrote the KV; None = torch's current one.
        """
        fresh = self.summaries is None
        if self.summaries is None:
            num_pages = batch.k.shape[0]
            self.summaries = Summaries.empty(
                self._plan,
                num_pages,
                layer=self._layer,
                values=self._values,
                seals=self._seals,
                home=batch.home,
                stream=stream,
            )
        asked = "all" if fresh else which
        stages.update_summaries(self._plan, batch, self.summaries, layer=self._layer, which=asked, stream=stream)
        return self.summaries
