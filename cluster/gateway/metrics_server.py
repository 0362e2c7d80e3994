"""Prometheus metrics over HTTP, on the event loop that owns what they read.

No thread reads the router's tables while they change, and everything is bounded: connections, the
size of a request, its time.
"""

from __future__ import annotations

import asyncio
import logging

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

logger = logging.getLogger(__name__)

_NUM_PORTS = 17  # the one asked for and the 16 after it: gateways may share a machine
_MAX_CONNECTIONS = 16
_MAX_REQUEST_BYTES = 16 * 1024
_TIMEOUT_S = 5.0  # of one scrape, from connecting to the last byte
_PATHS = ("/metrics", "/")


class MetricsServer:
    """Answers `GET /metrics`.

    Args:
        registry: What is served.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._server: asyncio.Server | None = None
        self._num_connections = 0

    async def start(self, host: str, port: int) -> int | None:
        """Listen; return the port: the next free one if others of this machine have it.

        A gateway serves without metrics rather than not at all: where no port is free this is
        logged, and None is returned.
        """
        host, reason = host.strip("[]"), ""
        for candidate in range(port, min(port + _NUM_PORTS, 2**16)):
            try:
                # Without SO_REUSEPORT: a scrape must reach the gateway that it asks.
                self._server = await asyncio.start_server(
                    self._serve, host, candidate, limit=_MAX_REQUEST_BYTES, reuse_port=False
                )
            except OSError as error:
                reason = f": port {candidate}: {error.strerror}"
                continue
            bound: int = self._server.sockets[0].getsockname()[1]
            level = logging.WARNING if reason else logging.INFO
            logger.log(level, "metrics are on port %d of %s%s", bound, host, reason)
            return bound
        logger.warning("no metrics: tried %d ports from %d on%s", _NUM_PORTS, port, reason)
        return None

    async def stop(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._num_connections += 1
        try:
            if self._num_connections <= _MAX_CONNECTIONS:
                async with asyncio.timeout(_TIMEOUT_S):
                    writer.write(self._answer(await reader.readuntil(b"\r\n\r\n")))
                    writer.close()
                    await writer.wait_closed()  # a connection counts until its last byte has left
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
            logger.debug("a scrape was cut off", exc_info=True)
        except Exception:
            logger.exception("a scrape failed")
        finally:
            writer.transport.abort()  # what waits to be sent to who does not read goes too
            self._num_connections -= 1

    def _answer(self, request: bytes) -> bytes:
        method, _, rest = request.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0].decode(errors="replace")
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", b"")
        if path not in _PATHS:
            return _response("404 Not Found", b"")
        body = generate_latest(self._registry)
        return _response("200 OK", body, with_body=method == b"GET")


def _response(status: str, body: bytes, *, with_body: bool = True) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE_LATEST}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (body if with_body else b"")
