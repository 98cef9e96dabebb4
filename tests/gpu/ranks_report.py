"""What two ranks report: whether it is right, and in words."""

from __future__ import annotations

import argparse
import time
from typing import Any

Report = dict[str, Any]


def verdict(given: argparse.Namespace, reports: list[Report]) -> list[str]:
    """What is wrong with a run whose ranks agreed all along."""
    faults = [] if given.steps else short(reports[0])
    for rank, report in enumerate(reports):
        grown = report["growth"] = growth(report["levels"])
        if grown["files"] > 0:
            faults.append(f"rank {rank}: {grown['files']:.0f} more files are open")
        # What others take of a shared GPU is theirs; what this process holds is judged there too.
        own = grown["torch_bytes"] > 0 or grown["library_bytes"] > 0
        if own or (rank not in given.shared and grown["device_bytes"] > 0):
            faults.append(f"rank {rank}: device memory grows: {grown}")
        if grown["minutes"] >= 2 and grown["resident_mib_per_minute"] >= 1:
            faults.append(f"rank {rank}: host memory grows: {grown}")
        # In less time a slope says nothing: the C library's heap breathes by this much (tests/gpu_suite/soak.rs).
        if grown["resident_mib"] > 16:
            faults.append(f"rank {rank}: host memory grows: {grown}")
    return faults


def short(report: Report) -> list[str]:
    """Whether what was to be tried was."""
    engine, judged = report["engine"], report["judged"]
    tried = {
        "a request done": engine["finished"],
        "one aborted": engine["aborted"],
        "a decode row": engine["decode_rows"],
        "a change of modes": engine["mode_changes"],
        "a judged step": sum(judged.values()),
        "a sparse list": sum(stats["candidates"] > stats["selected"] > 0 for stats in report["stats"].values()),
        "a full pool": engine["fullest"] * 100 >= 95 * engine["num_pages"],
    }
    return [f"too short: without {what}" for what, times in tried.items() if not times]


def growth(levels: list[dict[str, Any]]) -> dict[str, float]:
    """After warm-up, a quarter of the run as in gpu_suite's soak; of device memory, from the middle to the end.

    The library allocates in no step, so it has no warm-up. ``library_bytes`` is 0 where nobody counts them: a rank that
    shares its GPU does not start then.
    """
    last = levels[-1]
    # Until each mode, judged form and kernel of torch's has been met once: minutes, where ranks rest between steps.
    warm = [level for level in levels if level["second"] >= last["second"] / 4]
    middle = next(level for level in levels if level["second"] >= last["second"] / 2)
    minutes = [level["second"] / 60 for level in warm]
    resident = [level["resident"] / 2**20 for level in warm]
    # A file may be open just then; a leak is there in every sample.
    quarter = -(-len(warm) // 4)
    files = [min(level["files"] for level in part) for part in (warm[:quarter], warm[-quarter:])]
    mean = sum(minutes) / len(minutes)
    square = sum((x - mean) ** 2 for x in minutes)
    slope = sum((x - mean) * y for x, y in zip(minutes, resident, strict=True)) / square if square else 0.0
    return {
        "minutes": minutes[-1] - minutes[0],
        "device_bytes": last["device_used"] - middle["device_used"],
        "torch_bytes": last["reserved"] - middle["reserved"],
        "library_bytes": (last["held"] or 0) - (levels[0]["held"] or 0),
        "resident_mib": resident[-1] - resident[0],
        "resident_mib_per_minute": slope,
        "files": files[1] - files[0],
    }


def life(report: Report) -> str:
    """The engine's."""
    engine, pages = report["engine"], report["engine"]["num_pages"]
    requests = f"{engine['admitted']} requests: {engine['finished']} done, {engine['aborted']} aborted"
    rows = f"{engine['decode_rows']} decode rows, {engine['mode_changes']} changes of mode"
    full = 100 * engine["used"] / report["steps"] / pages
    return f"{requests}; {rows}; pool {full:.1f} % full, each page handed out {engine['handed_out'] / pages:.1f} times"


def say(found: Report) -> None:
    """The summary."""
    print(f"two ranks, {time.strftime('%Y-%m-%dT%H:%MZ', time.gmtime())}")
    print("\n".join(found["machine"]))
    for rank, report in enumerate(found["ranks"]):
        if "fault" in report:
            continue
        judged = ", ".join(f"{count} {mode}" for mode, count in report["judged"].items())
        share = 100 * report["busy"] / report["seconds"]
        print(f"rank {rank}: {report['steps']} steps in {report['seconds']:.1f} s ({share:.0f} % of it within steps)")
        print(f"  {report['all_reduces']} all-reduces, {report['checks']} checks of counters and digests;", end=" ")
        print(f"wrong: {len(found['faults'])}")
        print(f"  layers judged: {judged}; of the KV that tokens see they read {report['least_read']:.3f} at least")
        print(f"  {life(report)}")
        for name, stats in report["stats"].items():
            print(f"  {name}: " + ", ".join(f"{name} {count}" for name, count in stats.items()))
        print("  growth: " + ", ".join(f"{name} {value:.4g}" for name, value in report.get("growth", {}).items()))
        ends = [report["levels"][i]["held"] for i in (0, -1)]
        print("  the library's own on the GPU: " + ("not counted" if None in ends else f"{ends[0]}, then {ends[1]} B"))
    for fault in found["faults"]:
        print(f"FAULT {fault}")
    print(f"repeat: {found['repeat']}")
    print("FAIL" if found["faults"] else "PASS", flush=True)
