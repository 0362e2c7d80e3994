"""What ended a call: the error of our tree that its status stands for, and who made the status."""

from __future__ import annotations

from dataclasses import dataclass, field

from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from cluster.errors import (
    AlreadyExistsError,
    CancelledError,
    DeadlineError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    OverloadedError,
    PermissionDeniedError,
    PoisonError,
    SluiceError,
    SupersededError,
    UnauthenticatedError,
    UnavailableError,
)

_DOMAIN = "sluice"
_PLAIN_ERRORS: dict[str, type[SluiceError]] = {
    error.code: error
    for error in (
        NotFoundError,
        AlreadyExistsError,
        UnauthenticatedError,
        PermissionDeniedError,
        DeadlineError,
        CancelledError,
        FailedPreconditionError,
        OutOfRangeError,
    )
}
_ERRORS_BY_REASON: dict[tuple[str, str], type[SluiceError]] = {
    (error.code, error.reason): error for error in (SupersededError, PoisonError)
}


class CallFailure(Exception):
    """A call that ended before its answer was complete.

    Args:
        error: What the caller gets if this is the end.
        code: Name of the status code.
        is_ours: A gateway made the status; else something on the way did, or this process.
        retry_after_s: When the gateway says to try again, seconds; 0: it says nothing.
    """

    def __init__(
        self, error: SluiceError, *, code: str, is_ours: bool = False, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.code = code
        self.is_ours = is_ours
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class _Details:
    """Of a google.rpc.Status."""

    violation: error_details_pb2.BadRequest = field(default_factory=error_details_pb2.BadRequest)
    retry: error_details_pb2.RetryInfo = field(default_factory=error_details_pb2.RetryInfo)
    info: error_details_pb2.ErrorInfo = field(default_factory=error_details_pb2.ErrorInfo)

    @property
    def retry_after_s(self) -> float:
        """When to try again; 0 where nothing is said."""
        delay = self.retry.retry_delay
        return float(delay.seconds + delay.nanos / 1e9)


def failure_from_status(code: str, message: str, details: bytes | None) -> CallFailure:
    """Return what a gRPC status says.

    Args:
        code: Name of the status code.
        message: Of the status.
        details: A serialized google.rpc.Status, where the server sent one.
    """
    read = _read(details)
    return CallFailure(
        _error_of(code, message, read),
        code=code,
        is_ours=read.info.domain == _DOMAIN,
        retry_after_s=read.retry_after_s,
    )


def _read(details: bytes | None) -> _Details:
    read = _Details()
    try:
        for detail in Status.FromString(details or b"").details:
            detail.Unpack(read.violation)  # does nothing where it is of another type
            detail.Unpack(read.retry)
            detail.Unpack(read.info)
    except DecodeError:
        return _Details()  # somebody on the way wrote them; code and message stand for themselves
    return read


def _error_of(code: str, message: str, details: _Details) -> SluiceError:
    reason = "" if details.info.reason == code else details.info.reason
    if code == InvalidArgumentError.code:
        violations = details.violation.field_violations
        return InvalidArgumentError(message, field=violations[0].field if violations else "")
    if code == OverloadedError.code:
        return OverloadedError(message, retry_after_s=details.retry_after_s or 1.0, reason=reason)
    if code == UnavailableError.code:
        return UnavailableError(message, reason=reason)
    kind = _ERRORS_BY_REASON.get((code, reason)) or _PLAIN_ERRORS.get(code)
    return kind(message) if kind else SluiceError(f"{code}: {message}")
