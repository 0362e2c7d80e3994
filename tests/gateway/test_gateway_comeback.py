"""What a client that comes back has, lacks, and is not sent again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster.config import ModelConfig
from cluster.gateway.answer import Answer
from cluster.gateway.comeback import Comeback, ContradictionError
from cluster.gateway.journal_record import JournalHeader, JournalState
from cluster.gateway.parts import Resumption
from cluster.gateway.resume_point import resume_point
from cluster.gateway.tokenizer import Tokenizer
from cluster.types import EngineOutput, FinishReason, SampledToken, SamplingParams

TOKENIZER = Tokenizer.load(ModelConfig())
TOKENS = tuple(SampledToken(token, -0.5 - token, ()) for token in range(70, 80))
IDS = [token.token_id for token in TOKENS]
TEXT = TOKENIZER.decode(IDS)


@dataclass
class Notes:
    """A journal that remembers what was noted."""

    tokens: list[SampledToken] = field(default_factory=list)
    seqs: list[int] = field(default_factory=list)

    def note(self, seq: int, tokens: Any, **facts: Any) -> None:
        self.seqs.append(seq)
        self.tokens += tokens


class Scene:
    """A journal that knows `num_known` tokens, and a client that has `num_received`."""

    def __init__(self, num_known: int, num_received: int, **sampling: Any) -> None:
        params = SamplingParams(max_tokens=10, **sampling)
        header = JournalHeader("r", "", (1, 2, 3), params)
        marks = tuple((seq, seq) for seq in range(num_known + 1))  # event 0 is `running`
        state = JournalState(header, TOKENS[:num_known], marks, num_known, "ab", 2)
        point = resume_point(state, num_received, IDS[:num_received])
        self.answer = Answer(TOKENIZER, params)
        self.notes = Notes()
        has_logprobs = params.num_logprobs >= 0
        self.comeback = Comeback(
            Resumption(state, point, "owner"),
            self.answer,
            self.notes,  # type: ignore[arg-type]
            has_logprobs=has_logprobs,
        )
        self.journalled = list(TOKENS[:num_known])


@pytest.mark.parametrize("num_known", [0, 4, 10])
@pytest.mark.parametrize("num_received", [0, 3, 4, 7, 10])
def test_client_is_sent_what_it_lacks_and_its_own_tokens_are_taken(
    num_known: int, num_received: int
) -> None:
    scene = Scene(num_known, num_received)
    assert not list(scene.comeback.replay())  # it goes with what follows
    had = TOKENIZER.decode(IDS[:num_received])
    most = max(num_known, num_received)
    assert scene.answer.token_ids == IDS[:most]
    assert scene.comeback.is_over == (num_received >= num_known)
    rest = [EngineOutput("r", (token,), 2) for token in TOKENS[most:]]
    end = EngineOutput("r", (), 2, FinishReason.LENGTH)
    delta = scene.comeback.feed([*rest, end])
    assert list(delta.token_ids) == IDS[num_received:]
    assert had + delta.text == TEXT
    assert scene.comeback.is_over
    assert [t.token_id for t in scene.notes.tokens] == IDS[num_known:num_received]
    assert set(scene.notes.seqs) <= {num_received}


@pytest.mark.parametrize("size", [1, 2, 5])
def test_log_probabilities_of_what_only_the_client_has_are_computed_once_more(size: int) -> None:
    scene = Scene(4, 7, num_logprobs=0)
    assert not list(scene.comeback.replay())
    assert scene.answer.token_ids == IDS[:4] and not scene.comeback.is_over
    sent: list[int] = []
    for start in range(4, 10, size):
        outputs = [EngineOutput("r", (token,), 2) for token in TOKENS[start : start + size]]
        taker = scene.answer if scene.comeback.is_over else scene.comeback
        sent += taker.feed(outputs).token_ids
    assert sent == IDS[7:]
    assert scene.notes.tokens == list(TOKENS[4:7])  # with their log probabilities
    assert scene.answer.token_ids == IDS and scene.answer.num_cached_tokens == 2


def test_answer_that_ends_with_what_the_client_has_is_not_sent_again() -> None:
    scene = Scene(4, 10, num_logprobs=0)
    assert not list(scene.comeback.replay())
    last = EngineOutput("r", TOKENS[9:], 2, FinishReason.LENGTH)
    outputs = [*(EngineOutput("r", (token,), 2) for token in TOKENS[4:9]), last]
    delta = scene.comeback.feed(outputs)
    assert scene.answer.finish_reason is FinishReason.LENGTH
    assert not delta.token_ids and not delta.text


def test_other_tokens_than_the_client_has_give_way_to_those() -> None:
    scene = Scene(4, 7, num_logprobs=0)
    assert not list(scene.comeback.replay())
    scene.comeback.feed([EngineOutput("r", (TOKENS[4],), 2)])
    with pytest.raises(ContradictionError):
        scene.comeback.feed([EngineOutput("r", (SampledToken(999, -1.0),), 2)])
    assert scene.answer.token_ids == IDS[:7]
    assert [t.token_id for t in scene.notes.tokens] == IDS[4:7]
    assert scene.comeback.is_over


def test_text_that_is_held_back_comes_with_the_last_token_or_not_again() -> None:
    stop = (TEXT[-1] + "~",)  # the answer ends in what could become it
    for num_received in (9, 10):
        scene = Scene(10, num_received, stop=stop)
        assert not list(scene.comeback.replay())
        delta = scene.comeback.feed([EngineOutput("r", (), 2, FinishReason.LENGTH)])
        had = TOKENIZER.decode(IDS[:num_received])
        # Who has the last token has had the text that was held back behind it with it.
        assert had + delta.text == TEXT


def test_long_rest_is_sent_in_pieces_and_the_last_one_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.gateway.comeback.PIECE_TOKENS", 3)
    scene = Scene(10, 1)
    pieces = list(scene.comeback.replay())
    assert [list(piece.token_ids) for piece in pieces] == [IDS[1:4], IDS[4:7]]
    delta = scene.comeback.feed([EngineOutput("r", (), 2, FinishReason.LENGTH)])
    assert list(delta.token_ids) == IDS[7:]
    assert TOKENIZER.decode(IDS[:1]) + "".join(p.text for p in pieces) + delta.text == TEXT
