"""One prompt before the router, until a replica takes it."""

from __future__ import annotations

import time

from cluster.gateway.fleet import Fleet
from cluster.kvstore.block_hash import block_hashes, router_key
from cluster.metrics import Metrics
from cluster.router.router import Decision, Router
from cluster.types import ReplicaSnapshot


class PromptRouting:
    """Asks the router for one prompt, again and again if it must; hashes the prompt once.

    Args:
        salt: Of the tenant, as the engines get it.
    """

    def __init__(
        self,
        token_ids: tuple[int, ...],
        *,
        salt: bytes,
        fleet: Fleet,
        router: Router,
        metrics: Metrics,
    ) -> None:
        self._token_ids = token_ids
        self._salt = salt
        self._fleet = fleet
        self._router = router
        self._metrics = metrics
        self._keys: dict[tuple[str, int], list[int]] = {}

    def pick(self) -> Decision | None:
        """Choose among the replicas as they are now; None if there is none.

        Replicas of another fingerprint or block size (an upgrade is under way) know the prompt by
        other hashes: each kind is asked about by itself.
        """
        start_s = time.perf_counter()
        kinds: dict[tuple[str, int], list[ReplicaSnapshot]] = {}
        for replica in self._fleet.table.snapshots():
            kind = (replica.info.fingerprint, replica.info.block_size)
            kinds.setdefault(kind, []).append(replica)
        decisions = [
            decision
            for kind, replicas in kinds.items()
            if (decision := self._pick_among(kind, replicas)) is not None
        ]
        self._metrics.route.observe(time.perf_counter() - start_s)
        return min(decisions, key=lambda decision: decision.chosen.score, default=None)

    def _pick_among(
        self, kind: tuple[str, int], replicas: list[ReplicaSnapshot]
    ) -> Decision | None:
        if kind not in self._keys:
            hashes = block_hashes(
                self._token_ids, kind[1], fingerprint=bytes.fromhex(kind[0]), salt=self._salt
            )
            self._keys[kind] = [router_key(block_hash) for block_hash in hashes]
        return self._router.pick(
            self._keys[kind], len(self._token_ids), replicas, self._fleet.index
        )
