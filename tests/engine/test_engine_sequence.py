from __future__ import annotations

import pytest
from engine_fakes import make_request

from cluster.engine.sequence import ModelTraits, Sequence, check_request
from cluster.errors import InvalidArgumentError
from cluster.kvstore.block_hash import block_hashes
from cluster.types import EngineRequest, FinishReason

TRAITS = ModelTraits(
    block_size=4,
    max_model_len=20,
    vocab_size=100,
    eos_token_ids=frozenset({7, 3}),
    fingerprint=b"model",
)


def make_sequence(*args: object, **kwargs: object) -> Sequence:
    return Sequence(0, make_request("r", *args, **kwargs), TRAITS, 0.0)


def test_sequence_ends_at_max_tokens() -> None:
    sequence = make_sequence([1, 2], max_tokens=2)
    assert sequence.append(9) is None
    assert sequence.append(9) is FinishReason.LENGTH


def test_sequence_ends_where_the_context_is_full() -> None:
    sequence = make_sequence(range(18), max_tokens=10)
    assert sequence.append(9) is None
    assert sequence.append(9) is FinishReason.LENGTH


@pytest.mark.parametrize("token", [3, 7, 50])
def test_sequence_ends_at_eos_and_stop_tokens(token: int) -> None:
    sequence = make_sequence(stop_token_ids=(50,))
    assert sequence.append(51) is None
    assert sequence.append(token) is FinishReason.STOP


def test_sequence_ignores_eos_but_no_stop_token() -> None:
    sequence = make_sequence(stop_token_ids=(50,), ignore_eos=True)
    assert sequence.append(3) is None
    assert sequence.append(50) is FinishReason.STOP


def test_sequence_stop_goes_before_length() -> None:
    assert make_sequence(max_tokens=1).append(3) is FinishReason.STOP


def test_sequence_bans_stops_before_min_tokens() -> None:
    sequence = make_sequence([1], min_tokens=1, stop_token_ids=(50, 3))
    spec = sequence.plan(1).sample
    assert spec is not None and spec.banned_token_ids == (3, 7, 50)
    assert sequence.append(9) is None
    spec = sequence.plan(2).sample
    assert spec is not None and spec.banned_token_ids == ()


def test_sequence_does_not_stop_before_min_tokens() -> None:
    sequence = make_sequence(min_tokens=1)
    assert sequence.append(3) is None
    assert sequence.append(3) is FinishReason.STOP


def test_sequence_bans_only_what_would_stop_it() -> None:
    sequence = make_sequence([1], min_tokens=1, stop_token_ids=(50,), ignore_eos=True)
    spec = sequence.plan(1).sample
    assert spec is not None and spec.banned_token_ids == (50,)


def test_sequence_plan_samples_at_the_end_only() -> None:
    sequence = make_sequence([1, 2, 3, 4, 5], seed=2**64 - 1, temperature=0.5, num_logprobs=2)
    sequence.block_table = (8, 9)
    part = sequence.plan(3)
    assert (part.token_ids, part.num_computed_tokens, part.sample) == ((1, 2, 3), 0, None)
    sequence.num_computed_tokens = 3
    rest = sequence.plan(2)
    assert (rest.token_ids, rest.num_computed_tokens, rest.block_table) == ((4, 5), 3, (8, 9))
    assert rest.sample is not None
    assert (rest.sample.seed, rest.sample.position) == (2**64 - 1, 5)
    assert (rest.sample.temperature, rest.sample.num_logprobs) == (0.5, 2)
    assert rest.sample.prompt_token_ids == rest.sample.output_token_ids == ()


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 1.1}, {"presence_penalty": 1.0}, {"frequency_penalty": -1.0}]
)
def test_sequence_plan_carries_seen_tokens_where_penalties_need_them(
    penalty: dict[str, float],
) -> None:
    sequence = make_sequence([1, 2], **penalty)
    sequence.append(9)
    spec = sequence.plan(3).sample
    assert spec is not None
    assert (spec.prompt_token_ids, spec.output_token_ids) == ((1, 2), (9,))


def test_sequence_block_hashes_are_the_chain() -> None:
    sequence = make_sequence(range(10), salt=b"tenant")
    expected = block_hashes(list(range(10)), 4, fingerprint=b"model", salt=b"tenant")
    assert [sequence.block_hash(1), sequence.block_hash(0)] == [expected[1], expected[0]]
    with pytest.raises(AssertionError, match="not full"):
        sequence.block_hash(2)
    sequence.append(10)
    sequence.append(11)
    grown = block_hashes(list(range(12)), 4, fingerprint=b"model", salt=b"tenant")
    assert sequence.block_hash(2) == grown[2]


@pytest.mark.parametrize(
    ("request_", "field", "message"),
    [
        (make_request(prompt=[]), "prompt", "empty"),
        (make_request(prompt=range(20)), "prompt", "20 tokens, limit=19"),
        (make_request(prompt=[1, 100]), "prompt", "token id 100, limit=99"),
        (make_request(prompt=[-1]), "prompt", "token id -1"),
        (make_request(max_tokens=0), "sampling.max_tokens", "max_tokens=0"),
        (make_request(stop_token_ids=(100,)), "sampling.stop_token_ids", "token id 100"),
        (
            make_request(stop_token_ids=tuple(range(100)), min_tokens=1),
            "sampling.stop_token_ids",
            "100 stop tokens",
        ),
    ],
)
def test_request_out_of_range_is_refused(request_: EngineRequest, field: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        check_request(request_, TRAITS, 64)
    assert caught.value.field == field


def test_request_needs_no_block_for_its_last_token() -> None:
    check_request(make_request(prompt=range(4), max_tokens=5), TRAITS, num_blocks=2)
    with pytest.raises(InvalidArgumentError, match="needs 3 KV blocks of 4 tokens, limit=2"):
        check_request(make_request(prompt=range(4), max_tokens=6), TRAITS, num_blocks=2)


def test_request_needs_no_blocks_beyond_the_context() -> None:
    check_request(make_request(prompt=range(4), max_tokens=999), TRAITS, num_blocks=5)
    with pytest.raises(InvalidArgumentError):
        check_request(make_request(prompt=range(4), max_tokens=999), TRAITS, num_blocks=4)
