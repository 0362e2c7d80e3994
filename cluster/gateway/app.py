"""The composition root: a configuration becomes a Serve application, and that a running cluster."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import logging
import os
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import ray
from prometheus_client import CollectorRegistry
from ray import serve
from ray.serve.exceptions import RayServeException

from cluster.autoscaler.actuator import environment, scaling_options
from cluster.config import ClusterConfig, StoreConfig, parse_config
from cluster.errors import ConfigError, SluiceError, UnavailableError
from cluster.gateway.fleet import GATEWAY_LEASES
from cluster.gateway.fleet_metrics import FleetCollector
from cluster.gateway.grpc_server import GatewayServer
from cluster.gateway.identity import Authenticator
from cluster.gateway.listen import check_port_free, check_tls_files
from cluster.gateway.loop_watch import LoopWatch
from cluster.gateway.metrics_server import MetricsServer
from cluster.kvstore.block_store import BlockStore
from cluster.kvstore.embedded_actor import delete_actor
from cluster.kvstore.open import open_block_store, open_store
from cluster.kvstore.store import Store
from cluster.metrics import Metrics
from cluster.model.checkpoint import check_layout, check_quantization, inspect_checkpoint
from cluster.model.footprint import check_fits
from cluster.model.quantization.check import check_kernels
from cluster.model.shm_operator import check_compiler
from cluster.replica.guardian_start import GuardianHandle
from cluster.replica.placement import check_devices, group_num_cpus
from cluster.replica.ray_actors import STOP_MARGIN_S, WILDCARD_HOSTS, group_deployment

logger = logging.getLogger(__name__)

APP_NAME = "sluice"
GATEWAY_NUM_CPUS = 0.1
LEASE_INTERVAL_S = 0.25  # how soon a starting cluster is seen to be ready


class Gateway:
    """The Serve deployment: one replica of it is one gateway."""

    async def __init__(self, config: dict[str, Any], groups: Any) -> None:  # type: ignore[misc] # Serve awaits it
        del groups  # Serve deploys them with the gateway; requests do not go through the handle
        self._config = parse_config(config)
        self._store = open_store(self._config.store)
        self._block_store = open_block_store(self._config.store)
        self._gateway_id = serve.get_replica_context().replica_id.unique_id
        registry = CollectorRegistry()
        self._server = GatewayServer(
            self._config,
            store=self._store,
            gateway_id=self._gateway_id,
            block_store=self._block_store,
            metrics=Metrics(registry),
        )
        port = await self._server.start()
        host = self._config.gateway.host
        self._metrics_server = MetricsServer(registry)
        if self._config.gateway.metrics_port:
            registry.register(FleetCollector(self._server.snapshots, lambda: self._store.state))
            await self._metrics_server.start(host, self._config.gateway.metrics_port)
        if host in WILDCARD_HOSTS:
            host = ray.util.get_node_ip_address()
        self._address = f"{host}:{port}"
        self._lease = asyncio.create_task(self._keep_lease())
        # One that stands still has an open port, and connections that nobody answers.
        self._guardian = GuardianHandle()
        self._guardian.arm(self._config.gateway.heartbeat_timeout_s)
        self._watch = LoopWatch(self._config.gateway.stuck_timeout_s)

    async def _keep_lease(self) -> None:
        ttl_s = self._config.replica.lease_ttl_s
        while True:
            lease = {
                "address": self._address,
                "num_replicas": self._server.num_replicas,
                "pid": os.getpid(),
            }
            try:
                await self._store.put_lease(
                    GATEWAY_LEASES, self._gateway_id, json.dumps(lease).encode(), ttl_s
                )
            except SluiceError as error:
                logger.debug("lease not renewed, tried again: %s", error)
            except Exception:  # without a lease nobody finds this gateway
                logger.exception("lease not renewed")
            await asyncio.sleep(LEASE_INTERVAL_S)

    def check_health(self) -> None:
        """Tell Serve whether this gateway serves."""
        self._server.check_health()

    async def __del__(self) -> None:
        """Let streams finish, then end: Serve calls this on scale-down, upgrade and shutdown."""
        self._lease.cancel()
        await asyncio.wait([self._lease])  # it might renew what is dropped
        with contextlib.suppress(SluiceError):  # before the drain: nobody new is sent here
            await self._store.drop_lease(GATEWAY_LEASES, self._gateway_id)
        await self._server.stop(self._config.gateway.drain_timeout_s)
        await self._metrics_server.stop()
        await self._store.close()
        if self._block_store is not None:
            await self._block_store.close()
        self._watch.close()
        await asyncio.to_thread(self._guardian.close)


def build(args: dict[str, Any]) -> serve.Application:
    """Return the application of a configuration given as plain data; Serve's import path.

    Raises:
        ConfigError: The configuration cannot work.
    """
    config = parse_config(args)
    groups = group_deployment(config, scaling_options(config), environment(config))
    actor_options: dict[str, Any] = {"num_cpus": GATEWAY_NUM_CPUS}
    if config.gateway.ray_resource:
        # one of the resource is one gateway; such nodes have no CPUs for anything else
        actor_options = {"num_cpus": 0, "resources": {config.gateway.ray_resource: 1}}
    return (
        serve.deployment(Gateway)
        .options(
            name="gateway",
            num_replicas=config.gateway.num_replicas,
            ray_actor_options=actor_options,
            graceful_shutdown_timeout_s=config.gateway.drain_timeout_s + 5.0,
            graceful_shutdown_wait_loop_s=0.1,
            health_check_period_s=2.0,
        )
        .bind(config.model_dump(), groups)
    )


def check(config: ClusterConfig, *, is_local: bool = True) -> None:
    """Find every mistake that can be known before a process is started.

    Args:
        config: To be deployed.
        is_local: Whether gateways run on this machine, so that port and files can be tried.

    Raises:
        ConfigError: Naming the knob, its value and what to do.
    """
    parallel = config.parallel
    info = inspect_checkpoint(config.model.folder)
    check_layout(info, parallel.tp, parallel.pp)
    check_quantization(info, config.model, parallel)
    if config.model.max_model_len > info.max_model_len:
        raise ConfigError(
            f"model.max_model_len={config.model.max_model_len}, the model's limit is "
            f"{info.max_model_len}: ask for less",
            field="model.max_model_len",
        )
    if parallel.tp > 1 and config.model.device == "cpu":
        check_compiler()
    check_devices(config)
    if config.gateway.port == 0 and config.gateway.num_replicas > 1:
        raise ConfigError(
            f"gateway.port=0 with gateway.num_replicas={config.gateway.num_replicas}: "
            "gateways share one port, name it",
            field="gateway.port",
        )
    if is_local:
        check_port_free(config.gateway)
        check_tls_files(config.gateway)
        Authenticator(config.auth)
        check_fits(info, config)
        check_kernels(info, config.model)
    check_store(config.store)


def check_store(config: StoreConfig) -> None:
    """Raise if a URL of the store cannot be used, or a Redis there does not answer now.

    Raises:
        ConfigError: Without the URL's password.
    """
    url, kv_url = config.resolved_url, config.resolved_kv_url
    if url != "embedded":
        asyncio.run(_ping(lambda: open_store(config), "store.url"))
    if kv_url not in ("off", "embedded", url):
        asyncio.run(_ping(lambda: open_block_store(config), "store.kv_url"))


async def _ping(open_it: Callable[[], Store | BlockStore | None], field: str) -> None:
    store = open_it()
    assert store is not None, f"{field} is off"
    try:
        await store.ping()
    except UnavailableError as error:
        raise ConfigError(
            f"{field}: the store does not answer ({error}): start it, or use embedded",
            field=field,
        ) from error
    finally:
        await store.close()


class ServingCluster:
    """A cluster that runs; leaving its context ends it."""

    def __init__(self, config: ClusterConfig, address: str, *, owns_ray: bool) -> None:
        self.config = config
        self.address = address  # host:port of a gateway
        self._owns_ray = owns_ray
        self._is_stopped = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End gateways, groups, the embedded store, and Ray if it was started here."""
        if self._is_stopped:
            return
        self._is_stopped = True
        _stop(self.config, owns_ray=self._owns_ray)


