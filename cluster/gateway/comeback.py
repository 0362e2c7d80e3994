"""A client that has come back: what it has of the answer, what it lacks, what only it knows.

    tokens of the answer    |<---- journal ---->|
    received, behind it     |<- received ->|<-->|  lacking: sent at once
    received, ahead of it   |<---- received ------->|  ahead: the journal lagged

Tokens that only the client has are taken from it, unless log probabilities were asked for, which it
does not tell: then a replica generates them once more, they are compared, and not sent again.
"""

from __future__ import annotations

from dataclasses import replace

from cluster.gateway.answer import Answer
from cluster.gateway.journal import RequestJournal
from cluster.gateway.parts import Resumption
from cluster.rpc.sluice.v1 import inference_pb2
from cluster.types import EngineOutput, SampledToken


class ContradictionError(Exception):
    """Tokens came out otherwise than the client has them; those of the client were taken."""


class Comeback:
    """Brings an answer to where its client has it.

    Args:
        resume: What is known.
        answer: New.
        journal: Takes notes from now on.
        has_logprobs: Whether log probabilities were asked for.
    """

    def __init__(
        self, resume: Resumption, answer: Answer, journal: RequestJournal, *, has_logprobs: bool
    ) -> None:
        self._state, self._point = resume.state, resume.point
        self._answer = answer
        self._journal = journal
        self._has_logprobs = has_logprobs
        self._unconfirmed: tuple[SampledToken, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether the answer has all that the client has."""
        return not self._unconfirmed

    def replay(self) -> inference_pb2.TokenDelta:
        """Take what is known; return what the client lacks of it."""
        state, point, answer = self._state, self._point, self._answer
        received, lacking = point.tokens[: point.num_received], point.tokens[point.num_received :]
        ahead = received[len(state.tokens) :]
        if self._has_logprobs:
            received, self._unconfirmed = received[: len(state.tokens)], ahead
        answer.replay(received)
        if not self._has_logprobs:
            self._note(ahead)
        answer.num_cached_tokens = state.num_cached_tokens  # when the first token came
        return answer.feed(
            [EngineOutput("", lacking, state.num_cached_tokens, state.finish_reason)]
        )

    def confirm(self, outputs: list[EngineOutput]) -> list[EngineOutput]:
        """Take tokens that the client has already; return what is new.

        Raises:
            ContradictionError: In this precision another batch gives others: it is to go on behind
                those that the client has.
        """
        tokens = tuple(token for output in outputs for token in output.tokens)
        num_tokens = min(len(tokens), len(self._unconfirmed))
        confirmed, rest = tokens[:num_tokens], self._unconfirmed
        is_same = _ids(confirmed) == _ids(rest[:num_tokens])
        self._unconfirmed = rest[num_tokens:] if is_same else ()
        taken = confirmed if is_same else rest
        self._answer.feed([EngineOutput("", taken, outputs[0].num_cached_tokens)])
        self._note(tuple(self._answer.new_tokens))
        if not is_same:
            raise ContradictionError
        return [replace(outputs[-1], tokens=tokens[num_tokens:])]

    def _note(self, tokens: tuple[SampledToken, ...]) -> None:
        """Put tokens of the client's last event into the journal."""
        if tokens:
            seq, fingerprint = self._point.next_seq - 1, self._state.fingerprint
            self._journal.note(seq, tokens, fingerprint=fingerprint)


def _ids(tokens: tuple[SampledToken, ...]) -> list[int]:
    return [token.token_id for token in tokens]
