"""A worker's side of life and death: it beats for its leader, and ends where that is gone."""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from collections.abc import Callable

from cluster.errors import UnavailableError
from cluster.replica.channel import Channel, connect
from cluster.replica.processes import ThreadClock

logger = logging.getLogger(__name__)

BEAT_S = 0.2
SEND_TIMEOUT_S = 1.0  # a beat is short: a leader that has not read so many is gone or hangs
ACKNOWLEDGE_S = 1.5  # a node whose kernel does not answer for so long is gone, or cut off
GRACE_S = 0.2  # for a worker whose leader is gone to end by itself


class Heartbeat:
    """Runs in a thread beside the one that makes it, which is the one that computes.

    That one may wait for a peer that is dead, in the middle of a collective: it would never notice
    that the leader has gone, so the process ends under it.

    Args:
        leader: Connection whose end is the leader's end; it is never read here.
        end_process: Does not return.
    """

    def __init__(self, leader: Channel, end_process: Callable[[], None] | None = None) -> None:
        self._leader = leader
        self._clock = ThreadClock()
        self._end_process = end_process or _end_process
        self._call: tuple[int, tuple[str, int], bytes] | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def begin(self, index: int, address: tuple[str, int], auth_key: bytes) -> None:
        """Beat from now on, as worker `index`, over a connection of its own."""
        self._call = (index, address, auth_key)

    def close(self) -> None:
        """Neither beat nor watch any more."""
        self._is_over.set()
        self._thread.join(SEND_TIMEOUT_S)

    def _run(self) -> None:
        hangup = select.poll()
        hangup.register(self._leader.fileno(), select.POLLRDHUP)  # messages do not wake it
        channel: Channel | None = None
        try:
            while not self._is_over.is_set():
                if hangup.poll(0):
                    raise UnavailableError("the leader is gone")
                if channel is None and self._call is not None:
                    channel = _connect(*self._call)
                if channel is not None:
                    channel.send("beat", self._clock.read())
                self._is_over.wait(BEAT_S)
        except UnavailableError as error:
            if not self._is_over.wait(GRACE_S):
                logger.warning("the worker ends: %s", error)
                self._end_process()
        finally:
            if channel is not None:
                channel.close()


def _connect(index: int, address: tuple[str, int], auth_key: bytes) -> Channel:
    channel = connect(address, auth_key, send_timeout_s=SEND_TIMEOUT_S)
    _give_up_after(channel.fileno(), ACKNOWLEDGE_S)
    channel.send("hello", index)
    channel.send("ready", index, {})
    return channel


def _give_up_after(descriptor: int, timeout_s: float) -> None:
    """Have a connection broken where what is sent is not acknowledged: the node is gone."""
    with socket.socket(fileno=socket.dup(descriptor)) as twin:  # options belong to the socket
        twin.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * timeout_s))


def _end_process() -> None:
    os._exit(1)
