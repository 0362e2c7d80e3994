"""Messages between a leader, its workers and movers: msgpack over an authenticated socket.

The socket is what tells a death: the kernel closes it in the moment in which a process ends,
however it ends. Nothing that arrives is unpickled.
"""

from __future__ import annotations

import math
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any, cast

import msgpack

from cluster.errors import UnavailableError

POLL_S = 0.5  # how soon a closed listener is noticed
HELLO_TIMEOUT_S = 5.0  # a worker greets as soon as it is connected
MAX_MESSAGE_BYTES = 64 * 2**20  # a step plan of a full batch is far below this


class Channel:
    """One end of a connection: sends and receives tuples of plain data, in order."""

    def __init__(self, connection: Connection, *, send_timeout_s: float) -> None:
        self._connection = connection
        _set_send_timeout(connection.fileno(), send_timeout_s)

    def fileno(self) -> int:
        """Return the descriptor, so that `multiprocessing.connection.wait` takes a channel."""
        return self._connection.fileno()

    def send(self, kind: str, *values: Any) -> None:
        """Send one message.

        Raises:
            UnavailableError: The peer is gone, or has not read for the send timeout.
        """
        try:
            self._connection.send_bytes(msgpack.packb((kind, *values)))
        except OSError as error:
            raise UnavailableError(f"the connection is lost: {error}") from error

    def receive(self) -> tuple[Any, ...]:
        """Return the next message; blocks until there is one.

        Raises:
            UnavailableError: The peer is gone, or sent what is no message.
        """
        try:
            message = msgpack.unpackb(
                self._connection.recv_bytes(MAX_MESSAGE_BYTES), use_list=False
            )
        except (EOFError, OSError, ValueError) as error:
            raise UnavailableError("the connection is lost") from error
        assert isinstance(message, tuple)
        return message

    def close(self) -> None:
        """Close the socket; the peer notices at once."""
        self._connection.close()


class ChannelListener:
    """The leader's side: waits for its workers to call.

    Args:
        host: Address to listen on.
        num_workers: How many will call.
    """

    def __init__(self, host: str, num_workers: int) -> None:
        self.auth_key = secrets.token_bytes(32)
        self._listener = Listener((host, 0), backlog=num_workers, authkey=self.auth_key)
        listens_on, port = self._listener.address
        self.address = str(listens_on), int(port)
        """Host and port that workers call."""
        self._num_workers = num_workers
        self._is_closed = False
        self._deadline_s = math.inf

    def accept_all(
        self,
        *,
        timeout_s: float,
        send_timeout_s: float,
        on_ready: Callable[[int, dict[str, Any]], None],
    ) -> list[Channel]:
        """Return one channel per worker, by index, when each has said that it is ready.

        A worker says ``("hello", index)`` at once, so that all can start together and find each
        other, and later ``("ready", index, facts)``. Blocks; `close` from another thread ends it.

        Raises:
            UnavailableError: The time is over, the listener was closed, or a worker failed while
                it started.
        """
        self._deadline_s = time.monotonic() + timeout_s
        channels: dict[int, Channel] = {}
        while len(channels) < self._num_workers:
            channel = self._accept(send_timeout_s)
            if channel is not None:
                kind, index = channel.receive()
                assert kind == "hello", kind
                channels[index] = channel
        waiting = {channel: index for index, channel in channels.items()}
        while waiting:
            self._check_open()
            for channel in wait_readable(waiting, timeout_s=POLL_S):
                try:
                    kind, index, facts = channel.receive()
                except UnavailableError as error:
                    raise UnavailableError(
                        f"worker {waiting[channel]} ended without a word while it started: too "
                        "little memory does that, and a full /dev/shm; its log may say more"
                    ) from error
                if kind != "ready":
                    raise UnavailableError(f"worker {index}: {facts}")
                on_ready(index, facts)
                del waiting[channel]
        return [channels[index] for index in range(self._num_workers)]

    def _accept(self, send_timeout_s: float) -> Channel | None:
        """Return a channel whose first message is there; None for a stranger."""
        self._check_open()
        try:
            connection = self._listener.accept()
        except Exception:  # a stranger failed the challenge, or the listener was closed
            self._check_open()
            return None
        if not connection.poll(HELLO_TIMEOUT_S):
            connection.close()
            return None
        return Channel(connection, send_timeout_s=send_timeout_s)

    def _check_open(self) -> None:
        if self._is_closed or time.monotonic() > self._deadline_s:
            raise UnavailableError(
                "workers did not start: the group ended, or replica.start_timeout_s is over"
            )

    def close(self) -> None:
        """Stop listening; again is fine."""
        if self._is_closed:
            return
        self._is_closed = True
        # accept() in another thread sleeps through a close; a call wakes it up
        threading.Thread(target=_knock, args=(self.address,), daemon=True).start()
        self._listener.close()


def channel_pair(send_timeout_s: float) -> tuple[Channel, socket.socket]:
    """Return one end of a connection on this machine, and the socket of its other end."""
    ours, theirs = socket.socketpair()
    return Channel(Connection(ours.detach()), send_timeout_s=send_timeout_s), theirs


def channel_of(descriptor: int, *, send_timeout_s: float) -> Channel:
    """Return a channel on a connected socket, which it owns from now on."""
    return Channel(Connection(descriptor), send_timeout_s=send_timeout_s)


def wait_readable(channels: Iterable[Channel], timeout_s: float | None) -> list[Channel]:
    """Return the channels that have a message or have lost their peer; none if time is over."""
    return cast("list[Channel]", wait(cast("Any", list(channels)), timeout_s))


def connect(address: tuple[str, int], auth_key: bytes, *, send_timeout_s: float) -> Channel:
    """Return a worker's channel to its leader.

    Raises:
        UnavailableError: Nobody listens there, or not with this key.
    """
    try:
        connection = Client((address[0], address[1]), authkey=auth_key)
    except Exception as error:
        raise UnavailableError(f"leader at {address[0]}:{address[1]}: {error}") from error
    return Channel(connection, send_timeout_s=send_timeout_s)


def _knock(address: tuple[str, int]) -> None:
    try:
        socket.create_connection(address, timeout=1.0).close()
    except OSError:
        return


def _set_send_timeout(descriptor: int, timeout_s: float) -> None:
    seconds = int(timeout_s)
    microseconds = int((timeout_s - seconds) * 1e6)
    with socket.socket(fileno=socket.dup(descriptor)) as twin:  # options belong to the socket
        twin.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", seconds, microseconds)
        )
        if twin.family != socket.AF_UNIX:
            twin.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