def start(
    config: ClusterConfig,
    *,
    ray_address: str | None = None,
    on_progress: Callable[[str], None] | None = None,
    timeout_s: float = 300.0,
) -> ServingCluster:
    """Deploy a cluster and return when every replica group takes requests.

    Args:
        config: What to deploy; `check` it first.
        ray_address: A Ray cluster to use; None starts one on this machine.
        on_progress: Told in a few words what goes on.
        timeout_s: For all of it.

    Raises:
        UnavailableError: It did not come up; nothing is left running.
    """
    tell = on_progress or (lambda message: None)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    deadline_s = time.monotonic() + timeout_s
    owns_ray = _connect_ray(config, ray_address, tell)
    try:
        tell("deploying gateway and replica groups")
        serve.start(proxy_location="Disabled")
        _run_until(
            deadline_s,
            lambda: serve.run(build(config.model_dump()), name=APP_NAME, route_prefix=None),
        )
        scaling = config.replica.autoscaling
        num_groups = scaling.min_replicas if scaling else config.replica.num_replicas
        tell(f"waiting for {num_groups} replica groups")
        address = asyncio.run(_find_gateway(config, num_groups, deadline_s))
    except BaseException:
        _stop(config, owns_ray=owns_ray)
        raise
    return ServingCluster(config, address, owns_ray=owns_ray)


