"""Whether what a replica says of itself and of its load can be true. Pure.

Decisions rest on these figures without looking at them again: one NaN, or one time that is
negative, would make a broken replica the best of all for every request.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import fields
from itertools import pairwise
from operator import attrgetter

from cluster.types import MAX_DUE_WORKS, CacheLoad, DueWork, ReplicaInfo, ReplicaLoad, StepCost

MAX_COUNT = 2**40
"""Of what is there now."""

MAX_TOTAL = 2**60
"""Of what a replica has counted since its start."""

MAX_SECONDS = 1e9
"""Of any time, thirty years."""

MAX_HINGES = 64
"""Of a step's cost: it is added up at every decision."""

MAX_BLOCK_TOKENS = 65536
MAX_RANKS = 4096
"""Of each axis: the blocks in the store have one key for each rank."""

MAX_TEXT = 256
"""Characters of an id, an address or a fingerprint."""

_HEX = re.compile("(?:[0-9a-fA-F]{2})+")
_Part = ReplicaLoad | CacheLoad | StepCost


def check_info(info: ReplicaInfo) -> str | None:
    """Return why a replica cannot be what it says, with the value and its limit; None if it can."""
    for name in ("replica_id", "address", "fingerprint"):
        text: str = getattr(info, name)
        if not 0 < len(text) <= MAX_TEXT or not text.isprintable():
            return f"{name}={text[:MAX_TEXT]!r}, limit=1 to {MAX_TEXT} printable characters"
    if not _HEX.fullmatch(info.fingerprint):
        return f"fingerprint={info.fingerprint!r}, limit=pairs of hexadecimal digits"
    for name, least, most in (
        ("tp", 1, MAX_RANKS),
        ("pp", 1, MAX_RANKS),
        ("block_size", 1, MAX_BLOCK_TOKENS),
        ("max_model_len", 2, MAX_COUNT),
    ):
        if not least <= getattr(info, name) <= most:
            return _reason(name, getattr(info, name), least, most)
    return None


def check_load(load: ReplicaLoad) -> str | None:
    """Return why a report cannot be true, with the figure and its limit; None if it can."""
    reason = _LOAD.check(load) or _CACHE.check(load.cache)
    if reason is None and load.num_free_blocks > load.num_blocks:
        reason = f"num_free_blocks={load.num_free_blocks}, limit=num_blocks={load.num_blocks}"
    if reason is None and load.step_cost is not None:
        reason = _COST.check(load.step_cost) or _check_hinges(load.step_cost.hinges)
    return reason or _check_due(load.due)


class _Figures:
    """The counts and times of one part of a report, with their limits.

    Found once: every replica reports many times a second.

    Args:
        part: Class of the part.
        prefix: Of the names.
        totals: Names of the counts that are since start.
    """

    def __init__(self, part: type[_Part], prefix: str, totals: Container[str]) -> None:
        names = [field.name for field in fields(part) if field.type in ("int", "float")]
        times = [field.name for field in fields(part) if field.type == "float"]
        self._values_of = attrgetter(*names)
        self._limits = [
            (prefix + n, MAX_SECONDS if n in times else MAX_TOTAL if n in totals else MAX_COUNT)
            for n in names
        ]

    def check(self, part: _Part) -> str | None:
        """Return what is wrong with a part; None if nothing is."""
        for (name, most), value in zip(self._limits, self._values_of(part), strict=True):
            if not 0 <= value <= most:  # NaN is not between anything
                return _reason(name, value, 0, most)
        return None


_LOAD = _Figures(
    ReplicaLoad, "", ("num_prefix_query_tokens", "num_prefix_hit_tokens", "num_generated_tokens")
)
_CACHE = _Figures(CacheLoad, "cache.", [field.name for field in fields(CacheLoad)])
_COST = _Figures(StepCost, "step_cost.", ("num_steps",))


def _reason(name: str, value: float, least: float, most: float) -> str:
    return f"{name}={value}, limit={least:g} to {most:g}"


def _check_hinges(hinges: tuple[tuple[int, float], ...]) -> str | None:
    if len(hinges) > MAX_HINGES:
        return f"step_cost has {len(hinges)} hinges, limit={MAX_HINGES}"
    for tokens, more_s in hinges:
        if not 0 <= tokens <= MAX_COUNT:
            return _reason("step_cost.hinges.tokens", tokens, 0, MAX_COUNT)
        if not 0 <= more_s <= MAX_SECONDS:
            return _reason("step_cost.hinges.token_s", more_s, 0, MAX_SECONDS)
    for (before, _), (after, _) in pairwise(hinges):
        if after <= before:
            return f"step_cost has a hinge at {after} tokens after {before}: they ascend"
    return None


def _check_due(due: tuple[DueWork, ...]) -> str | None:
    if len(due) > MAX_DUE_WORKS:
        return f"due has {len(due)} entries, limit={MAX_DUE_WORKS}"
    for work in due:
        if not -MAX_SECONDS <= work.due_s <= MAX_SECONDS:
            return _reason("due.due_s", work.due_s, -MAX_SECONDS, MAX_SECONDS)
        if not 0 <= work.work_s <= MAX_SECONDS:
            return _reason("due.work_s", work.work_s, 0, MAX_SECONDS)
    for before, after in pairwise(due):
        if after.due_s < before.due_s:
            return f"due has due_s={after.due_s} after {before.due_s}: the soonest comes first"
    return None
