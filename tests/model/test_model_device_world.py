"""Workers in one world: stages reduce among themselves, neighbours pass activations.

Run on gloo and CPUs: groups, order and shapes are tested. NCCL, and GPUs at all, are not: that
takes two of them (test_two_gpus_reduce).
"""

from __future__ import annotations

import multiprocessing
import socket
from typing import Any

import pytest
import torch

from cluster.model.device_world import DeviceWorld
from cluster.replica.pipeline import DevicePipeline

TIMEOUT_S = 200
TP, PP = 2, 2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_worker(index: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    world = DeviceWorld(index, TP, PP, host="127.0.0.1", port=port, device="cpu", timeout_s=120)
    own = torch.full((3, 2), float(10**index))
    world.collective.all_reduce_(own)
    joined = world.collective.all_gather(torch.full((1, 2, 3), float(index)))
    pipeline = DevicePipeline(world, torch.device("cpu"))
    received = []
    for step, num_tokens in enumerate((4, 0, 1)):  # a step without sequences passes nothing
        if world.previous is not None:
            got = pipeline.receive(num_tokens, 5, torch.bfloat16)
            received.append((tuple(got.shape), sorted(set(got.flatten().tolist()))))
        if world.next is not None:
            pipeline.send(torch.full((num_tokens, 5), 10 * index + step, dtype=torch.bfloat16))
    pipeline.send(torch.empty(0, 5))  # waits for the transfer before
    results.put((index, own[0, 0].item(), joined.tolist(), received))


@pytest.mark.integration
def test_stages_reduce_apart_and_neighbours_pass_activations() -> None:
    context = multiprocessing.get_context("spawn")
    results, port = context.Queue(), free_port()
    workers = [context.Process(target=run_worker, args=(i, port, results)) for i in range(TP * PP)]
    for worker in workers:
        worker.start()
    try:
        got = sorted(results.get(timeout=TIMEOUT_S) for _ in workers)
    finally:
        for worker in workers:
            worker.join(20)
            worker.kill()
    assert [total for _, total, _, _ in got] == [11, 11, 1100, 1100]
    for index, _, joined, received in got:
        first = float(index - index % TP)
        assert joined == [[[first] * 3 + [first + 1] * 3] * 2]
        sender = 10.0 * (index - TP)
        expected = [((4, 5), [sender]), ((0, 5), []), ((1, 5), [sender + 2])]
        assert received == (expected if index >= TP else [])


def reduce_on_gpu(index: int, port: int, results: Any) -> None:
    torch.cuda.set_device(0)
    world = DeviceWorld(index, 2, 1, host="127.0.0.1", port=port, timeout_s=120)
    tensor = torch.full((4, 8), float(index + 1), device="cuda", dtype=torch.bfloat16)
    world.collective.all_reduce_(tensor)
    joined = world.collective.all_gather(torch.full((1, 1), float(index), device="cuda"))
    results.put((tensor.cpu().unique().tolist(), joined.cpu().tolist()))


@pytest.mark.gpu
@pytest.mark.integration
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_two_gpus_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("spawn")
    results, port = context.Queue(), free_port()
    workers = []
    for index in range(2):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", str(index))  # as Ray does
        workers.append(context.Process(target=reduce_on_gpu, args=(index, port, results)))
        workers[-1].start()
    try:
        assert [results.get(timeout=TIMEOUT_S) for _ in workers] == [([3.0], [[0.0, 1.0]])] * 2
    finally:
        for worker in workers:
            worker.join(20)
            worker.kill()
