"""A client that has come back: what it has of the answer, what it lacks, what only it knows.

    tokens of the answer    |<---- journal ---->|
    received, behind it     |<- received ->|<-->|  lacking: sent at once
    received, ahead of it   |<---- received ------->|  ahead: the journal lagged

Tokens that only the client has are taken from it, unless log probabilities were asked for, which it
does not tell: then a replica generates them once more, they are compared, and not sent again.

The last of what is lacking waits for what follows. Should it be the end of the answer, which the
journal does not know yet, then the text that was held back behind it goes with it, in one event: a
client that has the last token has all of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from cluster.errors import FailedPreconditionError
from cluster.gateway.answer import Answer
from cluster.gateway.journal import RequestJournal
from cluster.gateway.parts import Resumption
from cluster.gateway.stream import PIECE_TOKENS
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
        self._waiting: inference_pb2.TokenDelta | None = None

    @property
    def is_over(self) -> bool:
        """Whether the client has been sent what it lacked, and the answer has what it has."""
        return not self._unconfirmed and self._waiting is None

    def replay(self) -> Iterator[inference_pb2.TokenDelta]:
        """Take what is known; yield what the client lacks of it and need not wait."""
        state, point, answer = self._state, self._point, self._answer
        received, lacking = point.tokens[: point.num_received], point.tokens[point.num_received :]
        ahead = received[len(state.tokens) :]
        if self._has_logprobs:
            received, self._unconfirmed = received[: len(state.tokens)], ahead
        answer.replay(received)
        if not self._has_logprobs:
            self._note(ahead)
        answer.num_cached_tokens = state.num_cached_tokens  # when the first token came
        pieces = [
            lacking[start : start + PIECE_TOKENS] for start in range(0, len(lacking), PIECE_TOKENS)
        ]
        if state.finish_reason is not None:
            *pieces, last = pieces or [()]
        for piece in pieces:
            if self._waiting is not None:
                yield self._waiting
            self._waiting = answer.feed([EngineOutput("", piece, state.num_cached_tokens)])
        if state.finish_reason is not None:
            end = EngineOutput("", last, state.num_cached_tokens, state.finish_reason)
            self._waiting = _joined(self._waiting, answer.feed([end]))
        if answer.finish_reason is not None and self._waiting is not None:
            delta, self._waiting = self._waiting, None
            if delta.token_ids or delta.text:
                yield delta

    def feed(self, outputs: list[EngineOutput]) -> inference_pb2.TokenDelta:
        """Take a replica's outputs; return what the client has not seen.

        Raises:
            ContradictionError: In this precision another batch gives others than the client has: it
                is to go on behind those.
        """
        if self._unconfirmed:
            outputs = self._confirm(outputs)
            if self._answer.finish_reason is not None:
                return inference_pb2.TokenDelta()
        waiting, self._waiting = self._waiting, None
        delta = self._answer.feed(outputs, tail_is_due=waiting is not None)
        return _joined(waiting, delta)

    def _confirm(self, outputs: list[EngineOutput]) -> list[EngineOutput]:
        """Take tokens that the client has already; return what is new."""
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


def _joined(
    first: inference_pb2.TokenDelta | None, second: inference_pb2.TokenDelta
) -> inference_pb2.TokenDelta:
    if first is None:
        return second
    return inference_pb2.TokenDelta(
        text=first.text + second.text,
        token_ids=[*first.token_ids, *second.token_ids],
        logprobs=[*first.logprobs, *second.logprobs],
    )


def _ids(tokens: tuple[SampledToken, ...]) -> list[int]:
    return [token.token_id for token in tokens]


def fingerprint_of(resume: Resumption, kinds: Sequence[tuple[str, int, str]]) -> str:
    """Return which model a request's tokens are from, hex; empty: there are none.

    Args:
        resume: The request.
        kinds: Of the replicas that are there: fingerprint, block size, model.

    Raises:
        FailedPreconditionError: Nobody knows: the gateway died before it had told the journal.
    """
    fingerprints = {fingerprint for fingerprint, _, _ in kinds}
    if resume.state.fingerprint or not resume.point.tokens or not fingerprints:
        return resume.state.fingerprint
    if len(fingerprints) > 1:
        raise FailedPreconditionError(
            "several versions of the model are served, and it is not known which one began the "
            "answer: send the request anew"
        )
    return fingerprints.pop()
