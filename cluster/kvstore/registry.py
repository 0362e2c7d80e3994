"""Who is there: replica groups as leases of the kind `replica`."""

from __future__ import annotations

import logging
from typing import Literal

from pydantic import BaseModel, ValidationError

from cluster.kvstore.store import Store
from cluster.types import ReplicaInfo

logger = logging.getLogger(__name__)

REPLICA_LEASES = "replica"


class _Entry(BaseModel):
    version: Literal[1] = 1
    replica: ReplicaInfo


class Registry:
    """Replica groups that are present in a store.

    Args:
        store: Shared by all replicas and gateways; stays the caller's.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._unreadable: set[str] = set()

    async def register(self, info: ReplicaInfo, ttl_s: float) -> None:
        """Make a replica known for `ttl_s` seconds; call again to renew.

        Raises:
            UnavailableError: The store is out of reach.
        """
        value = _Entry(replica=info).model_dump_json().encode()
        await self._store.put_lease(REPLICA_LEASES, info.replica_id, value, ttl_s)

    async def unregister(self, replica_id: str) -> None:
        """Make a replica unknown now; unknown already is fine.

        Raises:
            UnavailableError: The store is out of reach.
        """
        await self._store.drop_lease(REPLICA_LEASES, replica_id)

    async def list(self) -> list[ReplicaInfo]:
        """Return the known replicas, by id; an entry that cannot be read is left out.

        Raises:
            UnavailableError: The store is out of reach.
        """
        replicas = []
        unreadable = set()
        for key, value in (await self._store.list_leases(REPLICA_LEASES)).items():
            try:
                replicas.append(_Entry.model_validate_json(value, strict=True).replica)
            except ValidationError as error:
                unreadable.add(key)
                if key not in self._unreadable:  # once: it is listed many times a second
                    reason = error.errors()[0]
                    logger.warning(
                        "replica %s left out: its entry is from another version or damaged (%s %s)",
                        *(key, ".".join(map(str, reason["loc"])), reason["msg"]),
                    )
        self._unreadable = unreadable
        return replicas
