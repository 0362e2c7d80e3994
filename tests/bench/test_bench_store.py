"""Parts of `sluice bench store` that need no server: sizes, ratios, what counts as what."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.bench.engine_drive import Emit
from cluster.bench.store import StoreBench
from cluster.bench.store_decode import DecodeLoad, figures_of, round_figures
from cluster.bench.store_faults import FaultLoad, growth, phase_figures
from cluster.bench.store_open_load import Catalogue, OpenLoad, Phase
from cluster.bench.store_paths import Series
from cluster.bench.store_prefix import PrefixLoad, ways_figures
from cluster.bench.store_raw import figures_of as raw_figures
from cluster.bench.store_raw import make_batches
from cluster.bench.store_redis import redis_url
from cluster.bench.store_replica import StoreStep
from cluster.clock import VirtualClock
from cluster.errors import InvalidArgumentError, SluiceError
from cluster.types import EngineOutput, EngineRequest, FinishReason, SampledToken


def test_store_bench_refuses_parts_that_it_does_not_know() -> None:
    for parts in (("raw", "speed"), ()):
        with pytest.raises(InvalidArgumentError, match="choose from raw,budget,ttft") as caught:
            StoreBench(parts=parts)
        assert caught.value.field == "parts"


def test_store_bench_has_blocks_for_the_largest_of_its_parts() -> None:
    decode = DecodeLoad(num_streams=2, stream_input_tokens=16, stream_output_tokens=16)
    ttft = StoreBench(parts=("ttft",), prompt_tokens=2000, decode=decode)
    assert ttft.num_blocks(16, 64) == 126
    assert ttft.num_slots(16) == 4 * 126
    assert ttft.num_sequence_tokens == 2002
    prefix = StoreBench(parts=("prefix",), prefix=PrefixLoad(1000, 512, 16, 8))
    assert prefix.num_blocks(16, 64) == 65 * 34
    assert prefix.num_blocks(16, 4) == 5 * 34
    assert StoreBench(parts=("raw",)).num_sequence_tokens == 1


def test_redis_url_with_a_password_is_refused_and_not_repeated() -> None:
    for url in ("redis://:hunter2@host:1/0", "rediss://me:hunter2@host/0"):
        with pytest.raises(InvalidArgumentError) as caught, redis_url(url):
            pass
        assert caught.value.field == "redis" and "env:NAME" in str(caught.value)
        assert "hunter2" not in str(caught.value)


def test_redis_url_takes_one_server_by_name_or_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BENCH_REDIS", "redis://:hunter2@host:1/0")
    for url in ("redis://host:1/0", "unix:///run/redis.sock", "env:BENCH_REDIS"):
        with redis_url(url) as found:
            assert found == url
    monkeypatch.setenv("BENCH_REDIS", "redis+cluster://host:1")
    for url in ("embedded", "redis+sentinel://host/main", "env:BENCH_REDIS"):
        with pytest.raises(InvalidArgumentError, match="scheme"), redis_url(url):
            pass


def test_batches_hold_every_block_once() -> None:
    batches = make_batches(100, 7, 3)
    assert [len(batch.hashes) for batch in batches] == [3, 3, 1]
    assert len({h for batch in batches for h in batch.hashes}) == 7
    assert all(len(value) == 100 for batch in batches for value in batch.values)


def test_raw_ratio_is_the_median_of_those_within_a_round() -> None:
    reference = [Series(100.0, [1.0]), Series(10.0, [1.0]), Series(1000.0, [1.0])]
    own = [Series(40.0, [1.0, 3.0]), Series(5.0, [2.0]), Series(900.0, [2.0])]
    figures = raw_figures(own, reference)
    assert figures["ratio"] == pytest.approx(0.5), "of 0.4, 0.5, 0.9"
    assert figures["bytes_per_s"] == 40.0
    assert figures["p50_s"] == 2.0


def steps(*wall_s: float, is_moving: bool = False) -> list[StoreStep]:
    return [StoreStep(2, 2, 0, is_moving, value) for value in wall_s]


def test_decode_compares_the_steps_while_blocks_move() -> None:
    found = {
        "without": steps(*[1.0] * 9),
        "with": steps(*[1.0] * 9) + steps(*[3.0] * 5, is_moving=True),
        "again": steps(*[2.0] * 9),
    }
    one = round_figures(found)
    assert one["moving"] == {"num_steps": 5, "p50_s": 3.0, "p99_s": 3.0}
    assert one["with"]["p50_s"] == 1.0
    figures = figures_of([one, one])
    assert figures["p99_ratio_while_moving"] == 3.0
    assert figures["p99_ratio_of_all"] == 3.0
    assert figures["p99_ratio_of_two_without"] == 2.0


def test_decode_says_so_where_too_few_steps_saw_blocks_move() -> None:
    found = {"without": steps(1.0), "with": steps(1.0) + steps(1.0, is_moving=True)}
    with pytest.raises(SluiceError, match="during 1 decode steps, at least 5"):
        round_figures(found | {"again": steps(1.0)})


def test_a_step_decodes_where_every_sequence_has_one_token() -> None:
    assert StoreStep(3, 3, 0, False, 1.0).is_decode
    assert not StoreStep(3, 4, 0, False, 1.0).is_decode
    assert not StoreStep(0, 0, 2, True, 1.0).is_decode, "it only copies"


def test_prefix_throughput_is_a_multiple_of_that_without_a_cache() -> None:
    def one(rate: float) -> dict[str, Any]:
        return {
            "requests_per_s": rate,
            "out_tokens_per_s": 8 * rate,
            "ttft_s": {"p50": 1 / rate},
            "cached_token_share": 0.5,
            "fetched_blocks": 4,
        }

    figures = ways_figures({"without": [one(2.0), one(4.0)], "local": [one(6.0), one(12.0)]})
    assert figures["without"]["times"] == 1.0
    assert figures["local"]["times"] == 3.0


class ScriptedReplica:
    """Answers with the prompt's first tokens, one per step, a second each; index 2 fails."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.steps: list[Any] = []
        self.outputs: dict[str, list[int]] = {}
        self.engine = SimpleNamespace(step=lambda: clock.advance(1.0))
        self.arrivals_s: list[float] = []
        self.wrong = -1  # the request that gets another answer
        self._open: list[tuple[EngineRequest, int]] = []

    def add(self, request: EngineRequest) -> None:
        self.arrivals_s.append(self.clock.now())
        self._open.append((request, 0))

    def step(self, emit: Emit) -> None:
        self.clock.advance(1.0)
        going, self._open = self._open, []
        for request, num_given in going:
            number = int(request.request_id.removeprefix("load"))
            if number == 2:
                emit(EngineOutput(request.request_id, error="UNAVAILABLE: gone"))
                continue
            token_id = request.prompt_token_ids[num_given] + (number == self.wrong)
            is_last = num_given + 1 == request.sampling.max_tokens
            reason = FinishReason.LENGTH if is_last else None
            token = SampledToken(token_id, 0.0)
            emit(EngineOutput(request.request_id, (token,), 0, reason))
            if not is_last:
                self._open.append((request, num_given + 1))


