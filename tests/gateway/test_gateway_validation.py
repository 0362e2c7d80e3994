from __future__ import annotations

import math
from typing import Any

import pytest

from cluster.config import GatewayConfig
from cluster.errors import InvalidArgumentError, NotFoundError
from cluster.gateway import validation
from cluster.gateway.validation import Limits
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.types import SamplingParams

LIMITS = Limits("m", max_model_len=100, vocab_size=50, gateway=GatewayConfig())


def _read(**fields: Any) -> SamplingParams:
    return validation.read_sampling(pb.SamplingParams(**fields), LIMITS, seed=7)


BAD = [
    ("max_tokens", 0),
    ("max_tokens", 101),
    ("max_tokens", 2**32 - 1),
    ("min_tokens", 101),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("top_k", 51),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_p", math.nan),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("min_p", math.nan),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", 2.1),
    ("repetition_penalty", math.nan),
    ("presence_penalty", -2.1),
    ("presence_penalty", math.nan),
    ("frequency_penalty", 2.1),
    ("frequency_penalty", math.inf),
    ("logprobs", 21),
    ("stop", ["x"] * 10_000),
    ("stop_token_ids", [1] * 129),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{n}={str(v)[:9]}" for n, v in BAD])
def test_bad_value_is_refused_with_its_path(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        _read(**{name: value})
    assert caught.value.field == f"sampling.{name}"
    assert name in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("stop", "index"), [(["ok", ""], 1), (["x" * 257], 0), (["ok", "ok", "é" * 129], 2)]
)
def test_bad_stop_string_is_named_by_its_index(stop: list[str], index: int) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        _read(stop=stop)
    assert caught.value.field == f"sampling.stop[{index}]"


def test_token_ids_out_of_the_vocabulary_are_named_by_their_index() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        validation.check_token_ids([1, 49, 50], LIMITS, field="token_ids.ids")
    assert caught.value.field == "token_ids.ids[2]"
    assert "limit=49" in str(caught.value)
    validation.check_token_ids([0, 49], LIMITS, field="token_ids.ids")
    with pytest.raises(InvalidArgumentError) as caught:
        _read(stop_token_ids=[1, 2**32 - 1])
    assert caught.value.field == "sampling.stop_token_ids[1]"


def test_good_values_arrive_and_missing_ones_have_the_documented_defaults() -> None:
    assert _read(max_tokens=3) == SamplingParams(max_tokens=3, seed=7)
    given = _read(max_tokens=1, temperature=0, top_p=1, min_p=1, stop=["a"], seed=0, logprobs=0)
    assert given == SamplingParams(
        max_tokens=1, temperature=0, min_p=1, stop=("a",), seed=0, num_logprobs=0
    )


def _fit(num_prompt_tokens: int, **fields: Any) -> SamplingParams:
    return validation.fit_context(_read(**fields), num_prompt_tokens, LIMITS, prompt_field="text")


def test_prompt_without_room_for_an_answer_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="100 tokens, limit=99") as caught:
        _fit(100)
    assert caught.value.field == "text"
    assert _fit(99).max_tokens == 1


def test_prefix_is_named_where_it_leaves_no_room() -> None:
    def fit(num_prompt_tokens: int, num_prefix_tokens: int) -> SamplingParams:
        return validation.fit_context(
            _read(),
            num_prompt_tokens,
            LIMITS,
            prompt_field="token_ids",
            num_prefix_tokens=num_prefix_tokens,
        )

    assert fit(99, 98).max_tokens == 1
    for num_prompt_tokens, num_prefix_tokens, field in (
        (100, 99, "prefix"),
        (100, 1, "prefix"),
        (101, 1, "token_ids"),  # it is too long without the prefix too
    ):
        with pytest.raises(InvalidArgumentError, match=f"{num_prefix_tokens} of them") as caught:
            fit(num_prompt_tokens, num_prefix_tokens)
        assert caught.value.field == field


def test_prompt_and_answer_have_to_fit_together() -> None:
    assert _fit(90, max_tokens=10).max_tokens == 10
    with pytest.raises(InvalidArgumentError, match=r"90 tokens .* = 101, limit=100") as caught:
        _fit(90, max_tokens=11)
    assert caught.value.field == "sampling.max_tokens"


def test_default_max_tokens_takes_what_room_there_is() -> None:
    limits = Limits("m", 1000, 50, GatewayConfig(default_max_tokens=30))
    sampling = validation.read_sampling(pb.SamplingParams(), limits, seed=1)
    for num_prompt_tokens, expected in ((10, 30), (980, 20)):
        fitted = validation.fit_context(sampling, num_prompt_tokens, limits, prompt_field="text")
        assert fitted.max_tokens == expected


def test_min_tokens_may_not_exceed_max_tokens() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        _fit(1, max_tokens=5, min_tokens=6)
    assert caught.value.field == "sampling.min_tokens"
    assert _fit(1, max_tokens=5, min_tokens=5).min_tokens == 5


@pytest.mark.parametrize("message", [pb.GenerateRequest(), pb.GenerateRequest(text="")])
def test_empty_prompt_is_refused(message: pb.GenerateRequest) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        validation.check_prompt_given(message)
    assert caught.value.field == ("text" if message.HasField("text") else "prompt")


def test_empty_token_ids_are_refused() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        validation.check_prompt_given(pb.GenerateRequest(token_ids=pb.TokenIds()))
    assert caught.value.field == "token_ids"


@pytest.mark.parametrize("request_id", ["x" * 129, "a\nb", "\x00"])
def test_bad_request_id_is_refused(request_id: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        validation.check_request_id(request_id)
    assert caught.value.field == "request_id"
    validation.check_request_id("x" * 128)


def test_unknown_model_is_not_found() -> None:
    validation.check_model("", LIMITS)
    validation.check_model("m", LIMITS)
    with pytest.raises(NotFoundError, match="'other'"):
        validation.check_model("other", LIMITS)
