"""Whether a request is what replicas die of: it is not given to a third one.

A replica that dies takes all its requests with it, and one of them may be the cause. Whoever gets a
token from the next replica is acquitted. Who loses a second one without a token in between is
convicted if nobody else there is as suspect: has lost as many in a row that gave it no token at
all. Otherwise the suspects are tried one after the other, so that a bystander is not taken for the
culprit:

    innocent ──replica lost──► suspect ──lost again, alone──► convicted
        ▲                        │  └──lost again, with others──► on trial ──lost again──► convicted
        └────────── a token ─────┴───────────────────────────────────┘
"""

from __future__ import annotations

from cluster.errors import PoisonError

MAX_LOST = 2
"""Replicas that a request may lose without a token in between."""


class Suspicion:
    """What is held against one request. Pure."""

    def __init__(self) -> None:
        self._num_lost = 0  # replicas, since the last token
        self.num_blank = 0  # replicas in a row that were lost and gave it no token

    @property
    def needs_trial(self) -> bool:
        """Whether it must not run beside others that do."""
        return self._num_lost >= MAX_LOST

    def on_token(self) -> None:
        """A replica computed it and lives."""
        self._num_lost = self.num_blank = 0

    def on_lost(self, *, gave_token: bool, is_alone: bool) -> None:
        """A replica was lost while it had the request.

        Args:
            gave_token: Whether the request had got one from it.
            is_alone: Whether no other request that it had is as suspect now.

        Raises:
            PoisonError: It is convicted.
        """
        was_on_trial = self.needs_trial
        self._num_lost += 1
        self.num_blank = 0 if gave_token else self.num_blank + 1
        if was_on_trial or (self._num_lost >= MAX_LOST and is_alone):
            raise PoisonError(
                f"{self._num_lost} replicas died one after the other while they computed this "
                "request and before it got a token of them: it is not tried again; report it"
            )
