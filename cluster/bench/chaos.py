"""`sluice bench chaos`: faults against a running cluster under load, and a checker of every stream.

    start ─► every request in quiet ─► load, a fault per interval ─► quiet again ─► end
             what it must answer       every stream is checked       what is left over

One seed is one schedule of faults and one choice of requests; when exactly each happens to which
stream is the machine's.
"""

from __future__ import annotations

import asyncio
from typing import Any

from cluster.bench.chaos_cluster import chaos_config, running_cluster
from cluster.bench.chaos_plan import ChaosPlan
from cluster.bench.chaos_run import ChaosRun, Listener
from cluster.config import ClusterConfig


def run_chaos(
    plan: ChaosPlan, overrides: list[str] | None = None, listener: Listener | None = None
) -> dict[str, Any]:
    """Start a cluster, disturb it, and return the figures.

    `is_clean` is among them; `not_clean` says why it is not.

    Args:
        plan: What to do.
        overrides: Of the cluster's configuration, as of `--set`.
        listener: Told how it goes.

    Raises:
        ConfigError: There is no redis-server, or the configuration cannot work.
        SluiceError: The cluster did not come up, or fails undisturbed.
    """
    listener = listener or Listener()

    def make_config(url: str) -> ClusterConfig:
        return chaos_config(plan, url, overrides or [])

    with running_cluster(make_config, listener.tell) as cluster:
        run = ChaosRun(plan, cluster, listener)
        asyncio.run(run.run())
        listener.tell("ending the cluster")
    return run.figures()
