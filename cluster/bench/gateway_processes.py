"""The processes of `sluice bench gateway`: ``python -m cluster.bench.gateway_processes ROLE``.

    leader                    the fake engine behind the real internal service
    gateway LEADER_ADDRESS    the real gateway, with a store in its own process

Each prints one line of JSON with its address. The leader then takes commands, one line of JSON
each: ``{"step_s": 0.05}`` sets the pace, after the answer, a line with the times at which it sent
the tokens since the last change. A process ends when its standard input is closed, so it cannot
outlive the benchmark.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from cluster.bench.fake_leader import FakeLeader, Pace, start_fake_leader
from cluster.clock import WallClock
from cluster.config import ClusterConfig, parse_config
from cluster.types import ReplicaInfo

_LEASE_TTL_S = 24 * 3600.0  # longer than any benchmark
_STOP_GRACE_S = 1.0


async def run_leader() -> None:
    """Serve tokens from nothing until standard input ends."""
    pace = Pace()
    server, address = await start_fake_leader(FakeLeader(pace))
    _say({"address": address})
    commands = await _stdin()
    while line := await commands.readline():
        _say({"sent_s": {seed: list(times) for seed, times in pace.sent_s.items()}})
        pace.set(json.loads(line)["step_s"])
    await server.stop(_STOP_GRACE_S)


async def run_gateway(leader_address: str) -> None:
    """Serve the public API before one leader until standard input ends."""
    from cluster.gateway.grpc_server import GatewayServer
    from cluster.kvstore.embedded import EmbeddedStore
    from cluster.kvstore.registry import Registry

    # The defaults are what is measured, on a free port.
    config = parse_config({"gateway": {"port": 0}})
    store = EmbeddedStore(config.store, WallClock())
    await Registry(store).register(_describe(config, leader_address), _LEASE_TTL_S)
    server = GatewayServer(config, store=store, gateway_id="bench")
    port = await server.start()
    _say({"address": f"127.0.0.1:{port}"})
    await (await _stdin()).read()
    await server.stop(_STOP_GRACE_S)


def _describe(config: ClusterConfig, leader_address: str) -> ReplicaInfo:
    from cluster.model.checkpoint import fingerprint, inspect_checkpoint

    model = config.model
    return ReplicaInfo(
        replica_id="fake-leader",
        address=leader_address,
        model=model.served_name,
        fingerprint=fingerprint(model.folder, model.dtype, 1).hex(),
        tp=1,
        pp=1,
        block_size=config.cache.block_size,
        max_model_len=inspect_checkpoint(model.folder).max_model_len,
    )


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


async def _stdin() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


def main() -> None:
    """Run the role that the command line names."""
    role, *arguments = sys.argv[1:]
    asyncio.run(run_leader() if role == "leader" else run_gateway(*arguments))


if __name__ == "__main__":
    main()
