"""Errors as clients see them: google.rpc.Status with details."""

from __future__ import annotations

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from cluster.errors import (
    CancelledError,
    DeadlineError,
    InvalidArgumentError,
    NotFoundError,
    OverloadedError,
    SluiceError,
    UnavailableError,
)

_DETAILS_KEY = "grpc-status-details-bin"
_DOMAIN = "sluice"
_MAX_MESSAGE_CHARS = 1000  # metadata of more than 8 KiB would be refused on the way

_ENGINE_ERRORS: dict[str, type[SluiceError]] = {
    error.code: error
    for error in (
        InvalidArgumentError,
        NotFoundError,
        OverloadedError,
        DeadlineError,
        CancelledError,
        UnavailableError,
    )
}


def error_from_engine(text: str) -> SluiceError:
    """Return the error that a leader reported as "CODE: message"."""
    code, _, message = text.partition(": ")
    return _ENGINE_ERRORS.get(code, SluiceError)(message or text)


def status_of(error: SluiceError) -> Status:
    """Return an error's code, message and details."""
    message = str(error)[:_MAX_MESSAGE_CHARS]
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.code, domain=_DOMAIN)]
    if isinstance(error, InvalidArgumentError) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=message
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, OverloadedError):
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = Status(code=grpc.StatusCode[error.code].value[0], message=message)
    for detail in details:
        packed = Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


async def abort(context: grpc.aio.ServicerContext[Message, Message], error: SluiceError) -> None:
    """End a call with an error; does not return."""
    status = status_of(error)
    await context.abort(
        grpc.StatusCode[error.code],
        status.message,
        ((_DETAILS_KEY, status.SerializeToString()),),
    )
