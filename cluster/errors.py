"""The exception tree, each leaf with the gRPC status that a client sees.

    SluiceError
    ├── InvalidArgumentError    INVALID_ARGUMENT    the request (or the configuration) is wrong
    │   └── ConfigError                             ... a knob, a path, a layout
    ├── NotFoundError           NOT_FOUND           unknown model, request or prefix
    ├── AlreadyExistsError      ALREADY_EXISTS      a name that is taken by something else
    ├── UnauthenticatedError    UNAUTHENTICATED     no credentials, or none that are known
    ├── PermissionDeniedError   PERMISSION_DENIED   known, but not allowed to
    ├── OverloadedError         RESOURCE_EXHAUSTED  a bounded queue is full: come back later
    ├── DeadlineError           DEADLINE_EXCEEDED   the caller's time is over
    ├── CancelledError          CANCELLED           the caller went away
    ├── FailedPreconditionError FAILED_PRECONDITION what is there contradicts what is asked for
    ├── OutOfRangeError         OUT_OF_RANGE        a position that does not exist
    ├── SupersededError         ABORTED             the client goes on with it elsewhere
    ├── PoisonError             INTERNAL            replicas died of this request
    └── UnavailableError        UNAVAILABLE         no replica, a replica died, shutting down
        └── ReplicaLostError                        ... the one that computed the request

A message says what was given, the limit, and what to do:
``max_tokens=9000, limit=8192: ask for fewer tokens``.
"""

from __future__ import annotations


class SluiceError(Exception):
    """Base of every error that Sluice raises on purpose."""

    code: str = "INTERNAL"
    """Name of the gRPC status code."""

    reason: str = ""
    """What programs tell errors of one code apart by, as RATE_LIMITED; it never changes."""


class InvalidArgumentError(SluiceError):
    """A value that the caller gave is outside of what is allowed.

    Args:
        message: What was given, the limit, what to do.
        field: Path of the offending field, as ``sampling.temperature``.
    """

    code = "INVALID_ARGUMENT"

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class ConfigError(InvalidArgumentError):
    """The configuration, a path in it, or the layout that it asks for cannot work."""


class NotFoundError(SluiceError):
    """What the request names does not exist."""

    code = "NOT_FOUND"


class AlreadyExistsError(SluiceError):
    """The name that the caller chose is taken by something else."""

    code = "ALREADY_EXISTS"


class UnauthenticatedError(SluiceError):
    """The call carries no credentials, or none that this cluster knows."""

    code = "UNAUTHENTICATED"


class PermissionDeniedError(SluiceError):
    """The caller is known and may not do this."""

    code = "PERMISSION_DENIED"


class OverloadedError(SluiceError):
    """A bounded queue or budget is full.

    Args:
        message: Which queue, its limit, what to do.
        retry_after_s: When it is worth to try again, seconds.
        reason: What programs tell refusals apart by, as RATE_LIMITED; it never changes.
    """

    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, *, retry_after_s: float = 1.0, reason: str = "") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.reason = reason


class DeadlineError(SluiceError):
    """The caller's deadline passed before the work was done."""

    code = "DEADLINE_EXCEEDED"


class CancelledError(SluiceError):
    """The caller cancelled or disconnected."""

    code = "CANCELLED"


class FailedPreconditionError(SluiceError):
    """What is there contradicts what the caller says of it."""

    code = "FAILED_PRECONDITION"


class OutOfRangeError(SluiceError):
    """A position behind the end of what is there."""

    code = "OUT_OF_RANGE"


class SupersededError(SluiceError):
    """The same client goes on with this request in another call."""

    code = "ABORTED"
    reason = "SUPERSEDED"


class PoisonError(SluiceError):
    """Replicas died while they computed this request: it is not tried again."""

    reason = "POISONOUS_REQUEST"


RESUME_ELSEWHERE = "RESUME_ELSEWHERE"
"""Reason of an UnavailableError: the request is journalled, another gateway goes on with it."""


JOURNAL_GONE = "JOURNAL_GONE"
"""Reason of an UnavailableError: a stream was cut off, and nobody knows of it any more."""


class UnavailableError(SluiceError):
    """No process can do this now: none is up, it died, or it is shutting down.

    Args:
        message: Who cannot, what to do.
        reason: What programs tell errors apart by, as RESUME_ELSEWHERE.
    """

    code = "UNAVAILABLE"

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class ReplicaLostError(UnavailableError):
    """The replica died, failed or fell silent while it had the request.

    Args:
        message: Which one, and why.
        may_return: Whether it may be there again under its id: its connection was lost.
    """

    def __init__(self, message: str, *, may_return: bool = True) -> None:
        super().__init__(message)
        self.may_return = may_return
