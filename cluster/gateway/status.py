"""Errors as clients see them: google.rpc.Status with details."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from cluster.errors import (
    CancelledError,
    DeadlineError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    OverloadedError,
    SluiceError,
    UnavailableError,
)

logger = logging.getLogger(__name__)

_DETAILS_KEY = "grpc-status-details-bin"
_DOMAIN = "sluice"
_MAX_MESSAGE_CHARS = 1000  # metadata of more than 8 KiB would be refused on the way

_ENGINE_ERRORS: dict[str, type[SluiceError]] = {
    error.code: error
    for error in (
        InvalidArgumentError,
        FailedPreconditionError,
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
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=_reason(error), domain=_DOMAIN)]
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
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _reason(error: SluiceError) -> str:
    """Return what programs tell errors of one code apart by; it never changes."""
    return error.reason or error.code


async def abort(context: grpc.aio.ServicerContext[Message, Message], error: SluiceError) -> None:
    """End a call with an error; does not return."""
    status = status_of(error)
    await context.abort(
        grpc.StatusCode[error.code],
        status.message,
        ((_DETAILS_KEY, status.SerializeToString()),),
    )


@asynccontextmanager
async def ending(
    context: grpc.aio.ServicerContext[Any, Any],
    call_id: str,
    count: Callable[[str], object] | None = None,
) -> AsyncIterator[None]:
    """Turn what a method raises into a status.

    Args:
        context: Of the call.
        call_id: Says in logs which call it was.
        count: Gets the name of the code that the call ended with.
    """
    counted = count or (lambda code: None)
    try:
        yield
        counted("OK")
    except asyncio.CancelledError:
        counted("CANCELLED")
        raise
    except SluiceError as error:
        counted(error.code)
        logger.info("request %.130r ended: %s", call_id, error.code)
        await abort(context, error)
    except Exception:
        counted("INTERNAL")
        logger.exception("request %.130r failed", call_id)
        await abort(context, SluiceError(f"internal error, see the gateway's log for {call_id!r}"))
