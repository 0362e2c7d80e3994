"""In which order waiting things are served: classes and tenants by their weights, then by time.

    classes     interactive 8   standard 4   batch 1     fair by the classes' weights
    tenants     in each class                            fair by the tenants' weights
    items       of each tenant                           first due, first served

A round is a burst of tokens / weight: who comes in the same round is ordered by due time.

Source: fairness.py; the order ahead is start-time fair queueing (Goyal et al., SIGCOMM 1996).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from cluster.fairness import FairShare


class Served(Protocol):
    """What waits: a request, or a sequence."""

    @property
    def tenant(self) -> str:
        """Who shares a fair share."""
        ...

    @property
    def tenant_weight(self) -> float:
        """Of this share, > 0."""
        ...

    @property
    def num_tokens(self) -> int:
        """What it is expected to be charged."""
        ...


T = TypeVar("T", bound=Served)


@dataclass(slots=True)
class _Class(Generic[T]):
    weight: float
    shares: FairShare[str]  # of its tenants
    items: dict[str, list[tuple[float, int, T]]] = field(
        default_factory=dict
    )  # by tenant, in order


class FairOrder(Generic[T]):
    """Waiting items by class and tenant, and what each of these has been served.

    An item is (when it is due in seconds, its serial number, itself).

    Args:
        weights: Of the classes, by name, each > 0.
        burst_tokens: By weight, that a class or tenant may be ahead of another, > 0.
    """

    def __init__(self, weights: Mapping[str, float], burst_tokens: float) -> None:
        assert burst_tokens > 0, f"{burst_tokens=}"
        self._burst_tokens = burst_tokens
        self._shares: FairShare[str] = FairShare(burst_tokens)  # of the classes
        self._classes: dict[str, _Class[T]] = {
            name: _Class(weight, FairShare(burst_tokens)) for name, weight in weights.items()
        }

    def put(self, class_name: str, item: tuple[float, int, T]) -> None:
        """Let an item wait in a class."""
        kind, tenant = self._classes[class_name], item[2].tenant
        insort(kind.items.setdefault(tenant, []), item, key=_place)
        self._shares.arrive(class_name)
        kind.shares.arrive(tenant)

    def take(self, class_name: str, item: tuple[float, int, T]) -> None:
        """Take out an item that waits in a class."""
        tenant = item[2].tenant
        items = self._classes[class_name].items[tenant]
        del items[bisect_left(items, item[:2], key=_place)]
        if not items:
            del self._classes[class_name].items[tenant]
        self._leave_if_idle(class_name, tenant)

    def charge(self, class_name: str, served: T, num_tokens: int) -> None:
        """Note that a class and a tenant are served, whether they wait or not."""
        kind, tenant = self._classes[class_name], served.tenant
        # As one that waits: so nobody gets a debt by what is served while nobody else wants it.
        self._shares.arrive(class_name)
        kind.shares.arrive(tenant)
        self._shares.charge(class_name, num_tokens, kind.weight)
        kind.shares.charge(tenant, num_tokens, served.tenant_weight)
        self._leave_if_idle(class_name, tenant)

    def __iter__(self) -> Iterator[T]:
        """Return what waits, in order, each as if those before it had been served.

        It is found as it is read, and not changed by what happens meanwhile.
        """
        streams = []
        for name, lead in self._shares.leads().items():
            kind = self._classes[name]
            tenants = [
                self._in_rounds(list(kind.items[tenant]), ahead, 0.0)
                for tenant, ahead in kind.shares.leads().items()
            ]
            items = (item for _, _, item in _merged(tenants))
            streams.append(self._in_rounds(items, lead, kind.weight))
        return (item[2] for _, _, item in _merged(streams))

    def items(self) -> Iterator[tuple[str, tuple[float, int, T]]]:
        """Return what waits with its class, in no order that means anything."""
        for name, kind in self._classes.items():
            for items in kind.items.values():
                for item in items:
                    yield name, item

    def check_invariants(self) -> None:
        """Assert that exactly those count as waiting who have an item here, in order."""
        for name, kind in self._classes.items():
            assert kind.shares.leads().keys() == kind.items.keys()
            assert (name in self._shares.leads()) == bool(kind.items)
            for items in kind.items.values():
                assert items and items == sorted(items, key=_place)

    def _leave_if_idle(self, class_name: str, tenant: str) -> None:
        kind = self._classes[class_name]
        if tenant not in kind.items:
            kind.shares.leave(tenant)
        if not kind.items:
            self._shares.leave(class_name)

    def _in_rounds(
        self, items: Iterable[tuple[float, int, T]], lead: float, weight: float
    ) -> Iterator[tuple[int, tuple[float, int], tuple[float, int, T]]]:
        """Yield the items of one class or tenant with their rounds and places.

        Args:
            items: In order.
            lead: Of the class or tenant, before the first item.
            weight: Of the class; 0: that of each item's tenant.
        """
        for item in items:
            yield int(lead // self._burst_tokens), item[:2], item
            lead += item[2].num_tokens / (weight or item[2].tenant_weight)


def _place(item: tuple[float, int, T]) -> tuple[float, int]:
    return item[:2]


def _merged(
    streams: list[Iterator[tuple[int, tuple[float, int], tuple[float, int, T]]]],
) -> Iterator[tuple[int, tuple[float, int], tuple[float, int, T]]]:
    """Yield items by round, due time and serial number: always the least of the streams' heads."""
    return streams[0] if len(streams) == 1 else heapq.merge(*streams, key=lambda entry: entry[:2])
