"""What lies between a leader's session and the client's stream of one request."""

from __future__ import annotations

import asyncio
from itertools import accumulate

from cluster.errors import SluiceError
from cluster.types import EngineOutput

PIECE_TOKENS = 1024
"""Sent in one event: more, with many log probabilities, hold up others and exceed a message."""


class OutputStream:
    """Outputs of one request that its client has not been sent yet.

    A slow reader makes it grow, up to the request's `max_tokens`; `PIECE_TOKENS` of it are taken at
    once, so that a reader who has fallen behind gets fewer and larger messages.
    """

    def __init__(self) -> None:
        self._outputs: list[EngineOutput] = []
        self._error: SluiceError | None = None
        self._wakeup = asyncio.Event()

    def push(self, output: EngineOutput) -> None:
        """Append an output."""
        self._outputs.append(output)
        self._wakeup.set()

    def fail(self, error: SluiceError) -> None:
        """End the stream with an error, after what was pushed before."""
        self._error = error
        self._wakeup.set()

    async def take(self) -> list[EngineOutput]:
        """Return the outputs that are there, as soon as there is one, up to `PIECE_TOKENS`.

        It ends at the latest when the leader's connection is given up.

        Raises:
            SluiceError: The stream failed, and all that came before is taken.
        """
        while not self._outputs:
            if self._error is not None:
                raise self._error
            await self._wakeup.wait()
            self._wakeup.clear()
        num_tokens = accumulate(len(output.tokens) for output in self._outputs)
        num_outputs = max(1, sum(num <= PIECE_TOKENS for num in num_tokens))
        outputs, self._outputs = self._outputs[:num_outputs], self._outputs[num_outputs:]
        return outputs
