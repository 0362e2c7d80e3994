"""A redis-server of the benchmark's own: empty, in memory alone, ended with the benchmark."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from cluster.config import StoreConfig
from cluster.errors import ConfigError, InvalidArgumentError, UnavailableError
from cluster.replica.mover_start import NICENESS

START_TIMEOUT_S = 10.0
_NUM_ATTEMPTS = 3  # another process may take the free port first
_SCHEMES = ("redis", "rediss", "unix")


class OwnRedis:
    """A server on a free port of this machine.

    Args:
        niceness: On top of this process's: how far it gives way to what is measured beside it.

    Raises:
        ConfigError: redis-server is not installed.
        UnavailableError: It did not start.
    """

    def __init__(self, niceness: int = NICENESS) -> None:
        self._niceness = niceness
        if shutil.which("redis-server") is None:
            raise ConfigError(
                "redis-server is not installed: install it, or name a server with --redis",
                field="redis",
            )
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="sluice-bench-redis-")
        for attempt in range(_NUM_ATTEMPTS):
            self.port = free_port()
            try:
                self.start()
                return
            except UnavailableError:
                if attempt == _NUM_ATTEMPTS - 1:
                    self._folder.cleanup()
                    raise

    @property
    def url(self) -> str:
        """Of the server, which asks for no password and listens on the loopback alone."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """Of the server's process."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def start(self) -> None:
        """Start it, empty, and return when it answers."""
        network = ("--port", str(self.port), "--bind", "127.0.0.1")
        memory_only = ("--save", "", "--appendonly", "no", "--dir", self._folder.name)
        self._process = subprocess.Popen(
            ["redis-server", *network, *memory_only],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        os.setpriority(os.PRIO_PROCESS, self._process.pid, os.nice(0) + self._niceness)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self.kill()
                raise UnavailableError(f"redis-server did not start on port {self.port}")
            time.sleep(0.01)

    def kill(self) -> None:
        """End it as a crash would, with all that it holds; ended already is fine."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """End it and remove its folder."""
        self.kill()
        self._folder.cleanup()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False


def free_port() -> int:
    """Return a port that nobody listens on, at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def redis_url(url: str | None) -> Iterator[str]:
    """Yield the URL to measure with: the given one, or that of a server of our own.

    Args:
        url: As `store.url`; None starts a server, which ends with the context.

    Raises:
        InvalidArgumentError: It is no URL of a single Redis, or shows a password.
    """
    if url is None:
        server = OwnRedis()
        try:
            yield server.url
        finally:
            server.close()
        return
    if urlsplit(url).password:  # the text is not repeated
        raise InvalidArgumentError(
            "--redis shows a password, and every user of the machine can list arguments: put the "
            "URL into an environment variable and give --redis env:NAME",
            field="redis",
        )
    scheme = urlsplit(StoreConfig(url=url).resolved_url).scheme
    if scheme not in _SCHEMES:
        raise InvalidArgumentError(
            f"--redis has the scheme {scheme!r}: use redis://, rediss://, unix:// or env:NAME",
            field="redis",
        )
    yield url
