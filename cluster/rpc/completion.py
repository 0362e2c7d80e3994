"""A whole answer out of the events of its stream."""

from __future__ import annotations

from cluster.rpc.public import Completion, Event, Finished, ScoredToken, TextDelta


class CompletionParts:
    """What has come of one answer.

    Args:
        request_id: Of the request.
    """

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[ScoredToken] = []
        self._finished: Finished | None = None

    def add(self, event: Event) -> None:
        """Take the next event."""
        if isinstance(event, TextDelta):
            self._texts.append(event.text)
            self._token_ids += event.token_ids
            self._logprobs += event.logprobs
        elif isinstance(event, Finished):
            self._finished = event

    def completion(self) -> Completion:
        """Return the answer; its stream has ended well."""
        assert self._finished is not None, "the stream raises unless it is finished"
        return Completion(
            request_id=self._request_id,
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            finish_reason=self._finished.finish_reason,
            usage=self._finished.usage,
            timings=self._finished.timings,
        )
