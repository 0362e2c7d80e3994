"""What all requests of a gateway share, and what each of them brings."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from opentelemetry.trace import INVALID_SPAN, Span

from cluster.config import ClusterConfig
from cluster.gateway.admission import Admission
from cluster.gateway.fleet import Fleet
from cluster.gateway.handing_over import HandOvers
from cluster.gateway.identity import Authenticator
from cluster.gateway.journal import Journals
from cluster.gateway.journal_record import JournalState
from cluster.gateway.prefixes import Prefixes
from cluster.gateway.rate_limiter import RateLimiter
from cluster.gateway.resume_point import ResumePoint
from cluster.gateway.tokenizer import Tokenizer
from cluster.gateway.tracing import Tracing
from cluster.gateway.waiting import WaitingRoom
from cluster.metrics import Metrics
from cluster.router.dispatcher import Dispatcher
from cluster.rpc.sluice.v1 import inference_pb2

if TYPE_CHECKING:
    from cluster.gateway.generation import Generation


@dataclass(frozen=True, slots=True)
class GatewayParts:
    """What all requests of a gateway share."""

    config: ClusterConfig
    gateway_id: str
    authenticator: Authenticator
    tokenizer: Tokenizer
    prefixes: Prefixes
    fleet: Fleet
    dispatcher: Dispatcher
    waiting: WaitingRoom
    admission: Admission
    rate_limiter: RateLimiter
    metrics: Metrics
    tracing: Tracing
    rng: random.Random  # of seeds and ids that clients leave to the server
    journals: Journals
    hand_overs: HandOvers
    running: dict[str, Generation] = field(default_factory=dict)  # by request id
    trial: asyncio.Lock = field(default_factory=asyncio.Lock)  # held by the suspect that runs
    serial: itertools.count[int] = field(default_factory=itertools.count)


@dataclass(frozen=True, slots=True)
class ClientCall:
    """The client's side of a request."""

    request_id: str  # the client's, or a new one
    remaining_s: Callable[[], float | None]  # seconds to the client's deadline; None is no bound
    send: Callable[[inference_pb2.GenerateStreamResponse], Awaitable[None]]
    span: Span = INVALID_SPAN  # of the trace that it belongs to
    arrival_s: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Resumption:
    """A request that goes on for a client who has come back."""

    state: JournalState
    point: ResumePoint
    owner: str  # with which its journal was claimed; of a finished one empty

    @property
    def has_run(self) -> bool:
        """Whether it was given to a replica before: who was never let in has to ask again."""
        return bool(self.point.tokens or self.state.queued_s)
