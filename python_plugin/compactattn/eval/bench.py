"""Rows of one length before they are measured: set to densities, and probed, on contexts that are no items."""

from __future__ import annotations

from functools import cached_property

from . import layers, probe
from .folder import Folder
from .methods import Method, find_keep_value
from .model import Subject
from .prefill import FOR_GOOD, NO_ROW
from .protocol import Study
from .tasks import make


class Bench:
    """Where rows of one length are set to densities, and probed: contexts that are no items, prefilled once."""

    def __init__(self, study: Study, subject: Subject, length: int, folder: Folder) -> None:
        self._study, self._subject, self._length, self._folder = study, subject, length, folder
        self._limits = study.limits(length)

    def at_density(self, method: Method, target: float) -> Method | None:
        """``method`` with the number that gives ``target``; None if refused.

        The number is noted in the folder and found there again.
        """
        folder, name = self._folder, f"{method.name}@{target:g}"
        key = f"{name}:{self._length}"
        if any(folder.refused(one, self._length) for one in (name, method.name)):
            return None
        if key not in folder.keep:
            try:
                value, density = self._search(method, target)
            except NO_ROW as reason:
                folder.refuse(name, self._length, reason, isinstance(reason, FOR_GOOD))
                return None
            if abs(density - target) > 0.1 * target:
                folder.note("gaps", key, f"{density:.3f} is the nearest density that it comes to")
                return None
            folder.note("keep", key, value)
        return method.at(folder.keep[key], target)

    def look(self, rows: list[Method]) -> None:
        """Probes what is not probed yet: all rows, and the curves of OURS and FAITHFUL where they are among them."""
        curves = [one for row in rows if row.name in (layers.OURS, layers.FAITHFUL) for one in probe.rungs(row)]
        known = {line["method"] for line in self._folder.probes if line["length"] == self._length}
        for row in [*rows, *curves]:
            torch_only = self._subject.engine.stands_in(row.settings)
            # A name of its own: a row that cannot be probed may well be run.
            name = f"probe of {row.name}"
            if row.name in known or self._folder.refused(name, self._length) or row.missing or torch_only:
                continue
            try:
                self._folder.add_probes([{"length": self._length} | self._sample.line(row)])
                self._folder.leave({f"{name}:{self._length}": None})
            except NO_ROW as reason:
                self._folder.refuse(name, self._length, reason, isinstance(reason, FOR_GOOD))

    def _search(self, method: Method, target: float) -> tuple[float, float]:
        if method.settings.keep == "density":
            # The number itself.
            return target, target
        return find_keep_value(method, target, lambda value: self._sample.density(method.at(value, target).settings))

    @cached_property
    def _sample(self) -> probe.Sample:
        # Of up to four of the study's tasks.
        some = self._study.tasks[:: -(-len(self._study.tasks) // 4)]
        codec = self._subject.codec
        contexts = [make(task, codec, self._length, "apart", self._study.items_of(task)) for task in some]
        return probe.Sample(self._subject, contexts, self._limits)