def _connect_ray(
    config: ClusterConfig, ray_address: str | None, tell: Callable[[str], None]
) -> bool:
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if ray_address is not None:
        tell(f"connecting to Ray at {ray_address}")
        ray.init(address=ray_address, namespace=APP_NAME, **quiet)
        return False
    scaling = config.replica.autoscaling
    num_groups = scaling.max_replicas if scaling else config.replica.num_replicas
    needed = num_groups * group_num_cpus(config.parallel) + config.gateway.num_replicas + 1
    num_cpus = max(os.cpu_count() or 1, int(needed + 1))  # logical: places, not cores
    tell(f"starting Ray on this machine with {num_cpus} logical CPUs")
    ray.init(
        address="local", num_cpus=num_cpus, include_dashboard=False, namespace=APP_NAME, **quiet
    )
    return True


def _run_until(deadline_s: float, call: Callable[[], Any]) -> None:
    """Run a call that has no deadline of its own."""
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=1)
    try:
        pool.submit(call).result(timeout=max(0.0, deadline_s - time.monotonic()))
    except TimeoutError as error:
        raise UnavailableError("the cluster did not come up in time: see Ray's logs") from error
    except RuntimeError as error:  # Serve's, when a deployment failed
        raise UnavailableError(str(error)) from error
    finally:
        pool.shutdown(wait=False)


async def _find_gateway(config: ClusterConfig, num_groups: int, deadline_s: float) -> str:
    """Return the address of the first gateway that has connected to enough replica groups."""
    store = open_store(config.store)
    try:
        while time.monotonic() < deadline_s:
            with contextlib.suppress(UnavailableError):
                for value in (await store.list_leases(GATEWAY_LEASES)).values():
                    lease = json.loads(value)
                    if lease["num_replicas"] >= num_groups:
                        return str(lease["address"])
            await asyncio.sleep(0.1)
    finally:
        await store.close()
    raise UnavailableError(
        f"no gateway reached {num_groups} replica groups in time: see Ray's logs"
    )


def _stop(config: ClusterConfig, *, owns_ray: bool) -> None:
    if not ray.is_initialized():
        return
    try:
        _delete_app(config)
        if "embedded" in (config.store.resolved_url, config.store.resolved_kv_url):
            delete_actor(config.store.namespace)
    finally:
        if owns_ray:
            ray.shutdown()


def _delete_app(config: ClusterConfig) -> None:
    """End the application; returns when every replica has drained and ended, or is out of time."""
    drain_s = max(config.gateway.drain_timeout_s, config.replica.drain_timeout_s)
    deadline_s = time.monotonic() + drain_s + STOP_MARGIN_S + 10.0
    try:
        serve.delete(APP_NAME, _blocking=False)  # a blocking one gives up after a minute
        while APP_NAME in serve.status().applications and time.monotonic() < deadline_s:
            time.sleep(0.1)
    except RayServeException:  # Serve itself did not start
        logger.debug("nothing to delete", exc_info=True)
