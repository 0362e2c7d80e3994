"""The gateway: its own grpc.aio server, free of Ray."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from cluster.config import ClusterConfig, GatewayConfig
from cluster.errors import RESUME_ELSEWHERE, UnavailableError
from cluster.gateway.admission import Admission
from cluster.gateway.cache_servicer import CacheServicer
from cluster.gateway.detached import DetachedRequests
from cluster.gateway.fleet import Fleet
from cluster.gateway.generation import Generation
from cluster.gateway.handing_over import HandOvers
from cluster.gateway.identity import Authenticator
from cluster.gateway.journal import Journals
from cluster.gateway.listen import bind
from cluster.gateway.parts import GatewayParts
from cluster.gateway.prefix_keeper import PrefixKeeper
from cluster.gateway.prefixes import Prefixes
from cluster.gateway.rate_limiter import RateLimiter
from cluster.gateway.resume import Resumer
from cluster.gateway.servicer import InferenceServicer
from cluster.gateway.stored_blocks import StoredBlocks
from cluster.gateway.tokenizer import Tokenizer
from cluster.gateway.tracing import Tracing, open_provider
from cluster.gateway.waiting import WaitingRoom
from cluster.gateway.wire import CACHE, INFERENCE, add_service
from cluster.kvstore.block_store import BlockStore
from cluster.kvstore.store import Store
from cluster.metrics import Metrics
from cluster.router.dispatcher import Dispatcher
from cluster.types import ReplicaSnapshot

logger = logging.getLogger(__name__)

_SERVICES = (INFERENCE.full_name, CACHE.full_name)
_STOP_GRACE_S = 1.0  # for statuses to reach clients after the last stream has ended
_END_TIMEOUT_S = 1.0  # for streams that were told to go on elsewhere to end


class GatewayServer:
    """Serves sluice.v1.Inference, sluice.v1.Cache, health and reflection on one port.

    Args:
        config: Of the cluster.
        store: Where replicas and prefixes are registered; stays the caller's.
        gateway_id: Unique in the cluster.
        block_store: Of KV blocks; None where none are stored. Stays the caller's.
        metrics: Counted into; None makes some of its own.
    """

    def __init__(
        self,
        config: ClusterConfig,
        *,
        store: Store,
        gateway_id: str,
        block_store: BlockStore | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._config = config
        self._store = store
        self._block_store = block_store
        self._gateway_id = gateway_id
        self._metrics = metrics or Metrics(CollectorRegistry())
        self._running: dict[str, Generation] = {}
        self._admission = Admission(config.gateway)
        self._detached = DetachedRequests()
        self._journals = Journals(
            store, self._metrics, interval_s=config.gateway.journal_interval_s
        )
        self._rate_limiter = RateLimiter(store, on_error=config.gateway.rate_limit_on_error)
        self._tracing = Tracing(open_provider(gateway_id))
        self._is_stopping = False

    @property
    def num_inflight(self) -> int:
        """Requests that have not ended."""
        return self._admission.num_inflight

    @property
    def num_replicas(self) -> int:
        """Replica groups that this gateway is connected to."""
        return len(self._fleet.table)

    def snapshots(self) -> list[ReplicaSnapshot]:
        """Return the replicas that can be routed to, with their newest load reports."""
        return self._fleet.table.snapshots()

    def check_health(self) -> None:
        """Raise where this gateway serves nobody any more.

        Raises:
            UnavailableError: It is shutting down.
        """
        if self._is_stopping:
            raise UnavailableError("this gateway is shutting down")

    async def start(self) -> int:
        """Serve; return the port.

        Raises:
            ConfigError: The port, the files of TLS or tenants, or the model's tokenizer cannot be
                used.
        """
        parts = await self._make_parts()
        self._observe(parts.dispatcher)
        self._server = self._make_server(parts)
        port = bind(self._server, self._config.gateway)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._journals.start()
        await self._server.start()
        self._fleet.start()
        self._waiting.start()
        self._prefixes.start()
        self._keeper.start()
        self._health_task = asyncio.create_task(self._announce(), name="health")
        logger.info("gateway %s serves on port %d", self._gateway_id, port)
        return port

    async def _make_parts(self) -> GatewayParts:
        config = self._config
        authenticator = Authenticator(config.auth)
        tokenizer = await asyncio.to_thread(Tokenizer.load, config.model)
        self._dispatcher = dispatcher = Dispatcher(config, rng=random.Random())
        self._waiting = WaitingRoom(
            dispatcher,
            self._metrics,
            queue_timeout_s=config.gateway.queue_timeout_s,
            load_interval_s=config.replica.load_interval_s,
        )
        self._fleet = Fleet(
            config.replica,
            self._store,
            dispatcher,
            gateway_id=self._gateway_id,
            on_change=self._on_fleet_change,
        )
        self._hand_overs = HandOvers(
            self._running.values, self._fleet.is_draining, asyncio.get_running_loop().call_later
        )
        self._prefixes = Prefixes(
            self._store,
            config.gateway,
            model=config.model.served_name,
            vocab_size=tokenizer.vocab_size,
        )
        return GatewayParts(
            config=config,
            gateway_id=self._gateway_id,
            authenticator=authenticator,
            tokenizer=tokenizer,
            prefixes=self._prefixes,
            fleet=self._fleet,
            dispatcher=dispatcher,
            waiting=self._waiting,
            admission=self._admission,
            rate_limiter=self._rate_limiter,
            metrics=self._metrics,
            tracing=self._tracing,
            rng=random.Random(),
            journals=self._journals,
            hand_overs=self._hand_overs,
            running=self._running,
        )

    def _on_fleet_change(self) -> None:
        self._waiting.poke()
        self._hand_overs.poke()

    def _make_server(self, parts: GatewayParts) -> grpc.aio.Server:
        server = grpc.aio.server(options=_options(self._config.gateway))
        resumer = Resumer(parts, self._store)
        add_service(INFERENCE, InferenceServicer(parts, resumer, self._detached), server)
        blocks = StoredBlocks(self._block_store, self._fleet)
        self._keeper = PrefixKeeper(parts, self._store, blocks)
        add_service(CACHE, CacheServicer(parts, self._keeper, blocks), server)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        return server

    async def stop(self, drain_timeout_s: float) -> None:
        """Refuse new requests, let the present ones finish for a time, then close.

        Args:
            drain_timeout_s: Streams that take longer end with UNAVAILABLE, and a reason that tells
                clients to go on at another gateway; seconds.
        """
        self._is_stopping = True
        self._health_task.cancel()
        # At once it stops to listen, so that gateways which share the port get what comes, and
        # tells clients to connect anew (GOAWAY); calls that have begun go on. Only then does it
        # refuse requests: who hears NOT_SERVING and tries again is not to meet it once more.
        grace_s = drain_timeout_s + _END_TIMEOUT_S + _STOP_GRACE_S
        closing = asyncio.create_task(self._server.stop(grace_s), name="closing")
        await asyncio.sleep(0)
        self._admission.close()
        await self._health.enter_graceful_shutdown()
        await self._keeper.stop()
        await self._drain(drain_timeout_s)
        await self._prefixes.stop()
        await self._waiting.stop()
        await self._fleet.stop()
        await self._server.stop(_STOP_GRACE_S)
        await closing
        await self._detached.stop()
        await self._journals.stop()
        await self._rate_limiter.close()
        await self._tracing.stop()

    async def _drain(self, timeout_s: float) -> None:
        """Return when no request is in flight, or after the time and a moment."""
        give_up_s = time.monotonic() + timeout_s
        if self._fleet.has_peers:
            await self._send_elsewhere(self._is_queued)
        if not await self._admission.wait_idle(give_up_s - time.monotonic()):
            num_inflight = self._admission.num_inflight
            logger.warning("%d requests did not finish in time, they go on elsewhere", num_inflight)
            await self._send_elsewhere(lambda request_id: True)
            await self._admission.wait_idle(_END_TIMEOUT_S)

    async def _send_elsewhere(self, is_meant: Callable[[str], bool]) -> None:
        """End requests so that their clients go on with them at another gateway."""
        await self._journals.flush()
        for request_id, generation in list(self._running.items()):
            if is_meant(request_id):
                generation.stop(
                    UnavailableError(
                        "this gateway is shutting down: resume the request at another one",
                        reason=RESUME_ELSEWHERE,
                    )
                )
            await asyncio.sleep(0)  # there may be thousands

    def _is_queued(self, request_id: str) -> bool:
        return self._dispatcher.place(request_id, time.monotonic()) is not None

    async def _announce(self) -> None:
        """Report SERVING from the first connected replica on: later ones are waited for."""
        while not len(self._fleet.table):
            await self._fleet.wait_change(None)
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in (health.OVERALL_HEALTH, *_SERVICES):
            await self._health.set(service, status)

    def _observe(self, dispatcher: Dispatcher) -> None:
        metrics, fleet, admission = self._metrics, self._fleet, self._admission
        metrics.inflight.set_function(lambda: admission.num_inflight)
        metrics.queued.set_function(lambda: dispatcher.num_queued)
        metrics.replicas.set_function(lambda: len(fleet.table))
        metrics.index.set_function(lambda: fleet.index.num_bytes)
        metrics.index_dropped.set_function(lambda: fleet.index.num_dropped)
        metrics.watch_resyncs.set_function(lambda: fleet.watch_counts.num_resyncs)
        metrics.quarantines.set_function(lambda: fleet.watch_counts.num_quarantines)


def _options(config: GatewayConfig) -> list[tuple[str, int]]:
    keepalive_ms = int(config.keepalive_s * 1000)
    return [
        ("grpc.so_reuseport", 1),  # the gateways of one host share the port
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_permit_without_calls", 1),  # idle connections are pinged too
        ("grpc.keepalive_timeout_ms", min(keepalive_ms, 20_000)),
        ("grpc.http2.ping_timeout_ms", min(keepalive_ms, 20_000)),  # a minute otherwise
        # Clients ask while they wait for a token; by default the third question without one within
        # five minutes ends the connection, and a prefill of more than half a minute never ends.
        ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ]
