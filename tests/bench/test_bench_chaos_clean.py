"""When a run of `sluice bench chaos` is clean: nothing is wrong, and enough happened to say so."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.bench.chaos_checker import Verdict
from cluster.bench.chaos_clean import why_not_clean


def figures(
    *,
    verdicts: dict[str, int] | None = None,
    num_planned: int = 20,
    num_not_done: int = 2,
    num_unstable: int = 7,
    leaks: list[str] | None = None,
    measured: dict[str, int] | None = None,
    load_s: float = 600.0,
) -> dict[str, Any]:
    """A clean run, at every limit that there is, but for what is given."""
    of_verdict = {"exact": 90, "refused": 10} if verdicts is None else verdicts
    of_kind = {"gateway": 1, "leader": 1} if measured is None else measured
    return {
        "streams": {
            "num_streams": sum(of_verdict.values()),
            "verdicts": {verdict.value: of_verdict.get(verdict, 0) for verdict in Verdict},
        },
        "faults": {
            "num_planned": num_planned,
            "not_done": [{"number": number} for number in range(num_not_done)],
        },
        "reference": {"num_asks": 70 - num_unstable, "num_unstable": num_unstable},
        "leaks": {
            "found": leaks or [],
            "memory": {kind: {"num_measured": number} for kind, number in of_kind.items()},
        },
        "load_s": load_s,
    }


def test_a_run_is_clean_that_shows_that_nothing_is_wrong() -> None:
    assert why_not_clean(figures()) == []


@pytest.mark.parametrize("verdict", [v for v in Verdict if v not in ("exact", "refused")])
def test_a_run_is_not_clean_with_a_stream_that_failed(verdict: Verdict) -> None:
    found = why_not_clean(figures(verdicts={"exact": 1000, verdict: 1}))
    assert found == [f"1 streams are {verdict}"]


def test_a_run_without_an_exact_stream_shows_nothing() -> None:
    assert why_not_clean(figures(verdicts={})) == ["no stream is exact"]
    assert why_not_clean(figures(verdicts={"refused": 1000})) == [
        "no stream is exact",
        "1000 of 1000 streams were refused, limit 10%",
    ]
    found = why_not_clean(figures(verdicts={"exact": 89, "refused": 11}))
    assert found == ["11 of 100 streams were refused, limit 10%"]


def test_a_run_whose_faults_did_not_happen_shows_nothing() -> None:
    assert why_not_clean(figures(num_not_done=3)) == [
        "3 of 20 faults were not brought about, limit 10%"
    ]
    assert why_not_clean(figures(num_planned=9, num_not_done=9)) == [
        "no fault was brought about",
        "9 of 9 faults were not brought about, limit 10%",
    ]
    unplanned = figures(num_planned=0, num_not_done=0)
    assert why_not_clean(unplanned) == ["no fault was brought about"]


def test_a_run_that_leaves_out_many_answers_is_not_clean() -> None:
    found = why_not_clean(figures(num_unstable=8))
    assert found == ["8 of 70 answers differed in quiet and were left out, limit 10%"]


def test_a_run_with_a_leak_is_not_clean() -> None:
    assert why_not_clean(figures(leaks=["4 leader processes, 3 before"])) == ["1 leaks"]


@pytest.mark.parametrize("kind", ["gateway", "leader"])
def test_a_long_run_has_to_measure_memory(kind: str) -> None:
    (other,) = {"gateway", "leader"} - {kind}
    for measured in ({other: 1}, {other: 1, kind: 0}):
        assert why_not_clean(figures(measured=measured, load_s=300.0)) == [
            f"no {kind} lived long enough under load to say whether its memory grows"
        ]
        assert why_not_clean(figures(measured=measured, load_s=299.0)) == []
