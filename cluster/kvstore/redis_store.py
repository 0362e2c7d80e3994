"""Leases, counters, journals and records in Redis: shared by machines, surviving the cluster.

    {ns}:v2:lease:KIND:KEY     string, PX    value of a lease
    {ns}:v2:leases:KIND        zset          keys of a kind by the time of their expiry
    {ns}:v2:records:KIND       hash          key -> value; '' -> version
    {ns}:v2:journal:KEY        list, PX      scope, owner, live or ended, then the entries
    {ns}:v2:journals:order     zset          keys of journals: who makes room first
    {ns}:v2:journals:books     hash          key of a journal -> cost; '' -> their sum
    ns:v2:count:KEY            string, PX    a counter

`ns` is the namespace, and braces are a cluster's hash tags: leases and records are few, journals
have exact books together, so they lie on one node; counters lie on all. Every operation is one
round trip with one deadline. Nothing is retried: an addition that is sent twice would be there
twice, and every caller can do without the store.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from cluster.clock import WallClock
from cluster.config import StoreConfig
from cluster.errors import OverloadedError
from cluster.kvstore.redis_connection import Command
from cluster.kvstore.redis_journal_scripts import (
    CLAIM_JOURNAL,
    MAX_SCRIPT_WRITES,
    WRITE_JOURNALS,
)
from cluster.kvstore.redis_link import Batch, RedisLink
from cluster.kvstore.redis_scripts import (
    COUNT,
    DROP_RECORD,
    LIST_LEASES,
    LIST_RECORDS,
    PUT_LEASE,
    PUT_RECORD,
)
from cluster.kvstore.redis_url import parse_redis_url
from cluster.kvstore.store import (
    MAX_COUNT,
    MAX_RECORDS,
    Journal,
    JournalOutcome,
    JournalWrite,
    JournalWrites,
    Records,
    check_record,
    too_many_records,
)


class RedisStore:
    """The `Store` protocol on a Redis; belongs to the event loop that first uses it.

    Args:
        config: `resolved_url` says where; no connection is made before the first call.

    Raises:
        ConfigError: The URL cannot be read.
    """

    def __init__(self, config: StoreConfig) -> None:
        self._config = config
        self._prefix = f"{{{config.namespace}}}:v2:"
        target = parse_redis_url(config.resolved_url, "store.url")
        self._link = RedisLink(target, config.timeout_s, WallClock())

    async def put_lease(self, kind: str, key: str, value: bytes, ttl_s: float) -> None:
        """Make `key` present for `ttl_s` seconds, with `value`; renews and replaces."""
        keys = (self._lease(kind, key), self._lease_index(kind))
        await self._run("put_lease", ("EVAL", PUT_LEASE, 2, *keys, key, value, _ms(ttl_s)))

    async def drop_lease(self, kind: str, key: str) -> None:
        """Make `key` absent now; absent already is fine."""
        index = self._lease_index(kind)
        await self._run("drop_lease", ("DEL", self._lease(kind, key)), ("ZREM", index, key))

    async def list_leases(self, kind: str) -> dict[str, bytes]:
        """Return the live leases of a kind, ordered by key."""
        arguments = (self._lease_index(kind), self._lease(kind, ""))
        (flat,) = await self._run("list_leases", ("EVAL", LIST_LEASES, 1, *arguments))
        return _pairs(flat)

    async def count(
        self, key: str, amount: int, ttl_s: float, *, at_most: int | None = None
    ) -> int:
        """Add to a counter, which is 0 at first; return the sum, the amount included."""
        name = f"{self._config.namespace}:v2:count:{key}"
        limit = MAX_COUNT if at_most is None else at_most
        command = ("EVAL", COUNT, 1, name, amount, limit, _ms(ttl_s))
        ((total,),) = await self._link.run("count", Batch(name.encode(), [command]))
        return int(total)

    async def put_record(
        self, kind: str, key: str, value: bytes, *, if_absent: bool = False
    ) -> bool:
        """Keep `value` under `key` until it is dropped; return whether it is the one kept now.

        Raises:
            InvalidArgumentError: The value is too long.
            OverloadedError: There are too many.
        """
        check_record(kind, key, value)
        limits = (MAX_RECORDS, int(if_absent))
        arguments = (self._records(kind), key, value, uuid.uuid4().hex, *limits)
        (outcome,) = await self._run("put_record", ("EVAL", PUT_RECORD, 1, *arguments))
        if outcome == b"full":
            raise OverloadedError(too_many_records(kind))
        return bool(outcome == b"kept")

    async def drop_record(self, kind: str, key: str) -> None:
        """Make `key` absent now; absent already is fine."""
        arguments = (self._records(kind), key, uuid.uuid4().hex)
        await self._run("drop_record", ("EVAL", DROP_RECORD, 1, *arguments))

    async def list_records(self, kind: str, known_version: str = "") -> Records:
        """Return the records of a kind, ordered by key, unless `known_version` is theirs still."""
        arguments = (self._records(kind), known_version)
        ((version, *flat),) = await self._run("list_records", ("EVAL", LIST_RECORDS, 1, *arguments))
        if not flat:
            return Records(version.decode(), None)
        values = _pairs(flat[0])
        values.pop("", None)
        return Records(version.decode(), values)

    async def write_journals(self, writes: Sequence[JournalWrite]) -> JournalWrites:
        """Append to journals, in order and in one round trip; renew the TTL of those written."""
        pieces = [
            writes[start : start + MAX_SCRIPT_WRITES]
            for start in range(0, len(writes), MAX_SCRIPT_WRITES)
        ]
        commands = [
            self._journal_script(
                WRITE_JOURNALS, *(item for write in piece for item in _flat(write))
            )
            for piece in pieces
        ]
        replies = await self._run("write_journals", *commands) if commands else []
        return JournalWrites(
            [JournalOutcome(name.decode()) for _, _, *names in replies for name in names],
            num_dropped_finished=sum(reply[0] for reply in replies),
            num_dropped_live=sum(reply[1] for reply in replies),
        )

    async def read_journal(self, key: str) -> Journal | None:
        """Return a journal of any scope; None where there is none."""
        (items,) = await self._run("read_journal", ("LRANGE", self._journal(key), 0, -1))
        return _journal_of(items)

    async def claim_journal(self, key: str, scope: str, owner: str) -> Journal | None:
        """Make `owner` the one who writes, if there is a journal of this scope; renew its TTL."""
        command = self._journal_script(CLAIM_JOURNAL, key, scope, owner)
        (items,) = await self._run("claim_journal", command)
        return _journal_of(items)

    async def ping(self) -> None:
        """Return if the server answers."""
        await self._run("ping", ("PING",))

    async def close(self) -> None:
        """Close the connections; what is stored stays."""
        await self._link.close()

    async def _run(self, name: str, *commands: Command) -> list[Any]:
        (replies,) = await self._link.run(name, Batch(self._prefix.encode(), list(commands)))
        return replies

    def _lease(self, kind: str, key: str) -> str:
        assert ":" not in kind, f"{kind=}: a colon would let kinds collide"
        return f"{self._prefix}lease:{kind}:{key}"

    def _lease_index(self, kind: str) -> str:
        return f"{self._prefix}leases:{kind}"

    def _records(self, kind: str) -> str:
        return f"{self._prefix}records:{kind}"

    def _journal(self, key: str) -> str:
        return f"{self._prefix}journal:{key}"

    def _journal_script(self, text: str, *arguments: Any) -> Command:
        keys = (f"{self._prefix}journals:order", f"{self._prefix}journals:books")
        limits = (_ms(self._config.journal_ttl_s), self._config.journal_bytes)
        return ("EVAL", text, len(keys), *keys, self._journal(""), *limits, *arguments)


def _flat(write: JournalWrite) -> tuple[str | int | bytes, ...]:
    """Return a write as the script takes it."""
    assert write.key, "the empty key is that of the sums"
    who = (write.key, write.scope, write.owner)
    return (*who, int(write.begins), int(write.ends), len(write.entries), *write.entries)


def _journal_of(items: list[bytes | bytearray]) -> Journal | None:
    if len(items) < 3:
        return None
    scope, owner, state, *entries = map(bytes, items)
    return Journal(scope.decode(), owner.decode(), entries, is_ended=state == b"ended")


def _pairs(flat: list[bytes | bytearray]) -> dict[str, bytes]:
    pairs = zip(flat[::2], flat[1::2], strict=True)
    return dict(sorted((key.decode(), bytes(value)) for key, value in pairs))


def _ms(duration_s: float) -> int:
    return max(1, round(duration_s * 1000))
