from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.config import ModelConfig
from cluster.gateway.answer import Answer
from cluster.gateway.tokenizer import Tokenizer
from cluster.types import EngineOutput, FinishReason, SampledToken, SamplingParams

TOKENIZER = Tokenizer.load(ModelConfig())


def _answer(token_ids: list[int], sampling: SamplingParams, sizes: list[int]) -> tuple[str, Answer]:
    """Feed outputs of one token each, as many at a time as `sizes` says."""
    last = len(token_ids) - 1
    outputs = [
        EngineOutput(
            "r", (SampledToken(token),), finish_reason=FinishReason.LENGTH if i == last else None
        )
        for i, token in enumerate(token_ids)
    ]
    answer, text, num_tokens = Answer(TOKENIZER, sampling), "", 0
    while answer.finish_reason is None:
        size = sizes.pop() if sizes else 1
        batch, outputs = outputs[:size], outputs[size:]
        delta = answer.feed(batch)
        text += delta.text
        num_tokens += len(delta.token_ids)
    assert num_tokens == answer.num_tokens
    return text, answer


_stops = st.lists(st.text(alphabet="ab é", min_size=1, max_size=3), max_size=3).map(tuple)


@given(
    st.text(alphabet="ab é世", min_size=1, max_size=20),
    _stops,
    st.integers(0, 5),
    st.lists(st.integers(1, 7), max_size=10),
)
def test_answer_does_not_depend_on_how_outputs_are_merged(
    text: str, stops: tuple[str, ...], min_tokens: int, sizes: list[int]
) -> None:
    sampling = SamplingParams(stop=stops, min_tokens=min_tokens)
    tokens = list(TOKENIZER._encode(text, continues=False))
    merged, merged_answer = _answer(tokens, sampling, sizes)
    single, single_answer = _answer(tokens, sampling, [])
    assert merged == single
    assert merged_answer.num_tokens == single_answer.num_tokens
    assert merged_answer.finish_reason == single_answer.finish_reason
    if not stops:
        assert merged == text
    if min_tokens == 0:
        assert not any(stop in merged for stop in stops)


def test_usage_counts_up_to_the_token_that_completes_the_stop() -> None:
    tokens = list(TOKENIZER._encode("one two three four", continues=False))
    text, answer = _answer(tokens, SamplingParams(stop=("two",)), [len(tokens)])
    expected = next(n for n in range(len(tokens)) if "two" in TOKENIZER.decode(tokens[:n]))
    assert (text, answer.num_tokens) == ("one ", expected)
    assert answer.finish_reason is FinishReason.STOP


def test_stop_before_min_tokens_does_not_count() -> None:
    tokens = list(TOKENIZER._encode("ab", continues=False)) * 3
    text, _ = _answer(tokens, SamplingParams(stop=("b",), min_tokens=len(tokens) // 3 + 1), [])
    assert text == "aba"


def test_held_text_comes_out_at_the_end() -> None:
    tokens = list(TOKENIZER._encode("x EN", continues=False))
    text, answer = _answer(tokens, SamplingParams(stop=("END",)), [])
    assert (text, answer.finish_reason) == ("x EN", FinishReason.LENGTH)
