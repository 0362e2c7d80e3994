"""`sluice bench resumption`: what is asked, when it is cut, what counts as the same answer."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, cast

import psutil
import pytest
from rich.console import Console

from cluster.bench.resumption import CaseResult, ResumptionBench, aims_of
from cluster.bench.resumption_cases import CASES, early_token, plain, sampling_of, stops_of
from cluster.bench.resumption_report import misses, resumption_report
from cluster.bench.resumption_stream import Answer, Cut, Followed, difference, follow
from cluster.bench.statistics import spread
from cluster.client import (
    AsyncClient,
    Event,
    Finished,
    Resumed,
    Running,
    ScoredToken,
    TextDelta,
    Timings,
    Usage,
)
from cluster.errors import InvalidArgumentError, UnavailableError
from cluster.types import FinishReason, SamplingParams
from tests.cli.cli_run import error_of, run

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, ..."
USAGE = Usage(prompt_tokens=5, completion_tokens=3, cached_tokens=0)
SCORES = tuple(ScoredToken(n, "x", -0.5, (ScoredToken(n, "x", -0.5),)) for n in (7, 8, 9))
ANSWER = Answer((7, 8, 9), "xyz", SCORES, FinishReason.LENGTH, USAGE)
FINISHED = Finished(FinishReason.LENGTH, USAGE, Timings(0.0, 0.0, 0.0))


class ScriptedClient:
    """Yields events, then fails if it is told to."""

    def __init__(self, *events: Event, error: Exception | None = None) -> None:
        self._events = events
        self._error = error

    async def stream(self, prompt: str, **options: Any) -> AsyncIterator[Event]:
        for event in self._events:
            yield event
        if self._error is not None:
            raise self._error


async def followed(client: ScriptedClient, index: int) -> tuple[Followed, list[str]]:
    killed: list[str] = []
    found = await follow(
        cast(AsyncClient, client), "x", SamplingParams(), cut=Cut(index, killed.append)
    )
    return found, killed


def tokens(*token_ids: int) -> TextDelta:
    return TextDelta("t" * len(token_ids), token_ids)


@pytest.mark.parametrize("goes_on", [Running("b"), Resumed(0.1, "b:1", 1)])
async def test_stream_is_killed_at_its_index_and_notes_where_it_went_on(goes_on: Event) -> None:
    client = ScriptedClient(
        Running("a"), tokens(1), tokens(2, 3), tokens(4), goes_on, tokens(5), FINISHED
    )
    found, killed = await followed(client, 2)
    assert killed == ["a"]
    assert found.cut_index == 4, "a token was on its way, it counts as come"
    assert found.gap_s is not None
    assert found.answer is not None and found.answer.token_ids == (1, 2, 3, 4, 5)
    assert found.answer.text == "ttttt"


async def test_stream_is_killed_before_its_first_token() -> None:
    client = ScriptedClient(Running("a"), Running("b"), tokens(1), FINISHED)
    found, killed = await followed(client, 0)
    assert killed == ["a"] and found.replica_ids == ["a", "b"]
    assert found.cut_index == 0 and found.gap_s is not None and found.gap_s < 10.0


async def test_stream_that_has_ended_is_not_killed_and_one_that_fails_says_why() -> None:
    found, killed = await followed(ScriptedClient(Running("a"), tokens(1), FINISHED), 2)
    assert (killed, found.cut_index) == ([], None)
    error = UnavailableError("gone")
    found, killed = await followed(ScriptedClient(Running("a"), tokens(1), error=error), 1)
    assert killed == ["a"] and found.answer is None and found.error == "UNAVAILABLE: gone"


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        (replace(ANSWER, token_ids=(7, 8, 8)), "token_ids differ from 2"),
        (replace(ANSWER, token_ids=(7, 8)), "token_ids differ from 2"),
        (replace(ANSWER, text="xy"), "text differ from 2"),
        (replace(ANSWER, finish_reason=FinishReason.STOP), "finish_reason"),
        (replace(ANSWER, usage=replace(USAGE, prompt_tokens=8)), "usage.prompt_tokens"),
        (replace(ANSWER, usage=replace(USAGE, completion_tokens=4)), "usage.completion_tokens"),
        (replace(ANSWER, usage=replace(USAGE, cached_tokens=4)), "usage.cached_tokens"),
        (replace(ANSWER, logprobs=SCORES[:2]), "2 log probabilities"),
        (
            replace(ANSWER, logprobs=(*SCORES[:2], replace(SCORES[2], logprob=-0.51))),
            "log probabilities differ by 0.01 at 2",
        ),
        (
            replace(ANSWER, logprobs=(*SCORES[:2], replace(SCORES[2], top=()))),
            "likeliest tokens differ at 2",
        ),
    ],
)
def test_difference_names_what_differs(changed: Answer, word: str) -> None:
    assert word in difference(changed, ANSWER, num_cached_tokens=0)


def test_difference_forgives_roundings_and_an_unknown_cache() -> None:
    rounded = replace(ANSWER, logprobs=(*SCORES[:2], replace(SCORES[2], logprob=-0.50001)))
    assert difference(rounded, ANSWER, num_cached_tokens=0) == ""
    assert difference(replace(ANSWER, usage=replace(USAGE, cached_tokens=4)), ANSWER) == ""


def test_stops_end_a_text_with_its_last_but_one_character_and_are_begun_all_over_it() -> None:
    stop, *near_misses = stops_of(TEXT)
    assert TEXT.find(stop) + len(stop) == len(TEXT) - 1
    assert len(stop) >= 40 and len(near_misses) == 15
    assert all(miss not in TEXT and miss[:-1] in TEXT for miss in near_misses)


def test_stops_refuse_a_text_without_an_end_of_its_own() -> None:
    with pytest.raises(InvalidArgumentError, match="take a longer one"):
        stops_of("la " * 100)


def test_early_token_is_the_first_of_the_rarest() -> None:
    assert early_token([4, 4, 9, 5, 9, 6]) == 5


async def test_sampling_of_every_case_is_made_from_what_the_model_says() -> None:
    asked: list[SamplingParams] = []

    async def ask(sampling: SamplingParams) -> Answer:
        asked.append(sampling)
        return replace(ANSWER, token_ids=(1, 1, 2, 3), text=TEXT)

    made = {name: await sampling_of(name, 64, ask) for name in CASES}
    assert len(set(made.values())) == len(CASES)
    assert made["greedy"] == plain("greedy", 64) and made["greedy"].temperature == 0
    assert made["repetition_penalty"].repetition_penalty == 1.3
    assert made["min_tokens"].min_tokens == 32 and made["min_tokens"].stop_token_ids == (2,)
    assert made["stop_string"].stop == stops_of(TEXT) and made["stop_string"].max_tokens > 64
    everything = made["everything"]
    assert everything.stop and everything.stop_token_ids and everything.min_tokens
    assert everything.has_penalties and everything.num_logprobs == 3 and everything.top_p == 0.9
    assert [sampling.stop for sampling in asked] == [()] * 4, "stops come from undisturbed answers"


def test_aims_cover_every_index_and_the_last() -> None:
    assert aims_of(3, 1) == [range(0, 1), range(1, 2), range(2, 3)]
    assert aims_of(64, 16)[-2:] == [range(48, 64), range(63, 64)]
    assert [aim.start for aim in aims_of(33, 16)] == [0, 16, 32]


def test_bench_refuses_unknown_cases() -> None:
    with pytest.raises(InvalidArgumentError, match="choose from greedy"):
        ResumptionBench(cases=("greedy", "luck"))
    assert ResumptionBench(kind="gateway").layout.num_gateways == 2


def figures_of(result: CaseResult, **load: str) -> dict[str, Any]:
    return {
        "load": {"kind": "replica", "dtype": "float32", "every": 1, **load},
        "cases": [result.figures()],
        "gap_s": spread(result.gaps_s),
        "num_streams": result.num_streams,
        "num_identical": result.num_identical,
        "num_failed": len(result.failed),
        "num_different": len(result.different),
        "num_missed": len(result.missed),
        "ended": [] if result.name == "greedy" else ["leader-9"],
    }


def rendered(figures: dict[str, Any]) -> str:
    console = Console(width=80, file=io.StringIO())
    with console.capture() as capture:
        console.print(resumption_report(figures))
    return capture.get()


def test_figures_of_good_streams_miss_nothing() -> None:
    result = CaseResult("greedy", 64)
    for index in range(3):
        result.count(index, Followed(ANSWER, cut_index=index, gap_s=0.05), "")
    result.count(3, Followed(ANSWER), "")  # had ended before the signal came
    figures = figures_of(result)
    assert (result.num_streams, result.num_identical, result.num_uncut) == (3, 3, 1)
    assert result.indexes == {0, 1, 2} and misses(figures) == []
    row = next(line for line in rendered(figures).splitlines() if "greedy" in line)
    assert row.split() == ["greedy", "3", "3", "0", "0", "0", "50", "50", "50"]


def test_figures_tell_what_was_lost_wrong_or_late() -> None:
    result = CaseResult("top_p", 64, missed=[9], undisturbed="text differ from 1")
    result.count(1, Followed(ANSWER, cut_index=2, gap_s=2.0), "text differ from 3")
    result.count(0, Followed(error="UNAVAILABLE: gone"), "")
    assert result.failed_indexes == {0} and result.num_identical == 0
    figures = figures_of(result)
    assert misses(figures) == [
        "1 streams differ",
        "1 streams failed",
        "top_p: two undisturbed streams differ: text differ from 1",
        "1 indexes were not met",
        "ended though nobody killed them: leader-9",
        "gap p50 is 2000 ms, asked: 300 ms",
        "gap p99 is 2000 ms, asked: 1500 ms",
    ]
    text = rendered(figures)
    assert "top_p at 2: text differ from 3" in text and "top_p at 0: UNAVAILABLE: gone" in text
    assert "1 streams differ" not in misses(figures_of(result, dtype="bfloat16"))


def test_bench_resumption_refuses_unknown_cases_before_it_starts_anything() -> None:
    assert "choose from greedy" in error_of("bench", "resumption", "--cases=luck")


@pytest.mark.integration
def test_bench_resumption_measures_and_leaves_no_process() -> None:
    before = psutil.Process().children()
    done = run("bench", "resumption", "--cases=logprobs", "--every=40", "--tokens=20", "--json")
    figures = json.loads(done.stdout)
    assert figures["num_different"] == figures["num_failed"] == figures["num_missed"] == 0
    assert figures["num_identical"] == figures["num_streams"] >= 2
    assert figures["gap_s"]["p50"] > 0 and figures["provenance"]["commit"]
    assert psutil.Process().children() == before
