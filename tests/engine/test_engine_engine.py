from __future__ import annotations

import pytest
from engine_fakes import FINGERPRINT, Bench, make_request

from cluster.config import EngineConfig
from cluster.errors import InvalidArgumentError, UnavailableError
from cluster.kvstore.block_hash import block_hashes
from cluster.types import FinishReason


def test_engine_without_work_does_nothing() -> None:
    bench = Bench()
    assert not bench.engine.has_work
    assert bench.step() == []
    assert bench.executor.plans == []


def test_engine_returns_one_token_per_request_and_step() -> None:
    bench = Bench()
    bench.add("a", max_tokens=2)
    bench.add("b", range(3), max_tokens=3)
    assert [o.request_id for o in bench.step()] == ["a", "b"]
    assert [o.finish_reason for o in bench.step()] == [FinishReason.LENGTH, None]
    bench.run()
    bench.check_answers()
    bench.check_idle()
    assert bench.engine.load().num_generated_tokens == 5


def test_engine_stops_at_eos_and_frees_its_blocks_in_the_same_step() -> None:
    bench = Bench(eos_token_ids=frozenset({5}), choose=lambda tokens: min(len(tokens), 5))
    bench.add(prompt=[0, 0, 0], max_tokens=50)
    while bench.answers["r"].end is None:
        bench.step()
    assert bench.engine.load().num_free_blocks == 64
    assert bench.answers["r"].tokens == [3, 4, 5]
    assert bench.answers["r"].reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("sampling", "tokens", "reason"),
    [
        ({"stop_token_ids": (4,)}, [3, 4], FinishReason.STOP),
        ({"min_tokens": 3}, [3, 4, 6, 5], FinishReason.STOP),
        ({"ignore_eos": True, "max_tokens": 4}, [3, 4, 5, 5], FinishReason.LENGTH),
        ({"max_tokens": 1}, [3], FinishReason.LENGTH),
    ],
)
def test_engine_ends_as_sampling_says(
    sampling: dict[str, object], tokens: list[int], reason: FinishReason
) -> None:
    bench = Bench(eos_token_ids=frozenset({5}), choose=lambda tokens: min(len(tokens), 5))
    bench.add(prompt=[0, 0, 0], **{"max_tokens": 9, **sampling})
    bench.run()
    assert (bench.answers["r"].tokens, bench.answers["r"].reason) == (tokens, reason)
    bench.check_answers()


def test_engine_ends_where_the_context_is_full() -> None:
    bench = Bench(max_model_len=10, num_blocks=3, block_size=3)
    bench.add(prompt=range(7), max_tokens=100)
    bench.run()
    assert (len(bench.answers["r"].tokens), bench.answers["r"].reason) == (3, FinishReason.LENGTH)
    bench.check_answers()


def test_engine_refuses_what_never_fits_and_goes_on() -> None:
    bench = Bench(num_blocks=2)
    with pytest.raises(InvalidArgumentError, match="needs 3 KV blocks"):
        bench.add("big", range(5), max_tokens=5)
    bench.add("fits", range(5), max_tokens=4)
    bench.run()
    bench.check_answers()
    bench.check_idle()


def test_engine_refuses_an_id_that_is_being_served() -> None:
    bench = Bench()
    bench.add("r", max_tokens=1)
    with pytest.raises(InvalidArgumentError, match="is being served") as caught:
        bench.engine.add(make_request("r"))
    assert caught.value.field == "request_id"
    bench.run()
    bench.add("r", max_tokens=1)
    bench.run()


def test_engine_abort_of_the_unknown_is_fine() -> None:
    bench = Bench()
    bench.engine.abort("never seen")
    assert not bench.engine.has_work
    bench.add(max_tokens=1)
    bench.run()
    bench.engine.abort("r")
    assert not bench.engine.has_work


def test_engine_abort_while_waiting() -> None:
    bench = Bench(config=EngineConfig(max_num_seqs=1))
    bench.add("a", max_tokens=3)
    bench.add("b")
    bench.step()
    bench.engine.abort("b")
    assert bench.engine.load().num_waiting == 0
    assert {o.request_id: o.finish_reason for o in bench.step()} == {
        "a": None,
        "b": FinishReason.CANCELLED,
    }
    bench.run()
    assert all(s.seq_id == 0 for plan in bench.executor.plans for s in plan.sequences)


def test_engine_abort_of_the_only_request_needs_no_step() -> None:
    bench = Bench()
    bench.add()
    bench.engine.abort("r")
    bench.engine.abort("r")
    assert bench.engine.has_work
    assert [o.finish_reason for o in bench.step()] == [FinishReason.CANCELLED]
    assert bench.executor.plans == []
    bench.check_idle()


@pytest.mark.parametrize("num_steps", [1, 3, 5])  # in a chunk, at the first token, later
def test_engine_abort_between_steps_frees_blocks_at_once(num_steps: int) -> None:
    bench = Bench(config=EngineConfig(max_num_batched_tokens=4))
    bench.add(prompt=range(12), max_tokens=20)
    for _ in range(num_steps):
        bench.step()
    assert bench.engine.load().num_free_blocks < 64
    bench.engine.abort("r")
    assert bench.engine.load().num_free_blocks == 64
    assert [o.tokens for o in bench.step()] == [()]
    assert bench.answers["r"].reason is FinishReason.CANCELLED
    bench.check_idle()


