from __future__ import annotations

import mmap
import multiprocessing
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from model_fakes import drive, greedy_spec, make_runner, prompts, run_pipeline, save_model, spec

from cluster.errors import ConfigError, UnavailableError
from cluster.model.collective import (
    BUFFER_BYTES,
    NoCollective,
    init_tensor_parallel,
    reserve_buffer,
)
from cluster.model.runner import ShardSpec
from cluster.model.shm_operator import check_compiler, load_operator, operator_folder
from cluster.step import StepPlan
from cluster.types import SampledToken

FAMILIES = ("llama", "phi", "gemma2")  # the last one is tied
NUM_TOKENS = 16
TIMEOUT_S = 240
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ is missing: no tensor parallelism"
)


def sampled_spec(position: int) -> Any:
    return spec(position=position, seed=5, temperature=0.7, top_k=20, top_p=0.95)


def run_rank(tp_rank: int, port: int, folders: list[str], tokens: Any, results: Any) -> None:
    """Drive one rank: rank 0 samples, the other one learns the tokens from it."""
    torch.set_num_threads(1)
    collective = init_tensor_parallel(tp_rank, 2, port)
    results.put(mapped_buffers(port))
    for folder in folders:
        shard = ShardSpec(tp_rank, 2, 0, 1)
        runner = make_runner(Path(folder), shard=shard, collective=collective)

        def step(plan: StepPlan, runner: Any = runner) -> dict[int, SampledToken]:
            own: dict[int, SampledToken] = runner.execute(plan, None)
            if tp_rank > 0:
                assert own == {}
                return dict(tokens.get(timeout=TIMEOUT_S))
            tokens.put(own)
            return own

        for make_spec in (greedy_spec, sampled_spec):
            output = drive(step, prompts(), NUM_TOKENS, make_spec=make_spec)
            if tp_rank == 0:
                results.put(output)


def mapped_buffers(port: int) -> list[int]:
    """Return the sizes of the ranks' shared memory as this process maps it, pages."""
    sizes = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if f"_{port}_" in line:
            begin, _, end = line.split()[0].partition("-")
            sizes.append((int(end, 16) - int(begin, 16)) // mmap.PAGESIZE)
    return sizes


@pytest.mark.integration
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    folders = [save_model(family, tmp_path / family) for family in FAMILIES]
    expected = []
    for folder in folders:
        step = run_pipeline([make_runner(folder)])
        for make_spec in (greedy_spec, sampled_spec):
            expected.append(drive(step, prompts(), NUM_TOKENS, make_spec=make_spec))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    tokens, results = context.Queue(), context.Queue()
    ranks = [
        context.Process(
            target=run_rank, args=(rank, port, [str(f) for f in folders], tokens, results)
        )
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    try:
        num_pages = -(-BUFFER_BYTES // mmap.PAGESIZE)  # what is reserved is what DeepSpeed maps
        for _ in ranks:
            assert results.get(timeout=TIMEOUT_S) == [num_pages, num_pages]
        assert [results.get(timeout=TIMEOUT_S) for _ in expected] == expected
        for rank in ranks:
            rank.join(TIMEOUT_S)
        assert [rank.exitcode for rank in ranks] == [0, 0]
        assert not list(Path("/dev/shm").glob(f"*_{port}_*"))
    finally:
        for rank in ranks:
            rank.kill()


def test_one_rank_needs_no_process_group() -> None:
    assert isinstance(init_tensor_parallel(0, 1, 0), NoCollective)
    assert not torch.distributed.is_initialized()


def test_shared_memory_that_is_too_small_is_told() -> None:
    path = Path("/dev/shm") / f"sluice-test-buffer-{os.getpid()}"
    room = os.statvfs("/dev/shm")
    too_much = room.f_frsize * room.f_blocks + mmap.PAGESIZE
    with pytest.raises(UnavailableError, match=f"no room for {too_much} bytes.*--shm-size"):
        reserve_buffer(path, too_much)
    assert not path.exists()


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"g\+\+ not found.*install g\+\+"):
        check_compiler()


@needs_compiler
@pytest.mark.integration
@pytest.mark.timeout(600)
def test_a_compilation_that_is_killed_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLUICE_CACHE_DIR", str(tmp_path))
    built = operator_folder() / "deepspeed_shm_comm"
    context = multiprocessing.get_context("spawn")
    first = context.Process(target=load_operator, kwargs={"timeout_s": TIMEOUT_S})
    first.start()
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not (built / "lock").exists():  # torch's: it compiles
            assert first.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        first.kill()
        first.join()
    assert (built / "lock").exists()
    assert not (built / "deepspeed_shm_comm.so").exists()
    second = context.Process(target=load_operator, kwargs={"timeout_s": TIMEOUT_S})
    second.start()
    try:
        second.join(TIMEOUT_S)
        assert second.exitcode == 0
        assert (built / "deepspeed_shm_comm.so").exists()
        assert not (built / "lock").exists()
    finally:
        second.kill()
