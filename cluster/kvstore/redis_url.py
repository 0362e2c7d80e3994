"""From the URL of a Redis to what is needed to connect; no text of it gets into an error.

    redis://user:password@host:port/db                     one server (rediss:// with TLS)
    unix:///path?db=0                                      ... on this machine
    redis+sentinel://user:password@host:port,host:port/service/db      the sentinels and a service
    redis+cluster://user:password@host:port,host:port                  some nodes of a cluster

User and password are percent-encoded. `rediss+sentinel` and `rediss+cluster` use TLS. Options stand
in the query, named as in redis-py: ssl_ca_certs, ssl_certfile, ssl_keyfile, ssl_cert_reqs, ... The
sentinels themselves are asked with `sentinel_username` and `sentinel_password`, if given.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from redis.asyncio.connection import parse_url

from cluster.errors import ConfigError

_DEFAULT_PORTS = {"": 6379, "sentinel": 26379, "cluster": 6379}
_OPTIONS = ("db", "sentinel_username", "sentinel_password")  # and ssl_*

Address = tuple[str, int]


class RedisKind(StrEnum):
    """How one finds the server of a key."""

    STANDALONE = ""
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


@dataclass(frozen=True, slots=True)
class RedisTarget:
    """Where a Redis is and how one is let in; holds passwords, so it has no readable form."""

    kind: RedisKind
    addresses: tuple[Address, ...]  # of the server, the sentinels, or some nodes; none for unix
    options: dict[str, Any] = field(repr=False)  # of redis-py's connections
    sentinel_options: dict[str, Any] = field(repr=False, default_factory=dict)
    service: str = ""  # that the sentinels know

    @property
    def label(self) -> str:
        """The addresses, for errors and logs."""
        if not self.addresses:
            return str(self.options["path"])
        return ",".join(f"{host}:{port}" for host, port in self.addresses)


def parse_redis_url(url: str, config_field: str) -> RedisTarget:
    """Return where a URL leads.

    Args:
        url: In one of the forms above.
        config_field: Named in errors.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        return _parse(url)
    except (ValueError, TypeError):  # their text may hold a part of the password
        raise ConfigError(
            f"{config_field} cannot be read: use redis://user:password@host:port/db, "
            "redis+sentinel://...@host:port,host:port/service/db or "
            "redis+cluster://...@host:port,host:port, user and password percent-encoded; options "
            "are ssl_...=, sentinel_username=, sentinel_password=",
            field=config_field,
        ) from None


def _parse(url: str) -> RedisTarget:
    parts = urlsplit(url)
    # A password with a raw "#", "/" or "?" ends the host early: its beginning would be the port.
    if "#" in url or "@" in parts.path + parts.query:
        raise ValueError("not percent-encoded")
    scheme, _, kind_name = parts.scheme.partition("+")
    kind = RedisKind(kind_name)
    credentials, at, hosts = parts.netloc.rpartition("@")
    path, service = parts.path, ""
    if kind is RedisKind.SENTINEL:
        service, _, db = path.strip("/").partition("/")
        service, path = unquote(service), f"/{db}"
        if not service:
            raise ValueError("no service")
    # redis-py reads one host; the others are ours.
    first = hosts.partition(",")[0]
    options: dict[str, Any] = dict(
        parse_url(urlunsplit((scheme, credentials + at + first, path, parts.query, "")))
    )
    connection_class = options.pop("connection_class", None)
    sentinel_options = {
        name: options.pop(f"sentinel_{name}")
        for name in ("username", "password")
        if f"sentinel_{name}" in options
    }
    _check_options(options, path, kind, scheme)
    if scheme == "unix":
        return RedisTarget(kind, (), options | {"connection_class": connection_class})
    if connection_class is not None:
        options["connection_class"] = connection_class
        tls = {name: value for name, value in options.items() if name.startswith("ssl_")}
        sentinel_options |= {"connection_class": connection_class, **tls}
    addresses = tuple(_address(host, _DEFAULT_PORTS[kind]) for host in hosts.split(","))
    options.pop("host", None)
    options.pop("port", None)
    return RedisTarget(kind, addresses, options, sentinel_options, service)


def _check_options(options: dict[str, Any], path: str, kind: RedisKind, scheme: str) -> None:
    known = {"username", "password", "host", "port", "path", *_OPTIONS}
    if any(name not in known and not name.startswith("ssl_") for name in options):
        raise ValueError("an unknown option")
    if scheme == "unix":
        if kind is not RedisKind.STANDALONE or not options.get("path"):
            raise ValueError("no path of a socket")
        return
    if path.strip("/") and "db" not in options:  # redis-py passes over a db that is no number
        raise ValueError("no number of a database")
    if kind is RedisKind.CLUSTER and options.get("db"):
        raise ValueError("a cluster has one database")


def _address(text: str, default_port: int) -> Address:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("no host")
    port = parts.port  # raises for what is no port
    return unquote(parts.hostname), default_port if port is None else port
