"""The processes of `sluice bench resumption`: ``python -m cluster.bench.resumption_processes``.

    bench ──one line of JSON per order──► nursery ──fork──► leader   real engine, real service
          ◄──one line with its address───────────────────── gateway  the real one

The nursery has imported whatever a member needs and runs no thread: a member that replaces a killed
one is there in a fraction of a second. An order is ``{"role": "leader", "name": ..., "config": ...,
"min_step_s": ..., "executor": ...}``, the last names a callable as ``package.module:name`` that
wraps the executor, or is empty; a gateway has role, name and config alone.

SIGTERM ends a member well. The nursery ends when its standard input does, and its members end with
it: they watch a pipe of which it holds the other end.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import logging
import os
import pkgutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cluster.clock import WallClock
from cluster.config import ClusterConfig, parse_config
from cluster.engine.executor import Executor
from cluster.errors import SluiceError
from cluster.step import StepPlan, StepResult

if TYPE_CHECKING:
    from cluster.kvstore.store import Store

logger = logging.getLogger(__name__)

_PRELOAD = (
    "cluster.gateway.fleet",
    "cluster.gateway.grpc_server",
    "cluster.kvstore.open",
    "cluster.kvstore.redis_store",
    "cluster.model.checkpoint",
    "cluster.model.runner",
    "cluster.replica.build",
    "cluster.replica.executor",
    "cluster.replica.leader",
    "grpc.aio",
    "torch",
    "transformers.models.llama.modeling_llama",
)
_NUM_BLOCKS = 512  # of a leader's KV cache
_GATEWAY_LEASE_TTL_S = 2.0
_reports = 1  # descriptor of reports to the bench


class SteadyExecutor:
    """An executor whose steps take at least a certain time, as those of a larger model do.

    Args:
        executor: Computes; belongs to this one.
        min_step_s: Of each step.
    """

    def __init__(self, executor: Executor, min_step_s: float) -> None:
        self._executor = executor
        self._min_step_s = min_step_s

    @property
    def max_in_flight(self) -> int:
        """Steps that may be submitted and not collected."""
        return self._executor.max_in_flight

    @property
    def num_blocks(self) -> int:
        """KV blocks of the executor."""
        return self._executor.num_blocks

    def submit(self, plan: StepPlan) -> None:
        """Begin a step."""
        self._executor.submit(plan)

    def collect(self, timeout_s: float) -> StepResult:
        """Return the oldest step's result, not before its time."""
        start_s = time.perf_counter()
        result = self._executor.collect(timeout_s)
        time.sleep(max(0.0, self._min_step_s - (time.perf_counter() - start_s)))
        return replace(result, elapsed_s=time.perf_counter() - start_s)

    def shutdown(self) -> None:
        """End the executor."""
        self._executor.shutdown()


async def run_leader(order: dict[str, Any], is_over: asyncio.Event) -> None:
    """Serve as a replica group of one until it is over."""
    from cluster.kvstore.open import open_store
    from cluster.model.checkpoint import inspect_checkpoint
    from cluster.replica.group import GroupLifecycle
    from cluster.replica.leader import Leader

    loop = asyncio.get_running_loop()

    def end(reason: str) -> None:
        logger.error("%s ends: %s", order["name"], reason)
        loop.call_soon_threadsafe(is_over.set)

    config = parse_config(order["config"])
    model = inspect_checkpoint(config.model.folder)
    replica = config.replica
    lifecycle = GroupLifecycle(
        1,
        start_timeout_s=replica.start_timeout_s,
        drain_timeout_s=replica.drain_timeout_s,
        clock=WallClock(),
    )
    lifecycle.worker_ready(0)
    store = open_store(config.store)
    leader = Leader(
        config,
        model=model,
        executor=_make_executor(config, order),
        lifecycle=lifecycle,
        store=store,
        replica_id=order["name"],
        node_id="bench",
        public_host=replica.host,
        on_end=end,
    )
    info = await leader.start()
    _report(order["name"], address=info.address, pid=info.pid)
    await is_over.wait()
    await leader.stop()
    await store.close()


def _make_executor(config: ClusterConfig, order: dict[str, Any]) -> Executor:
    from cluster.model.checkpoint import inspect_checkpoint
    from cluster.replica.build import load_whole, max_model_len_of
    from cluster.replica.executor import InProcessExecutor

    runner = load_whole(
        config,
        num_blocks=_NUM_BLOCKS,
        max_model_len=max_model_len_of(config, inspect_checkpoint(config.model.folder)),
        num_threads=1,
    )
    executor: Executor = SteadyExecutor(InProcessExecutor(runner), order["min_step_s"])
    if order["executor"]:
        wrap: Callable[[Executor], Executor] = pkgutil.resolve_name(order["executor"])
        executor = wrap(executor)
    return executor


async def run_gateway(order: dict[str, Any], is_over: asyncio.Event) -> None:
    """Serve the public API until it is over, then drain."""
    from cluster.gateway.grpc_server import GatewayServer
    from cluster.kvstore.open import open_store

    config = parse_config(order["config"])
    store = open_store(config.store)
    server = GatewayServer(config, store=store, gateway_id=order["name"])
    port = await server.start()
    lease = asyncio.create_task(_keep_gateway_lease(store, order["name"]))
    _report(order["name"], address=f"127.0.0.1:{port}", pid=os.getpid())
    await is_over.wait()
    lease.cancel()
    await server.stop(config.gateway.drain_timeout_s)
    await store.close()


async def _keep_gateway_lease(store: Store, gateway_id: str) -> None:
    from cluster.gateway.fleet import GATEWAY_LEASES

    while True:
        with contextlib.suppress(SluiceError):  # the next one may do
            await store.put_lease(GATEWAY_LEASES, gateway_id, b"", _GATEWAY_LEASE_TTL_S)
        await asyncio.sleep(_GATEWAY_LEASE_TTL_S / 4)


def _report(name: str, **facts: Any) -> None:
    os.write(_reports, f"{json.dumps({'name': name, **facts})}\n".encode())


async def _run_member(order: dict[str, Any], nursery: int) -> None:
    is_over = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, is_over.set)
    loop.add_reader(nursery, is_over.set)  # the nursery has ended
    await (run_leader if order["role"] == "leader" else run_gateway)(order, is_over)


def _fork(order: dict[str, Any], watch: int, hold: int) -> None:
    """Start a member; it never returns from here."""
    if os.fork():
        return
    status = 1
    try:
        os.close(hold)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        asyncio.run(_run_member(order, watch))
        status = 0
    except BaseException as error:
        traceback.print_exc()
        _report(order["name"], error=f"{type(error).__name__}: {error}")
    finally:
        os._exit(status)


def main() -> None:
    """Start a member for each line of standard input."""
    global _reports
    _reports = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no report
    logging.basicConfig(level=logging.ERROR)  # deaths, which are warned of, are the plan here
    for module in _PRELOAD:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a member
    watch, hold = os.pipe()
    _report("nursery")
    for line in sys.stdin:
        _fork(json.loads(line), watch, hold)
    os._exit(0)  # an interpreter with so many modules takes its time to end


if __name__ == "__main__":
    main()