def make_catalogue(num_requests: int = 4) -> Catalogue:
    catalogue = Catalogue(num_requests, prompt_tokens=10, answer_tokens=10, vocab_size=50, seed=0)
    catalogue.learn({r.request_id: list(r.prompt_token_ids) for r in catalogue.requests})
    return catalogue


def make_load(replica: ScriptedReplica, max_at_once: int = 99) -> OpenLoad:
    return OpenLoad(
        cast(Any, replica),
        make_catalogue(),
        rate_per_s=0.5,
        max_at_once=max_at_once,
        clock=replica.clock,
    )


def test_catalogue_gives_each_request_once_before_any_again() -> None:
    catalogue = make_catalogue()
    first = [catalogue.next() for _ in range(4)]
    second = [catalogue.next() for _ in range(4)]
    assert (
        sorted(index for index, _ in first) == sorted(index for index, _ in second) == [0, 1, 2, 3]
    )
    ids = [request.request_id for _, request in first + second]
    assert len(set(ids)) == 8
    for index, request in first:
        assert request.prompt_token_ids == catalogue.requests[index].prompt_token_ids


def test_open_load_sends_at_its_rate_and_counts_failures_and_other_answers() -> None:
    clock = VirtualClock()
    replica = ScriptedReplica(clock)
    replica.wrong = 1
    load = make_load(replica)
    phase = load.run("some", 29.0)
    assert replica.arrivals_s == [float(2 * n) for n in range(15)]
    assert phase.num_failed == 1, "number 2"
    assert phase.num_different == 1, "number 1"
    assert phase.num_ended == 9, "those of 0, 2, 6 ... 18 s, 10 s each"
    assert phase.tpot_s == [1.0] * 10, "one more has enough tokens already"
    assert phase.ttft_s == [1.0] * 14
    last = load.finish()
    assert (last.name, last.num_ended) == ("end", 5)


def test_open_load_counts_a_streams_tokens_in_the_phase_where_they_came() -> None:
    load = make_load(ScriptedReplica(VirtualClock()))
    early, late = load.run("early", 5.0), load.run("late", 6.0)
    assert len(early.gaps_s) == 4 + 2 and not early.tpot_s, "fewer tokens than a TPOT needs"
    assert len(late.gaps_s) == 5 + 6 + 4 + 2
    assert not early.num_ended and late.num_ended == 1


def test_open_load_holds_back_what_is_too_much_and_counts_the_wait() -> None:
    replica = ScriptedReplica(VirtualClock())
    load = make_load(replica, max_at_once=1)
    phase = load.run("some", 12.0)
    assert replica.arrivals_s == [0.0, 10.0]
    assert phase.ttft_s == [1.0, 9.0], "the second one was due at 2 s"


def test_open_load_ends_a_phase_when_told_to() -> None:
    clock = VirtualClock()
    load = make_load(ScriptedReplica(clock))
    phase = load.run("recovery", 100.0, is_over=lambda: clock.now() >= 3.0)
    assert phase.seconds == 3.0


def test_phases_of_one_kind_are_taken_together() -> None:
    one = Phase("x", tpot_s=[1.0], num_running=[2], num_ended=1, num_failed=1)
    other = Phase("x", tpot_s=[3.0], num_running=[4], num_ended=1, num_different=2)
    figures = phase_figures([one, other])
    assert figures["num_requests"] == 2 and figures["tpot_p50_s"] == 2.0
    assert figures["streams_p50"] == 3.0
    assert (figures["num_failed"], figures["num_different"]) == (1, 2)
    assert phase_figures([Phase("empty")])["tpot_p99_s"] is None


def test_growth_is_known_where_both_times_are() -> None:
    assert growth(1.1, 1.0) == pytest.approx(0.1)
    assert growth(None, 1.0) is None and growth(1.0, None) is None


def test_fault_load_keeps_most_of_its_catalogue_in_the_store_alone() -> None:
    load = FaultLoad()
    in_catalogue = load.num_requests * load.prompt_tokens // 16
    of_streams = load.num_streams * load.num_tokens // 16
    assert load.max_at_once * load.num_tokens / 16 < load.num_blocks(16)
    assert load.num_blocks(16) - of_streams + load.num_slots(16) < 0.5 * in_catalogue
