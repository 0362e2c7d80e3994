"""The leader's watch over its group: a thread, since the event loop may be held up.

workers ──("beat", cpu_s)──► monitor ──► Liveness ──► fail
engine's thread ──cpu_s, age of its step──┘
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from cluster.config import ClusterConfig
from cluster.errors import UnavailableError
from cluster.replica.channel import Channel, wait_readable
from cluster.replica.engine_loop import EngineLoop
from cluster.replica.liveness import Liveness, Silence, teams_of

logger = logging.getLogger(__name__)

TICK_S = 0.1


class GroupMonitor:
    """Looks after one group until it fails, or is stopped.

    Args:
        config: Of the cluster.
        beats: From the workers, by index; closed by `close`. None where the leader computes.
        loop: Of the engine.
        fail: Called in the monitor's thread, once, with what is wrong.
    """

    def __init__(
        self,
        config: ClusterConfig,
        beats: Sequence[Channel],
        loop: EngineLoop,
        fail: Callable[[str], None],
    ) -> None:
        parallel, replica = config.parallel, config.replica
        on_cpu = config.model.device == "cpu"
        self._liveness = Liveness(
            len(beats),
            teams_of(parallel.tp, parallel.pp, spins=on_cpu) if beats else [[0]],
            heartbeat_timeout_s=replica.heartbeat_timeout_s,
            stuck_timeout_s=replica.stuck_timeout_s,
            tick_s=TICK_S,
        )
        self._beats = list(beats)
        self._event_loop = Silence(replica.stuck_timeout_s, TICK_S)
        self._has_turned = False  # the event loop, since the tick before
        self._loop = loop
        self._fail = fail
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)

    def start(self) -> None:
        """Begin to watch; every worker beats, and `turned` is called from now on."""
        self._thread.start()

    def turned(self) -> None:
        """The leader's event loop goes round: to be called more often than it may hang."""
        self._has_turned = True

    def stop(self) -> None:
        """Accuse nobody any more. Again is fine."""
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join()

    def close(self) -> None:
        """Stop, and close the connections: a worker ends by that."""
        self.stop()
        for channel in self._beats:
            channel.close()

    def _run(self) -> None:
        before_s = time.monotonic()
        while not self._is_over.wait(TICK_S):
            now_s = time.monotonic()
            try:
                reason = self._look(now_s - before_s)
            except Exception as error:  # a group that nobody watches is not left to itself
                logger.exception("the monitor fails")
                reason = f"nobody watches the group: {type(error).__name__}: {error}"
            before_s = now_s
            if reason and not self._is_over.is_set():
                self._fail(reason)
                return

    def _look(self, elapsed_s: float) -> str:
        """Return why the group has failed, or nothing."""
        while ready := wait_readable(self._beats, 0.0):
            for channel in ready:
                index = self._beats.index(channel)
                try:
                    _, cpu_s = channel.receive()
                except UnavailableError:
                    return f"worker {index} is gone"
                self._liveness.beat(index, cpu_s)
        self._event_loop.tick(elapsed_s)
        if self._has_turned:
            self._has_turned = False
            self._event_loop.heard()
        if self._event_loop.is_too_long:
            limit_s = self._event_loop.limit_s
            return f"the leader's event loop hangs: replica.stuck_timeout_s={limit_s:g}"
        if not self._loop.is_running:
            return "the engine's thread has ended"
        self._liveness.beat(len(self._beats), self._loop.cpu_s)
        return self._liveness.tick(elapsed_s, step_age_s=self._loop.step_age_s)
