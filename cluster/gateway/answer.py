"""From an engine's tokens to what a client sees of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cluster.gateway.stop import StopMatcher
from cluster.gateway.tokenizer import Detokenizer, Tokenizer
from cluster.rpc.sluice.v1 import inference_pb2
from cluster.types import EngineOutput, FinishReason, SampledToken, SamplingParams

_FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}


class Answer:
    """One answer as it grows: text, stop strings, counts.

    It does not depend on how its tokens were cut into outputs, nor on which replicas they came
    from. After `feed` has set `finish_reason`, nothing more is taken.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer)
        self._matcher = StopMatcher(sampling.stop) if sampling.stop else None
        self._min_tokens = sampling.min_tokens
        self.finish_reason: FinishReason | None = None
        self.token_ids: list[int] = []  # up to and including the one that completed a stop string
        self.new_tokens: list[SampledToken] = []  # of these, what the last `feed` brought
        self.num_cached_tokens = 0  # of the prompt, where the first token came from
        self.engine_queued_s = 0.0  # in the engine, before the first step

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return len(self.token_ids)

    def replay(self, tokens: Sequence[SampledToken]) -> None:
        """Take tokens that the client has, with all that followed from them."""
        self.feed([EngineOutput("", tuple(tokens))])

    def feed(
        self, outputs: Iterable[EngineOutput], *, tail_is_due: bool = False
    ) -> inference_pb2.TokenDelta:
        """Take outputs that did not fail; return their text and tokens as one delta.

        Args:
            outputs: In order.
            tail_is_due: Whether an end without a token brings the text that was held back: the
                client has not got the last token yet.
        """
        tokens: list[SampledToken] = []
        end: FinishReason | None = None
        for output in outputs:
            tokens.extend(output.tokens)
            if not self.token_ids:
                self.num_cached_tokens = output.num_cached_tokens
            if output.finish_reason is not None:
                end, self.engine_queued_s = output.finish_reason, output.queued_s
        if self._matcher is None:
            text = self._detokenizer.push([token.token_id for token in tokens]) if tokens else ""
        else:
            text, num_used = self._match(self._matcher, tokens)
            del tokens[num_used:]
        self.new_tokens = tokens
        self.token_ids.extend(token.token_id for token in tokens)
        if self.finish_reason is None and end is not None:
            rest = self._flush(end)
            # The end comes with the last token. Alone it is that of an answer that was complete
            # before it went on here: its client has had the rest of the text with that token.
            text += rest if tokens or tail_is_due else ""
        return inference_pb2.TokenDelta(
            text=text,
            token_ids=[token.token_id for token in tokens],
            logprobs=self._logprobs(tokens),
        )

    def _match(self, matcher: StopMatcher, tokens: Sequence[SampledToken]) -> tuple[str, int]:
        """Return the text up to a stop string and how many of the tokens lead there."""
        pieces: list[str] = []
        for index, token in enumerate(tokens, start=1):
            piece, is_match = matcher.feed(
                self._detokenizer.push((token.token_id,)),
                is_armed=self.num_tokens + index >= self._min_tokens,
            )
            pieces.append(piece)
            if is_match:
                self.finish_reason = FinishReason.STOP
                return "".join(pieces), index
        return "".join(pieces), len(tokens)

    def _flush(self, end: FinishReason) -> str:
        text = self._detokenizer.flush()
        self.finish_reason = end
        if self._matcher is None:
            return text
        piece, is_match = self._matcher.feed(text)
        if is_match:
            self.finish_reason = FinishReason.STOP
            return piece
        return piece + self._matcher.flush()

    def _logprobs(self, tokens: Sequence[SampledToken]) -> list[inference_pb2.PositionLogprobs]:
        return [
            inference_pb2.PositionLogprobs(
                chosen=self._logprob(token.token_id, token.logprob),
                top=[self._logprob(item.token_id, item.logprob) for item in token.top],
            )
            for token in tokens
            if token.logprob is not None
        ]

    def _logprob(self, token_id: int, logprob: float) -> inference_pb2.TokenLogprob:
        text = self._tokenizer.token_text(token_id)
        return inference_pb2.TokenLogprob(token_id=token_id, logprob=logprob, text=text)


def finished_event(
    answer: Answer, *, num_prompt_tokens: int, queued_s: float, ttft_s: float, total_s: float
) -> inference_pb2.Finished:
    """Return the last event of a complete answer."""
    assert answer.finish_reason is not None, "it is complete"
    return inference_pb2.Finished(
        finish_reason=_FINISH_REASONS[answer.finish_reason],
        usage=inference_pb2.Usage(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=answer.num_tokens,
            cached_tokens=answer.num_cached_tokens,
        ),
        timings=inference_pb2.Timings(queued_s=queued_s, ttft_s=ttft_s, total_s=total_s),
    )
