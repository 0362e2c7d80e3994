"""The leader of a replica group: engine, internal service, lease, life and death.

Free of Ray: `ray_actors.py` puts one into each Serve replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Sequence

import grpc

from cluster.clock import WallClock
from cluster.config import ClusterConfig
from cluster.engine.executor import Executor
from cluster.engine.step_time import StepTimeModel
from cluster.errors import SluiceError, UnavailableError
from cluster.kvstore.block_key import hash_of_key, part_prefix
from cluster.kvstore.block_store import BlockStore
from cluster.kvstore.registry import Registry
from cluster.kvstore.store import Store
from cluster.model.model_info import ModelInfo
from cluster.replica.build import Tiers, fingerprint_of, make_engine, max_model_len_of
from cluster.replica.channel import Channel
from cluster.replica.engine_loop import EngineLoop, EngineUpdate
from cluster.replica.group import GroupLifecycle, GroupState
from cluster.replica.monitor import GroupMonitor
from cluster.replica.service import EngineServicer
from cluster.replica.step_time_file import StepTimeFile, identity_of
from cluster.rpc.sluice.internal.v1 import engine_pb2_grpc
from cluster.types import ReplicaInfo, ReplicaLoad

logger = logging.getLogger(__name__)

TICK_S = 0.1
STOP_TIMEOUT_S = 5.0  # for the step that is being computed
STEP_MARGIN_S = 1.0  # an executor that can tell a late step itself is given the time to
FLUSH_S = 0.2  # for the last outputs to reach the gateways before the process ends
END_S = 1.0  # for the event loop to end a group that has failed; then it is done without it
KEEPALIVES = 5  # that a watch has time for, before a gateway takes its leader for dead


class Leader:
    """Runs one replica group from ready to its end.

    Args:
        config: Of the cluster.
        model: What the checkpoint says.
        executor: Computes the steps; belongs to the leader.
        lifecycle: Of the group, whose workers are ready.
        store: Where the group registers.
        replica_id: New after every restart.
        node_id: Of the Ray node that the leader runs on.
        public_host: Address under which gateways reach the leader.
        on_end: Called once, in any thread, when the group has failed or left by itself, with the
            reason: the process has to end.
        tiers: Below the KV cache; None where there are none. The mover is the owner's to end.
        blocks: The store of KV blocks, to begin with its hottest ones; None begins with nothing.
        beats: From the workers, by index; none where the leader computes. The leader closes them.
    """

    def __init__(
        self,
        config: ClusterConfig,
        *,
        model: ModelInfo,
        executor: Executor,
        lifecycle: GroupLifecycle,
        store: Store,
        replica_id: str,
        node_id: str,
        public_host: str,
        on_end: Callable[[str], None],
        tiers: Tiers | None = None,
        blocks: BlockStore | None = None,
        beats: Sequence[Channel] = (),
    ) -> None:
        self._config = config
        self._model = model
        self._executor = executor
        self._registry = Registry(store)
        self._replica_id = replica_id
        self._node_id = node_id
        self._public_host = public_host
        self._on_end = on_end
        self._tiers = tiers
        self._blocks = blocks
        self._beats = beats
        self._load = ReplicaLoad()
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._leaves = False  # by itself, when it has drained
        self._has_changed = asyncio.Event()  # the lifecycle, for those that wait for its end
        self._is_over = asyncio.Event()
        self._has_ended = threading.Event()  # `on_end` was called
        self._end_lock = threading.Lock()
        self.lifecycle = lifecycle
        self._servicer = EngineServicer(
            on_drain=self.leave, keepalive_s=config.replica.heartbeat_timeout_s / KEEPALIVES
        )
        self._server = grpc.aio.server(
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 64 * 2**20)]
        )

    @property
    def load(self) -> ReplicaLoad:
        """The newest load report."""
        return self._load

    async def start(self) -> ReplicaInfo:
        """Serve; returns what was registered. All workers are ready when this is called."""
        self._loop = self._make_loop()
        self._monitor = self._make_monitor()
        engine_pb2_grpc.add_EngineServicer_to_server(self._servicer, self._server)  # type: ignore[no-untyped-call]
        port = self._server.add_insecure_port(f"{self._config.replica.host}:0")
        await self._server.start()
        self._servicer.serve(self._loop)
        self._loop.start()
        self.info = self._describe(port)
        await self._warm_up()
        self._monitor.start()
        self._tasks = [
            asyncio.create_task(self._keep_lease()),
            asyncio.create_task(self._keep_time()),
        ]
        return self.info

    def _make_loop(self) -> EngineLoop:
        config = self._config
        self._fingerprint = fingerprint_of(config)
        self._step_times = StepTimeFile(identity_of(config, fingerprint=self._fingerprint))
        self._step_time = StepTimeModel()
        self._step_time.restore(self._step_times.load())
        self._num_saved_steps = self._step_time.num_steps
        engine = make_engine(
            config, self._model, self._executor, WallClock(), self._step_time, self._tiers
        )
        main = asyncio.get_running_loop()

        def publish(update: EngineUpdate) -> None:
            main.call_soon_threadsafe(self._apply, update)

        def fail(reason: str) -> None:
            main.call_soon_threadsafe(self.fail, reason)

        return EngineLoop(
            engine,
            publish=publish,
            fail=fail,
            load_interval_s=config.replica.load_interval_s,
            max_commands=config.engine.max_num_waiting,
        )

    def _make_monitor(self) -> GroupMonitor:
        main = asyncio.get_running_loop()

        def fail(reason: str) -> None:
            main.call_soon_threadsafe(self.fail, reason)
            if not self._has_ended.wait(END_S):
                self._end(reason)  # the event loop itself hangs

        return GroupMonitor(self._config, self._beats, self._loop, fail)

    async def _warm_up(self) -> None:
        """Fetch the store's hottest blocks before anybody asks; whatever fails is a cold start."""
        timeout_s = self._config.replica.warm_up_timeout_s
        if self._blocks is None or self._tiers is None or not timeout_s:
            return
        prefix = part_prefix(self._fingerprint, pp=self._config.parallel.pp, part=0)
        try:
            async with asyncio.timeout(timeout_s):
                keys = await self._blocks.hottest(prefix, self._tiers.num_slots // 2)
                hashes = [hash_of_key(key) for key in keys]
                num_blocks = await asyncio.wrap_future(self._loop.preload(hashes)) if hashes else 0
        except TimeoutError:
            logger.warning("warm-up ends: replica.warm_up_timeout_s=%g is over", timeout_s)
        except SluiceError as error:
            logger.warning("no warm-up: %s", error)
        except Exception:  # a cold group is better than none
            logger.exception("no warm-up")
        else:
            logger.info("warm-up: %d of %d blocks came from the store", num_blocks, len(hashes))

    def _describe(self, port: int) -> ReplicaInfo:
        config = self._config
        return ReplicaInfo(
            replica_id=self._replica_id,
            address=f"{self._public_host}:{port}",
            model=config.model.served_name,
            fingerprint=self._fingerprint.hex(),
            tp=config.parallel.tp,
            pp=config.parallel.pp,
            block_size=config.cache.block_size,
            max_model_len=max_model_len_of(config, self._model),
            pid=os.getpid(),
            node_id=self._node_id,
        )

    def drain(self) -> None:
        """Refuse new requests; the group stops when the present ones have left or are late."""
        self.lifecycle.drain()
        self._servicer.refuse("UNAVAILABLE: the replica drains")

    def leave(self) -> None:
        """Drain and then end, without its owner; where its owner drains it already, nothing."""
        self._leaves = self._leaves or self.lifecycle.accepts_requests
        self.drain()

    def fail(self, reason: str) -> None:
        """The group has failed: end its requests, tell the owner."""
        self.lifecycle.fail(reason)
        self._has_changed.set()
        message = f"replica {self._replica_id} failed: {reason}"
        self._servicer.refuse(f"UNAVAILABLE: {message}")
        self._servicer.fail_all(f"LOST: {message}")

    def check_health(self) -> None:
        """Raise where the group is over.

        Raises:
            UnavailableError: With the reason.
        """
        if self.lifecycle.is_over:
            raise UnavailableError(f"the group is over: {self.lifecycle.reason or 'stopped'}")

    async def wait_drained(self) -> None:
        """Return when no request is left, or the drain's time is over."""
        await self._is_over.wait()

    async def stop(self) -> None:
        """End everything that `start` began, and the executor; what still runs moves elsewhere."""
        self._stopping = self._stopping or asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        self._has_ended.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.to_thread(self._monitor.stop)
        self._servicer.refuse("UNAVAILABLE: the replica stops")
        self._servicer.move_all()
        await asyncio.to_thread(self._loop.stop, STOP_TIMEOUT_S)
        if not self._loop.is_running and self._step_time.num_steps > self._num_saved_steps:
            await asyncio.to_thread(self._step_times.save, self._step_time.snapshot())
        try:
            await self._registry.unregister(self._replica_id)
        except SluiceError as error:
            logger.warning("lease not dropped, it expires by itself: %s", error)
        except Exception:  # the group ends all the same
            logger.exception("lease not dropped, it expires by itself")
        await self._server.stop(grace=FLUSH_S)
        self._executor.shutdown()
        self._monitor.close()

    def _apply(self, update: EngineUpdate) -> None:
        self._load = update.load or self._load
        self._servicer.apply(update)
        if update.step_times:
            # Once a minute, so the one before is done; the loop would not keep a task alive.
            self._saving = asyncio.create_task(
                asyncio.to_thread(self._step_times.save, update.step_times)
            )

    async def _keep_lease(self) -> None:
        is_known = False
        ttl_s = self._config.replica.lease_ttl_s
        while True:
            try:
                await self._registry.register(self.info, ttl_s)
                if not is_known:
                    logger.info("replica %s registered at %s", self._replica_id, self.info.address)
                is_known = True
            except SluiceError as error:
                if is_known:
                    logger.warning("lease not renewed: %s", error)
                is_known = False
            except Exception:  # a group that nobody finds is worse than a loud one
                logger.exception("lease not renewed")
            await asyncio.sleep(ttl_s / 4)

    async def _keep_time(self) -> None:
        step_timeout_s = self._config.engine.step_timeout_s
        while not self.lifecycle.is_over:
            self._monitor.turned()
            if self._loop.step_age_s > step_timeout_s + STEP_MARGIN_S:
                self.fail(f"step took longer than engine.step_timeout_s={step_timeout_s:g}")
            self.lifecycle.tick(self._servicer.num_requests)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._has_changed.wait(), TICK_S)
        self._is_over.set()
        if self.lifecycle.state is GroupState.FAILED:
            await asyncio.sleep(FLUSH_S)
            self._end(self.lifecycle.reason)
        elif self._leaves:
            self._leaving = asyncio.create_task(self._leave())  # `stop` cancels this one

    async def _leave(self) -> None:
        try:
            await self.stop()
        finally:
            self._on_end("drained")

    def _end(self, reason: str) -> None:
        with self._end_lock:
            is_first = not self._has_ended.is_set()
            self._has_ended.set()
        if is_first:
            self._on_end(reason)
