"""Whether a run of `sluice bench chaos` is clean: pure.

A run is clean where it shows that nothing is wrong. One in which hardly anything happened shows
nothing: it is not clean either, and says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cluster.bench.chaos_checker import ALLOWED, Verdict
from cluster.bench.chaos_memory import MEASURED_RUN_S

MAX_MISSING_SHARE = 0.1  # of faults not brought about, of answers left out, of streams refused
_MEASURED_KINDS = ("gateway", "leader")


def why_not_clean(figures: dict[str, Any]) -> list[str]:
    """Return what keeps a run from being clean, in words; nothing where it is."""
    return [
        *_streams(figures["streams"]),
        *_faults(figures["faults"]),
        *_reference(figures["reference"]),
        *_leaks(figures["leaks"], figures["load_s"]),
    ]


def _streams(streams: dict[str, Any]) -> Iterator[str]:
    verdicts = streams["verdicts"]
    for name, number in verdicts.items():
        if number and Verdict(name) not in ALLOWED:
            yield f"{number} streams are {name}"
    if not verdicts[Verdict.EXACT]:
        yield "no stream is exact"
    yield from _too_many("streams were refused", verdicts[Verdict.REFUSED], streams["num_streams"])


def _faults(faults: dict[str, Any]) -> Iterator[str]:
    num_planned, num_missing = faults["num_planned"], len(faults["not_done"])
    if num_missing == num_planned:
        yield "no fault was brought about"
    yield from _too_many("faults were not brought about", num_missing, num_planned)


def _reference(reference: dict[str, Any]) -> Iterator[str]:
    num_unstable = reference["num_unstable"]
    num_asks = reference["num_asks"] + num_unstable
    yield from _too_many("answers differed in quiet and were left out", num_unstable, num_asks)


def _leaks(leaks: dict[str, Any], load_s: float) -> Iterator[str]:
    if leaks["found"]:
        yield f"{len(leaks['found'])} leaks"
    if load_s < MEASURED_RUN_S:
        return
    for kind in _MEASURED_KINDS:
        if not leaks["memory"].get(kind, {}).get("num_measured"):
            yield f"no {kind} lived long enough under load to say whether its memory grows"


def _too_many(what: str, number: int, total: int) -> Iterator[str]:
    if number > MAX_MISSING_SHARE * total:
        yield f"{number} of {total} {what}, limit {MAX_MISSING_SHARE:.0%}"
