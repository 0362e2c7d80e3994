"""What the replicas reported last, collected at the moment of a scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cluster.kvstore.breaker import BreakerState
from cluster.metrics import CONTROL_STORE_STATE, REPLICA_METRICS, ReplicaMetric
from cluster.types import ReplicaSnapshot


class FleetCollector(Collector):
    """Yields `REPLICA_METRICS` of the replicas there are: one that went leaves no series behind.

    Args:
        snapshots: Returns the replicas with their newest load reports.
        store_state: Returns what the breaker of this gateway's control store lets through.
    """

    def __init__(
        self,
        snapshots: Callable[[], Iterable[ReplicaSnapshot]],
        store_state: Callable[[], BreakerState],
    ) -> None:
        self._snapshots = snapshots
        self._store_state = store_state

    def collect(self) -> Iterator[Metric]:
        """Yield one family per metric."""
        snapshots = list(self._snapshots())
        for metric in REPLICA_METRICS:
            yield _family(metric, snapshots)
        control = GaugeMetricFamily(
            CONTROL_STORE_STATE, "1 for what goes to the control store.", labels=["state"]
        )
        present = self._store_state()
        for state in BreakerState:
            control.add_metric([state.value], float(state is present))
        yield control


def _family(metric: ReplicaMetric, snapshots: list[ReplicaSnapshot]) -> Metric:
    kind = CounterMetricFamily if metric.is_counter else GaugeMetricFamily
    names = ["replica_id", *([metric.label] if metric.label else [])]
    family = kind(metric.name, metric.description, labels=names)
    for snapshot in snapshots:
        replica_id, value = snapshot.info.replica_id, metric.read(snapshot.load)
        if isinstance(value, int | float):
            family.add_metric([replica_id], value)
        else:
            for label, part in value.items():
                family.add_metric([replica_id, label], part)
    return family
