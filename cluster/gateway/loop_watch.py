"""Ends a gateway whose event loop stands still: it answers nobody, and gRPC's own threads hide it.

    thread ── every tick: are you there? ──► event loop
           ◄────────── yes ─────────────────
           no answer for too long: the stacks of all threads are written down, the process ends

The process has threads that run, so its guardian is content, connections are accepted, pings are
answered, and clients wait. Of a dead gateway they hear at once, and go on at another one.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import threading
import time

from cluster.replica.liveness import Silence

logger = logging.getLogger(__name__)

TICK_S = 0.2


class LoopWatch:
    """Watches the event loop that it is made in.

    Args:
        limit_s: A loop that answers nothing for longer ends the process.
    """

    def __init__(self, limit_s: float) -> None:
        self._silence = Silence(limit_s, TICK_S)
        self._loop = asyncio.get_running_loop()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="loop-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no more; again is fine."""
        self._is_over.set()

    def _watch(self) -> None:
        before_s = time.monotonic()
        while not self._is_over.wait(TICK_S):
            now_s = time.monotonic()
            self._silence.tick(now_s - before_s)
            before_s = now_s
            if self._silence.is_too_long:
                logger.critical(
                    "the event loop stood still for %g s: the gateway ends", self._silence.limit_s
                )
                faulthandler.dump_traceback()
                os._exit(1)
            try:
                self._loop.call_soon_threadsafe(self._silence.heard)
            except RuntimeError:  # the loop is closed
                return
