"""What a rank of a tensor-parallel group holds in memory while it loads and computes."""

from __future__ import annotations

import multiprocessing
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from cluster.config import DEMO_MODEL_PATH, load_config
from cluster.model.random_models import write_random_model
from cluster.replica.channel import ChannelListener
from cluster.replica.worker import WorkerSpec, run_worker
from cluster.step import SampleSpec, SequenceStep, StepPlan, StepResult

pytestmark = [pytest.mark.integration, pytest.mark.timeout(280)]

TP = 2
NUM_BLOCKS = 64  # of 16 tokens: 3 MB per rank, small beside the weights
MARGIN = 1.3


def status_bytes(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(name)


def empty_worker(port: int, tp_rank: int, done: Connection) -> None:
    """Join a group like a worker, load nothing, stay until told."""
    from cluster.model.collective import init_tensor_parallel

    init_tensor_parallel(tp_rank, TP, port)
    done.send_bytes(b"ready")
    done.recv_bytes()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def empty_worker_bytes(context: multiprocessing.context.SpawnContext) -> int:
    port, processes, ends = free_port(), [], []
    for tp_rank in range(TP):
        ours, theirs = context.Pipe()
        process = context.Process(target=empty_worker, args=(port, tp_rank, theirs), daemon=True)
        process.start()
        processes.append(process)
        ends.append(ours)
    try:
        for end in ends:
            assert end.poll(120), "an empty worker did not start"
            end.recv_bytes()
        return max(status_bytes(process.pid or 0, "VmRSS") for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing: no tensor parallelism")
def test_rank_never_holds_the_whole_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    weight_bytes = write_random_model("llama-0.5b", folder, tokenizer_from=DEMO_MODEL_PATH)
    context = multiprocessing.get_context("spawn")
    limit_bytes = weight_bytes / TP * MARGIN + empty_worker_bytes(context)

    config = load_config(None, [f"model.path={folder}", f"parallel.tp={TP}"])
    listener = ChannelListener("127.0.0.1", TP)
    stage_port = free_port()
    processes = []
    for index in range(TP):
        spec = WorkerSpec(
            index=index,
            config=config.model_dump(),
            leader_address=listener.address,
            auth_key=listener.auth_key,
            stage_port=stage_port,
            pipeline_address=("127.0.0.1", 0),
            num_blocks=NUM_BLOCKS,
            max_model_len=1024,
            num_threads=1,
        )
        processes.append(context.Process(target=run_worker, args=(spec,), daemon=True))
        processes[-1].start()
    try:
        accepting = ThreadPoolExecutor(1).submit(
            listener.accept_all,
            timeout_s=240.0,
            send_timeout_s=5.0,
            on_ready=lambda index, facts: None,
        )
        channels = accepting.result(timeout=240)
        greedy = SampleSpec(0, 32, 0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, -1)
        plan = StepPlan(1, (SequenceStep(1, tuple(range(32)), 0, (3, 5), greedy),))
        for channel in channels:
            channel.send("plan", plan.encode())
        kind, result = channels[0].receive()
        assert kind == "result" and 1 in StepResult.decode(result).tokens
        for process in processes:
            peak_bytes = status_bytes(process.pid or 0, "VmHWM")
            assert peak_bytes <= limit_bytes, f"{peak_bytes=:,} {limit_bytes=:,}"
            assert peak_bytes >= weight_bytes / TP, "or nothing was loaded at all"
        for channel in channels:
            channel.close()  # a leader that is gone ends its workers
        deadline_s = time.monotonic() + 20
        for process in processes:
            process.join(max(0.0, deadline_s - time.monotonic()))
            assert process.exitcode == 0
    finally:
        listener.close()
        for process in processes:
            process.kill()
            process.join()
