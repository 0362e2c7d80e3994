"""What a client asks of a stream: a request, or where an earlier one goes on; and for how long."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

from cluster.errors import InvalidArgumentError
from cluster.rpc.public import generate_request
from cluster.rpc.public_cache import check_text
from cluster.rpc.public_route import ClassName, set_route
from cluster.rpc.queries import GENERATE_TIMEOUT_S
from cluster.rpc.sluice.v1 import inference_pb2
from cluster.types import SamplingParams

RESUME_TIMEOUT_S = 30.0
_MAX_TOKEN_ID = 2**32 - 1
Sampling = SamplingParams | Mapping[str, Any] | None


class ResumeOptions(TypedDict, total=False):
    """What may be said of a stream, whether it begins or goes on."""

    timeout_s: float  # deadline of all of it, seconds
    resume_timeout_s: float  # a stream that is cut off is given up after this time; 0: at once
    detach_on_disconnect_s: float  # the request goes on for so long without its client, seconds
    report_resumptions: bool  # whether `Resumed` events are among the others


class RequestOptions(ResumeOptions, total=False):
    """What may be said of a request beside its prompt."""

    model: str  # name; empty is the only one served
    sampling: Sampling  # all parameters, or some of them by name
    request_id: str  # new for each request; empty: the client makes one up
    prefix: str  # name of a registered prefix that comes before the prompt
    service_class: ClassName | None  # interactive, standard or batch: whose objective it gets
    ttft_s: float | None  # an objective of its own, in place of a class: seconds to the first token
    tpot_s: float | None  # likewise, seconds per further token
    session: str  # requests of one session prefer the same replica; empty is none


@dataclass(frozen=True, slots=True)
class StreamQuery:
    """One stream, for a client of either kind."""

    request_id: str
    begin: inference_pb2.GenerateStreamRequest | None  # None: it was begun by another call
    has_unique_id: bool = False  # no other request ever had the id: it was made up for this one
    after_seq: int | None = None  # the last event that the caller has; None: none
    tokens_received: tuple[int, ...] = ()  # that came with these events; empty: not known
    timeout_s: float = GENERATE_TIMEOUT_S
    resume_timeout_s: float = RESUME_TIMEOUT_S
    detach_on_disconnect_s: float = 0.0
    report_resumptions: bool = False

    def __post_init__(self) -> None:
        """Check what decides here.

        Raises:
            InvalidArgumentError: A time is none.
        """
        for name in ("resume_timeout_s", "detach_on_disconnect_s"):
            value_s = getattr(self, name)
            if not 0 <= value_s < math.inf:
                raise InvalidArgumentError(
                    f"{name}={value_s:g}, it is a finite time of at least 0, seconds: change it "
                    "or leave it out",
                    field=name,
                )


def begin_stream(
    prompt: str | None,
    token_ids: Sequence[int] | None,
    *,
    request_id: str = "",
    timeout_s: float = GENERATE_TIMEOUT_S,
    resume_timeout_s: float = RESUME_TIMEOUT_S,
    detach_on_disconnect_s: float = 0.0,
    report_resumptions: bool = False,
    **request: Any,
) -> StreamQuery:
    """Return what asks for a completion; see `RequestOptions`.

    Raises:
        InvalidArgumentError: The request cannot be written down.
    """
    message = _request(prompt, token_ids, request_id or uuid.uuid4().hex, **request)
    return StreamQuery(
        message.request_id,
        inference_pb2.GenerateStreamRequest(
            request=message, detach_on_disconnect_s=detach_on_disconnect_s
        ),
        has_unique_id=not request_id,
        timeout_s=timeout_s,
        resume_timeout_s=resume_timeout_s,
        detach_on_disconnect_s=detach_on_disconnect_s,
        report_resumptions=report_resumptions,
    )


def _request(
    prompt: str | None,
    token_ids: Sequence[int] | None,
    request_id: str,
    *,
    model: str = "",
    sampling: Sampling = None,
    prefix: str = "",
    **route: Any,
) -> inference_pb2.GenerateRequest:
    """Return the message of a request; `route` is what `public_route.set_route` takes."""
    message = generate_request(
        prompt, token_ids, model=model, sampling=sampling, request_id=request_id, prefix=prefix
    )
    set_route(message, **route)
    return message


def resume_stream(
    request_id: str,
    after_seq: int | None,
    tokens_received: Sequence[int],
    **options: Unpack[ResumeOptions],
) -> StreamQuery:
    """Return what goes on with an earlier request.

    Raises:
        InvalidArgumentError: There is no such position, or it cannot be written down.
    """
    check_text("request_id", request_id)
    if after_seq is not None and not 0 <= after_seq < 2**64 - 1:
        raise InvalidArgumentError(
            f"after_seq={after_seq}, events are numbered from 0 on: give the last one that came, "
            "or None",
            field="after_seq",
        )
    if after_seq is None and tokens_received:
        raise InvalidArgumentError(
            f"tokens_received has {len(tokens_received)} tokens without after_seq: give the last "
            "event that came too, or leave out both to have all events",
            field="after_seq",
        )
    for index, token_id in enumerate(tokens_received):
        if not 0 <= token_id <= _MAX_TOKEN_ID:
            raise InvalidArgumentError(
                f"tokens_received[{index}]={token_id} is no token id: give those that came",
                field="tokens_received",
            )
    return StreamQuery(
        request_id,
        None,
        after_seq=after_seq,
        tokens_received=tuple(tokens_received),
        **options,
    )
