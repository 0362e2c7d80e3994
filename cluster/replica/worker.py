"""One rank of a replica group: loads its shard, then computes plan after plan."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from cluster.config import ClusterConfig, ParallelConfig, parse_config
from cluster.errors import UnavailableError
from cluster.model.collective import Collective, NoCollective, buffer_name, init_tensor_parallel
from cluster.model.cuda_device import open_device
from cluster.model.device_world import DeviceWorld
from cluster.model.footprint import check_gpu_fits
from cluster.model.runner import ModelRunner, ShardSpec
from cluster.replica.build import NO_TIER, WorkerTier
from cluster.replica.channel import Channel, connect
from cluster.replica.guardian_start import GuardianHandle
from cluster.replica.heartbeat import Heartbeat
from cluster.replica.host_memory import HostMemory
from cluster.replica.mover_start import MoverHandle, start_mover
from cluster.replica.pipeline import DevicePipeline, Neighbours, Pipeline
from cluster.replica.placement import ranks_of
from cluster.replica.processes import ProcessId
from cluster.step import StepPlan, StepResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerSpec:
    """Everything that a worker has to know, in plain data."""

    index: int  # 0 ... tp * pp - 1
    config: dict[str, Any]  # ClusterConfig as plain data
    leader_address: tuple[str, int]
    auth_key: bytes
    stage_port: int  # of this worker's tensor-parallel group, on its first rank's host
    pipeline_address: tuple[str, int]  # of the group of all workers
    num_blocks: int
    max_model_len: int  # tokens
    num_threads: int
    tier: WorkerTier = NO_TIER
    beat_address: tuple[str, int] | None = None  # of the leader's ear for beats; None has none
    beat_key: bytes = b""  # of that listener


def run_worker(spec: WorkerSpec) -> None:
    """Work until the leader says stop or is gone.

    Raises:
        SluiceError: The shard cannot be loaded or the group cannot be joined; the leader was told.
    """
    config = parse_config(spec.config)
    channel = connect(
        spec.leader_address, spec.auth_key, send_timeout_s=config.engine.step_timeout_s
    )
    with _watched(spec, config, channel) as (guardian, heartbeat):
        channel.send("hello", spec.index)
        try:
            runner, pipeline, mover = _start(spec, config, guardian)
        except Exception as error:
            channel.send("failed", spec.index, f"{type(error).__name__}: {error}")
            raise
        guardian.arm(config.replica.heartbeat_timeout_s)
        facts = {"num_blocks": runner.num_blocks, "process": astuple(ProcessId.of(os.getpid()))}
        channel.send("ready", spec.index, facts)
        if spec.beat_address is not None:
            heartbeat.begin(spec.index, spec.beat_address, spec.beat_key)
        try:
            _serve(channel, runner, pipeline, is_reporter=_is_reporter(spec.index, config.parallel))
        except UnavailableError:
            logger.info("worker %d: the leader is gone", spec.index)
        except Exception as error:
            channel.send("error", f"{type(error).__name__}: {error}")
            raise
        finally:
            heartbeat.close()
            if mover is not None:
                mover.close()


@contextmanager
def _watched(
    spec: WorkerSpec, config: ClusterConfig, channel: Channel
) -> Iterator[tuple[GuardianHandle, Heartbeat]]:
    """Have this process end when it hangs or its leader is gone, and leave nothing behind."""
    guardian, heartbeat = GuardianHandle(), Heartbeat(channel)
    _, tp_rank = ranks_of(spec.index, config.parallel.tp)
    if config.parallel.tp > 1 and config.model.device == "cpu":
        guardian.add_name(buffer_name(tp_rank, spec.stage_port))
    try:
        yield guardian, heartbeat
    finally:
        heartbeat.close()
        channel.close()
        guardian.close()


def _start(
    spec: WorkerSpec, config: ClusterConfig, guardian: GuardianHandle
) -> tuple[ModelRunner, Neighbours | None, MoverHandle | None]:
    memory = _host_memory(spec, config)
    runner, pipeline = _join(spec, memory.slots if memory else None)
    mover: MoverHandle | None = None
    if memory is not None and spec.tier.mover is not None:
        mover = start_mover(spec.tier.mover, memory)
    if mover is not None and mover.pid is not None:
        guardian.add_child(ProcessId.of(mover.pid))
    return runner, pipeline, mover


def _is_reporter(index: int, parallel: ParallelConfig) -> bool:
    return ranks_of(index, parallel.tp) == (parallel.pp - 1, 0)


def _host_memory(spec: WorkerSpec, config: ClusterConfig) -> HostMemory | None:
    tier = spec.tier
    if not tier.num_slots:
        return None
    on_gpu = config.model.device == "cuda"
    open_device(config.model.device)  # page-locking wants CUDA initialised, on the right device
    return HostMemory(tier.num_slots, tier.block_nbytes, page_locked=on_gpu)


def _join(spec: WorkerSpec, slots: Tensor | None) -> tuple[ModelRunner, Neighbours | None]:
    config = parse_config(spec.config)
    parallel = config.parallel
    torch.set_num_threads(spec.num_threads)
    if config.model.device == "cuda":
        return _join_gpus(spec, config, slots)
    _, tp_rank = ranks_of(spec.index, parallel.tp)
    collective: Collective = NoCollective()
    if parallel.tp > 1:
        collective = init_tensor_parallel(tp_rank, parallel.tp, spec.stage_port)
    runner = _load(spec, config, collective, slots)
    if parallel.pp == 1:
        return runner, None
    host, port = spec.pipeline_address
    pipeline = Pipeline(
        host=host,
        port=port,
        index=spec.index,
        tp=parallel.tp,
        pp=parallel.pp,
        timeout_s=_transfer_timeout_s(config),
    )
    return runner, pipeline


def _join_gpus(
    spec: WorkerSpec, config: ClusterConfig, slots: Tensor | None
) -> tuple[ModelRunner, Neighbours | None]:
    device = open_device(config.model.device)  # before NCCL, which binds to the current one
    host, port = spec.pipeline_address
    world = DeviceWorld(
        spec.index,
        config.parallel.tp,
        config.parallel.pp,
        host=host,
        port=port,
        timeout_s=_transfer_timeout_s(config),
    )
    runner = _load(spec, config, world.collective, slots)
    return runner, DevicePipeline(world, device) if config.parallel.pp > 1 else None


def _load(
    spec: WorkerSpec, config: ClusterConfig, collective: Collective, slots: Tensor | None
) -> ModelRunner:
    parallel = config.parallel
    pp_rank, tp_rank = ranks_of(spec.index, parallel.tp)
    check_gpu_fits(config, num_blocks=spec.num_blocks)
    return ModelRunner(
        config.model,
        config.cache,
        ShardSpec(tp_rank=tp_rank, tp=parallel.tp, pp_rank=pp_rank, pp=parallel.pp),
        collective,
        max_model_len=spec.max_model_len,
        num_blocks=spec.num_blocks,
        max_num_seqs=config.engine.max_num_seqs,
        slots=slots,
    )


def _transfer_timeout_s(config: ClusterConfig) -> float:
    return max(config.engine.step_timeout_s, config.replica.start_timeout_s)


def _serve(
    channel: Channel, runner: ModelRunner, pipeline: Neighbours | None, *, is_reporter: bool
) -> None:
    while True:
        kind, *values = channel.receive()
        if kind == "stop":
            return
        assert kind == "plan", kind
        plan = StepPlan.decode(values[0])
        hidden_TD = None
        if not runner.is_first:
            assert pipeline is not None
            hidden_TD = pipeline.receive(plan.num_tokens, runner.hidden_size, runner.dtype)
        output = runner.execute(plan, hidden_TD)
        if not runner.is_last:
            assert pipeline is not None and isinstance(output, torch.Tensor)
            pipeline.send(output)
        if is_reporter:
            assert isinstance(output, dict), "the last stage ends in tokens"
            channel.send("result", StepResult(plan.step_id, output).encode())
        elif plan.moves:
            channel.send("moved", plan.step_id)