def test_engine_abort_in_flight_frees_blocks_when_the_step_is_collected() -> None:
    bench = Bench(max_in_flight=2, config=EngineConfig(max_num_batched_tokens=8))
    bench.add("a", range(8), max_tokens=5)
    bench.add("b", range(20, 28), max_tokens=5)
    bench.step()  # a's prompt is collected, b's is in flight
    bench.engine.abort("b")
    bench.engine.check_invariants()
    assert bench.engine.load().num_running == 1
    assert bench.engine.load().num_free_blocks == 60
    assert [(o.request_id, o.finish_reason) for o in bench.step()] == [
        ("b", FinishReason.CANCELLED)
    ]
    assert bench.engine.load().num_free_blocks == 64 - 3
    bench.run()
    bench.check_idle()
    assert bench.answers["a"].tokens == bench.expected("a")[0]


def test_engine_drops_expired_requests_before_prefill() -> None:
    bench = Bench(config=EngineConfig(max_num_seqs=1))
    bench.add("a", max_tokens=6)
    bench.add("late", range(9), max_tokens=6, deadline_s=2.0)
    bench.step()
    bench.clock.advance(2.0)
    bench.step()
    end = bench.answers["late"].end
    assert end.error.startswith("DEADLINE_EXCEEDED: deadline_s=2 passed after 0 of max_tokens=6")
    assert end.queued_s == 2.0
    bench.run()
    assert all(s.seq_id == 0 for plan in bench.executor.plans for s in plan.sequences)
    bench.check_idle()


def test_engine_ends_a_running_request_at_its_deadline() -> None:
    bench = Bench(max_in_flight=2)
    bench.add("a", max_tokens=50, deadline_s=5.0)
    bench.add("b", max_tokens=8, deadline_s=100.0)
    for _ in range(4):
        bench.step()
    bench.clock.advance(5.0)
    bench.run()
    assert "DEADLINE_EXCEEDED" in bench.answers["a"].end.error
    assert bench.answers["a"].tokens
    assert bench.answers["b"].reason is FinishReason.LENGTH
    bench.clock.advance(100.0)
    bench.add("c", max_tokens=1, deadline_s=1.0)
    bench.run()
    assert bench.answers["c"].reason is FinishReason.LENGTH
    bench.check_idle()


def test_engine_reports_queueing_and_cached_tokens_at_the_end() -> None:
    bench = Bench(config=EngineConfig(max_num_seqs=1))
    bench.add("a", range(8), max_tokens=2)
    bench.add("b", range(8), max_tokens=2)
    bench.step()
    bench.clock.advance(1.5)
    bench.step()
    bench.clock.advance(0.5)
    bench.run()
    assert (bench.answers["a"].end.queued_s, bench.answers["a"].end.num_cached_tokens) == (0, 0)
    assert (bench.answers["b"].end.queued_s, bench.answers["b"].end.num_cached_tokens) == (2, 4)


def test_engine_load_counts_prompt_tokens_that_are_not_computed() -> None:
    bench = Bench(config=EngineConfig(max_num_batched_tokens=8))
    bench.add("a", range(20))
    bench.add("b", range(50, 55))
    assert bench.engine.load().num_queued_prefill_tokens == 25
    bench.step()
    assert bench.engine.load().num_queued_prefill_tokens == 17
    for _ in range(3):
        bench.step()
    load = bench.engine.load()
    assert (load.num_running, load.num_queued_prefill_tokens) == (2, 0)


def test_engine_block_events_follow_the_cache() -> None:
    bench = Bench(num_blocks=3)
    bench.add("a", range(9), max_tokens=1)
    bench.run()
    hashes = block_hashes(list(range(9)), 4, fingerprint=FINGERPRINT)
    assert bench.engine.take_block_events() == (hashes, [])
    assert bench.engine.cached_blocks() == hashes
    bench.add("b", range(30, 39), max_tokens=1)
    bench.run()
    added, removed = bench.engine.take_block_events()
    assert added == block_hashes(list(range(30, 39)), 4, fingerprint=FINGERPRINT)
    assert removed == [hashes[1], hashes[0]]


@pytest.mark.parametrize("failure", ["submit_fails", "collect_fails"])
def test_engine_failure_of_the_group_ends_every_request_once(failure: str) -> None:
    bench = Bench(max_in_flight=2, config=EngineConfig(max_num_seqs=2))
    for i in range(8):
        bench.add(f"r{i}", [i, i], max_tokens=9)
    bench.step()
    bench.engine.abort("r0")
    bench.engine.abort("r7")
    setattr(bench.executor, failure, True)
    with pytest.raises(UnavailableError):
        bench.step()
    for output in bench.engine.abort_all("UNAVAILABLE: worker 0 died"):
        bench.answers[output.request_id].take(output)
    assert all(answer.end for answer in bench.answers.values())
    assert bench.answers["r0"].reason is bench.answers["r7"].reason is FinishReason.CANCELLED
    assert bench.answers["r3"].end.error == "UNAVAILABLE: worker 0 died"
    bench.check_idle()
    with pytest.raises(UnavailableError, match="worker 0 died"):
        bench.add("late")
