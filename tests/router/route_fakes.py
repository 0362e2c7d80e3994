"""Replicas and requests, small enough to follow by hand."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from cluster.config import RouterConfig
from cluster.router.prefix_index import PrefixIndex
from cluster.router.replica_table import ReplicaTable, Sent
from cluster.router.route import Decision, RouteRequest
from cluster.router.router import Router
from cluster.router.view import View
from cluster.types import (
    NO_SLO,
    SLO,
    DueWork,
    ReplicaInfo,
    ReplicaLoad,
    ServiceClass,
    StepCost,
)

BLOCK_SIZE = 16
TOKEN_S = 1e-3
STEP_S = 0.01
IDLE = ReplicaLoad(
    num_free_blocks=10_000, num_blocks=10_000, prefill_token_s=TOKEN_S, decode_step_s=STEP_S
)
_ids = itertools.count()


def info(
    replica_id: str,
    *,
    fingerprint: str = "f",
    block_size: int = BLOCK_SIZE,
    model: str = "m",
    max_model_len: int = 100_000,
) -> ReplicaInfo:
    return ReplicaInfo(replica_id, "host:1", model, fingerprint, 1, 1, block_size, max_model_len)


def load(*, work_s: float = 0.0, due_s: float = 1.0, **others: object) -> ReplicaLoad:
    """Return the load of a replica with prompts of `work_s`, all due at one time."""
    due = (DueWork(due_s, work_s),) if work_s else ()
    return replace(IDLE, due=due, **others)  # type: ignore[arg-type]


def cost(**others: float) -> StepCost:
    zero = StepCost(0.0, 0.0, (), 0.0, 0.0, 0.0)
    return replace(zero, **others)  # type: ignore[arg-type]


def request(
    num_tokens: int = 160,
    keys: Sequence[int] | Mapping[str, Sequence[int]] = (),
    *,
    name: str = "",
    ttft_s: float | None = None,
    tpot_s: float | None = None,
    arrived_s: float = 0.0,
    service_class: ServiceClass = ServiceClass.STANDARD,
    session: str = "",
    model: str = "",
    tenant: str = "",
    expires_s: float = math.inf,
    excluded: tuple[str, ...] = (),
) -> RouteRequest:
    def keys_of(fingerprint: str, block_size: int) -> Sequence[int]:
        del block_size
        return keys[fingerprint] if isinstance(keys, Mapping) else keys

    return RouteRequest(
        name or f"r{next(_ids)}",
        num_tokens,
        keys_of,
        arrived_s,
        slo=SLO(ttft_s, tpot_s) if (ttft_s, tpot_s) != (None, None) else NO_SLO,
        service_class=service_class,
        session=session,
        model=model,
        tenant=tenant,
        expires_s=expires_s,
        excluded=excluded,
    )


class Pool:
    """A router with its table and index, as one gateway has them."""

    def __init__(
        self,
        loads: Mapping[str, ReplicaLoad] | Iterable[str] = (),
        *,
        policy: str = "slo",
        seed: int = 0,
        infos: Mapping[str, ReplicaInfo] | None = None,
    ) -> None:
        config = RouterConfig.model_validate({"policy": policy})
        self.table, self.index = ReplicaTable(), PrefixIndex()
        self.router = Router(config, random.Random(seed))
        if not isinstance(loads, Mapping):
            loads = dict.fromkeys(loads, IDLE)
        for replica_id, its_load in loads.items():
            self.add((infos or {}).get(replica_id) or info(replica_id), its_load)

    def add(
        self, replica: ReplicaInfo, its_load: ReplicaLoad = IDLE, *, keys: Sequence[int] = ()
    ) -> None:
        self.index.replace(replica.replica_id, keys)
        self.table.add(replica, its_load, now_s=0.0)

    def remove(self, replica_id: str) -> None:
        self.table.remove(replica_id)
        self.index.drop(replica_id)

    def cache(self, **keys: Sequence[int]) -> Pool:
        """Say what is cached where."""
        for replica_id, its_keys in keys.items():
            self.index.apply(replica_id, added=its_keys, removed=())
        return self

    def pick(self, route: RouteRequest, now_s: float = 0.0) -> Decision:
        decision = self.router.pick(route, self.table, self.index, now_s)
        assert decision is not None
        return decision

    def send(self, route: RouteRequest, now_s: float = 0.0) -> str:
        """Pick, take and count as sent; return where it went."""
        chosen = self.pick(route, now_s).chosen
        self.router.take()
        due_s = math.inf if route.slo.ttft_s is None else route.arrived_s + route.slo.ttft_s
        sent = Sent(chosen.num_uncached_tokens, 1, chosen.own_s, due_s)
        self.table.on_submit(chosen.replica_id, route.request_id, sent)
        return chosen.replica_id

    def view(self, route: RouteRequest, now_s: float = 0.0) -> View:
        """Return what a policy sees, of all replicas."""
        seen: list[View] = []
        policy = self.router._policy
        score: Callable[[View], object] = policy.score

        def spy(view: View) -> object:
            seen.append(view)
            return score(view)

        policy.score = spy  # type: ignore[method-assign, assignment]
        try:
            self.pick(route, now_s)
        finally:
            policy.score = score  # type: ignore[method-assign, assignment]
        return seen[0]
