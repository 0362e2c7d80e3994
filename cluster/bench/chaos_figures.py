"""What a run of `sluice bench chaos` says, as plain data: pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from cluster.bench.chaos_checker import ALLOWED, Verdict
from cluster.bench.chaos_gaps import FaultRecord, victim_gaps_s
from cluster.bench.chaos_load import Outcome
from cluster.bench.chaos_schedule import PlannedFault, Target
from cluster.bench.statistics import percentile, spread

MAX_FAILURES = 50  # told in full; all are counted
AIMS_S = {"kill-leader": (0.3, 1.5), "kill-gateway": (1.0, None), "term-gateway": (1.0, None)}
"""Gaps that are aimed at, seconds: p50, p99."""


def stream_figures(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Return what became of the streams.

    Args:
        outcomes: In order of their ends.
        seconds: Of the load.
    """
    verdicts = Counter(outcome.finding.verdict for outcome in outcomes)
    refused = [o.finding.detail for o in outcomes if o.finding.verdict is Verdict.REFUSED]
    resumptions = sorted(times for o in outcomes for times in o.trace.resumptions)
    failed = [o for o in outcomes if o.finding.verdict not in ALLOWED]
    return {
        "num_streams": len(outcomes),
        "num_tokens": sum(outcome.num_tokens for outcome in outcomes),
        "streams_per_s": len(outcomes) / seconds if seconds > 0 else 0.0,
        "verdicts": {verdict.value: verdicts[verdict] for verdict in Verdict},
        "refusals": dict(sorted(Counter(d.split(":")[0] for d in refused).items())),
        "manners": dict(sorted(Counter(o.manner.value for o in outcomes).items())),
        "asks": dict(sorted(Counter(o.ask for o in outcomes).items())),
        "num_resumptions": len(resumptions),
        "resumption_s": spread([b - a for a, b in resumptions]),
        "resumptions": [{"begin_s": a, "end_s": b} for a, b in resumptions],
        "failures": [_failure(outcome) for outcome in failed[:MAX_FAILURES]],
    }


def _failure(outcome: Outcome) -> dict[str, Any]:
    return {
        "request_id": outcome.request_id,
        "ask": outcome.ask,
        "manner": outcome.manner.value,
        "begin_s": outcome.trace.begin_s,
        "end_s": outcome.trace.end_s,
        "verdict": outcome.finding.verdict.value,
        "detail": outcome.finding.detail,
    }


def fault_figures(
    faults: Sequence[FaultRecord], outcomes: Sequence[Outcome]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return the figures of each fault, and of each kind of fault by its name."""
    traces = [outcome.trace for outcome in outcomes]
    each = [_fault(fault, victim_gaps_s(fault, traces)) for fault in faults]
    names = list(dict.fromkeys(fault.kind.name for fault in faults))
    kinds = {
        name: _kind([figures for figures in each if figures["kind"] == name])
        for name in sorted(names)
    }
    return each, kinds


def _fault(fault: FaultRecord, gaps_s: list[float]) -> dict[str, Any]:
    return {
        "number": fault.number,
        "kind": fault.kind.name,
        "meaning": fault.kind.meaning,
        "target": fault.kind.target.value,
        "victim": fault.victim,
        "planned_s": fault.planned_s,
        "begin_s": fault.begin_s,
        "error": fault.error,
        "whole_after_s": None if fault.whole_s is None else fault.whole_s - fault.begin_s,
        "gaps_s": gaps_s,
    }


def _kind(each: list[dict[str, Any]]) -> dict[str, Any]:
    gaps_s = [gap for figures in each for gap in figures["gaps_s"]]
    whole = [f["whole_after_s"] for f in each if f["whole_after_s"] is not None]
    is_rebuilt = each[0]["target"] in (Target.REPLICA, Target.GATEWAY)
    p50_s, p99_s = AIMS_S.get(each[0]["kind"], (None, None))
    return {
        "meaning": each[0]["meaning"],
        "num_faults": len(each),
        "num_not_done": sum(bool(figures["error"]) for figures in each),
        "num_victims": len(gaps_s),
        "gap_s": spread(gaps_s),
        "aim_p50_s": p50_s,
        "aim_p99_s": p99_s,
        "whole_after_p50_s": percentile(whole, 50) if is_rebuilt else None,
        "whole_after_max_s": max(whole, default=None) if is_rebuilt else None,
    }


def not_done(
    faults: Sequence[FaultRecord], left: Sequence[PlannedFault], begin_s: float
) -> list[dict[str, Any]]:
    """Return the faults that were planned and not brought about, and why.

    Args:
        faults: That were tried.
        left: That never were.
        begin_s: Of the load.
    """
    tried = [(f.number, f.kind, f.planned_s, f.error) for f in faults if f.error]
    never = [(f.number, f.kind, begin_s + f.at_s, "it never was its turn") for f in left]
    return [
        {"number": number, "kind": kind.name, "planned_s": planned_s, "why": why}
        for number, kind, planned_s, why in sorted(tried + never, key=lambda one: one[0])
    ]


def misses(kinds: dict[str, dict[str, Any]]) -> list[str]:
    """Return which gaps are longer than is aimed at, in words; that depends on the machine.

    Args:
        kinds: From `fault_figures`.
    """
    found = []
    for name, figures in kinds.items():
        for column in ("p50", "p99"):
            aim_s, gap_s = figures[f"aim_{column}_s"], figures["gap_s"][column]
            if aim_s is None:
                continue
            if gap_s is None:
                found.append(f"{name}: {column} of the gaps is unknown, nobody was hit")
            elif gap_s > aim_s:
                found.append(f"{name}: {column} of the gaps is {gap_s:.2f} s, aim {aim_s:g} s")
    return found
