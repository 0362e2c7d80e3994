"""Answers that are begun on one engine and go on at another one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine_fakes import Answer, Bench, make_request
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import StoreConfig
from cluster.engine.engine import HAND_OVER_S
from cluster.errors import InvalidArgumentError
from cluster.types import FinishReason
from tests.fakes import Content, expected_answer

PROMPT = tuple(range(1, 20))


def answer_of(bench: Bench, **kwargs: object) -> tuple[list[int], FinishReason]:
    """Return the answer of an engine that nothing happens to."""
    return expected_answer(
        make_request("r", PROMPT, **kwargs),
        choose=bench.executor.choose,
        vocab_size=bench.executor.vocab_size,
        max_model_len=bench.max_model_len,
        eos_token_ids=bench.eos_token_ids,
    )


def resume(bench: Bench, tokens: list[int], **kwargs: object) -> tuple[list[int], FinishReason]:
    """Return what an engine adds to an answer that has these tokens."""
    request = replace(make_request("r", PROMPT, **kwargs), output_token_ids=tuple(tokens))
    bench.engine.add(request)
    bench.answers["r"] = Answer()
    bench.run()
    bench.check_idle()
    answer = bench.answers["r"]
    assert answer.reason is not None
    return answer.tokens, answer.reason


@given(
    cut=st.integers(0, 12),
    min_tokens=st.integers(0, 12),
    max_in_flight=st.integers(1, 3),
    budget_tokens=st.sampled_from([3, 16, 512]),
    num_stops=st.integers(0, 40),
)
def test_answer_goes_on_behind_its_tokens_wherever_it_was_cut(
    cut: int, min_tokens: int, max_in_flight: int, budget_tokens: int, num_stops: int
) -> None:
    eos = frozenset(range(num_stops * 10))
    kwargs = {"max_tokens": 12, "min_tokens": min_tokens}
    bench = Bench(max_in_flight=max_in_flight, eos_token_ids=eos)
    tokens, reason = answer_of(bench, **kwargs)
    assert resume(bench, tokens[:cut], **kwargs) == (tokens[cut:], reason)


def test_answer_that_was_complete_ends_at_once_with_its_reason() -> None:
    bench = Bench()
    tokens, reason = answer_of(bench, max_tokens=3)
    assert resume(bench, tokens, max_tokens=3) == ([], FinishReason.LENGTH) == ([], reason)
    assert not bench.executor.plans
    stopping = Bench(eos_token_ids=frozenset({tokens[1]}))
    assert resume(stopping, tokens[:2], max_tokens=3) == ([], FinishReason.STOP)


def test_stop_token_before_min_tokens_does_not_end_a_resumed_answer() -> None:
    bench = Bench(eos_token_ids=frozenset({7}))
    added, reason = resume(bench, [7], max_tokens=4, min_tokens=3)
    assert len(added) >= 2
    assert reason in (FinishReason.LENGTH, FinishReason.STOP)


def test_tokens_beyond_max_tokens_are_refused() -> None:
    bench = Bench()
    request = replace(make_request("r", PROMPT, max_tokens=3), output_token_ids=(1, 2, 3, 4))
    with pytest.raises(InvalidArgumentError, match="4 tokens of the answer") as caught:
        bench.engine.add(request)
    assert caught.value.field == "output_token_ids"
    assert not bench.engine.has_work


def test_tokens_of_no_vocabulary_are_refused() -> None:
    bench = Bench()
    request = replace(make_request("r", PROMPT, max_tokens=3), output_token_ids=(1000,))
    with pytest.raises(InvalidArgumentError, match="token id 1000"):
        bench.engine.add(request)


def test_cached_tokens_are_those_of_the_prompt_alone() -> None:
    bench = Bench()
    tokens, _ = answer_of(bench, max_tokens=12)
    bench.add("first", PROMPT, max_tokens=12)
    bench.run()
    resume(bench, tokens[:11], max_tokens=12)
    end = bench.answers["r"].end
    assert end is not None and end.num_cached_tokens == len(PROMPT)
    assert bench.engine.load().num_prefix_hit_tokens == len(PROMPT)


def test_resumed_answer_goes_before_prompts_that_wait() -> None:
    bench = Bench(max_in_flight=1)
    tokens, _ = answer_of(bench, max_tokens=12)
    for index in range(3):
        bench.add(f"new{index}", range(100 * index + 100, 100 * index + 150), ttft_s=0.5)
    request = replace(make_request("r", PROMPT, max_tokens=12), output_token_ids=tuple(tokens[:4]))
    bench.engine.add(request)
    bench.answers["r"] = Answer()
    bench.step()
    first = bench.executor.plans[0].sequences[0]
    assert first.token_ids == (*PROMPT, *tokens[:4])


def test_objective_of_a_resumed_stream_counts_from_its_first_token_here() -> None:
    bench = Bench()
    tokens, reason = answer_of(bench, max_tokens=40)
    bench.add("first", PROMPT, max_tokens=40)  # so that all but one token are cached
    bench.run()
    added = resume(bench, tokens[:36], max_tokens=40, tpot_s=0.05)
    assert added == (tokens[36:], reason)


def test_handed_over_request_ends_with_moved_and_goes_on_elsewhere() -> None:
    bench = Bench()
    tokens, reason = answer_of(bench, max_tokens=12)
    bench.add("r", PROMPT, max_tokens=12)
    for _ in range(5):
        bench.step()
    bench.engine.hand_over("r")
    bench.engine.hand_over("nobody")
    bench.run()
    bench.check_idle()
    given_tokens = bench.answers["r"].tokens
    assert bench.answers["r"].reason is FinishReason.MOVED
    assert given_tokens == tokens[: len(given_tokens)] and 4 <= len(given_tokens) < 12
    assert resume(Bench(), given_tokens, max_tokens=12) == (tokens[len(given_tokens) :], reason)


def test_waiting_request_is_handed_over_at_once() -> None:
    bench = Bench()
    bench.add("r", PROMPT)
    bench.engine.hand_over("r")
    bench.step()
    assert bench.answers["r"].reason is FinishReason.MOVED
    bench.check_idle()


def stored_bench(store: dict[bytes, Content]) -> Bench:
    """Return an engine that computes slowly, so that its blocks are worth storing."""
    config = StoreConfig(kv_chunk_bytes=16 * 2**20)
    bench = Bench(store=store, num_host_slots=40, store_config=config)
    bench.executor.token_s = 0.02
    for index in range(30):  # so that it knows its pace
        bench.add(f"warm{index}", range(200 + index, 230 + index), max_tokens=2)
        bench.run()
    return bench


def test_blocks_of_a_handed_over_request_are_stored_first_and_found_by_the_next() -> None:
    store: dict[bytes, Content] = {}
    bench = stored_bench(store)
    before = len(store)
    tokens, reason = answer_of(bench, max_tokens=40)
    bench.add("r", PROMPT, max_tokens=40)
    for _ in range(20):
        bench.step()
    bench.engine.hand_over("r")
    while bench.answers["r"].end is None:
        bench.clock.advance(0.001)
        bench.step()
    assert bench.answers["r"].reason is FinishReason.MOVED
    given_tokens = bench.answers["r"].tokens
    # All blocks that were full then, those of the answer too.
    assert len(store) - before >= (len(PROMPT) + 18) // 4
    other = stored_bench(store)
    assert resume(other, given_tokens, max_tokens=40) == (tokens[len(given_tokens) :], reason)
    assert other.engine.load().cache.num_fetched_blocks >= (len(PROMPT) + 18) // 4 - 1


def test_silent_store_delays_a_hand_over_for_a_bounded_time() -> None:
    store: dict[bytes, Content] = {}
    bench = stored_bench(store)
    assert bench.mover is not None
    bench.add("r", PROMPT, max_tokens=150)
    for _ in range(5):
        bench.clock.advance(0.02)
        bench.step()
    bench.mover.is_silent = True
    began_s = bench.clock.now()
    bench.engine.hand_over("r")
    while bench.answers["r"].end is None:
        bench.clock.advance(0.02)
        bench.step()
    assert bench.answers["r"].reason is FinishReason.MOVED
    assert HAND_OVER_S <= bench.clock.now() - began_s <= HAND_OVER_S + 0.1


def test_aborted_request_is_not_handed_over_any_more() -> None:
    bench = Bench()
    bench.add("r", PROMPT)
    bench.step()
    bench.engine.hand_over("r")
    bench.engine.abort("r")
    bench.run()
    assert bench.answers["r"].reason is FinishReason.CANCELLED
    bench.check_idle()
