"""Every layout of a replica group answers like transformers, through gRPC and real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.client import AsyncClient, Client, Completion, TextDelta
from cluster.clock import WallClock
from cluster.config import DEMO_MODEL_PATH, ClusterConfig, load_config
from cluster.engine.engine import Engine
from cluster.errors import SluiceError
from cluster.gateway.app import ServingCluster, check, start
from cluster.model.checkpoint import inspect_checkpoint
from cluster.model.collective import NoCollective
from cluster.model.runner import ModelRunner, ShardSpec
from cluster.replica.executor import InProcessExecutor
from cluster.types import EngineRequest, SamplingParams

pytestmark = [pytest.mark.integration, pytest.mark.timeout(420)]

NUM_TOKENS = 64
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
SEEDED = SamplingParams(
    max_tokens=32, temperature=0.9, top_p=0.95, top_k=50, seed=1234, ignore_eos=True
)
EVERYTHING = SamplingParams(
    max_tokens=48,
    min_tokens=12,
    temperature=1.1,
    top_k=80,
    top_p=0.97,
    min_p=0.005,
    repetition_penalty=1.1,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    seed=99,
    stop=("self", "\n\n\n"),
    stop_token_ids=(12, 14),
    num_logprobs=3,
)


def configuration(tp: int, pp: int, num_replicas: int = 1) -> ClusterConfig:
    return load_config(
        None,
        [
            "model.dtype=float32",
            f"parallel.tp={tp}",
            f"parallel.pp={pp}",
            "parallel.num_cpus_per_worker=0.1",
            f"replica.num_replicas={num_replicas}",
            "gateway.port=0",
            "cache.num_blocks=80",  # all prompts together need more: some are preempted
            "engine.max_num_batched_tokens=128",  # prompts are computed in chunks
            f"store.namespace=test{os.getpid()}",
        ],
    )


def prompts() -> list[list[int]]:
    """Sixteen prompts of mixed lengths, some longer than a step's token budget."""
    lengths = [1, 2, 3, 5, 8, 13, 15, 16, 17, 31, 32, 33, 64, 100, 150, 300]
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 4096, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="session")
def greedy_reference() -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL_PATH, dtype=torch.float32)
    torch.set_num_threads(1)  # so small a model loses by more
    answers = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NUM_TOKENS,
                min_new_tokens=NUM_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@pytest.fixture(scope="module", params=["1x1", "2x1", "1x2", "2x2"])
def cluster(request: pytest.FixtureRequest) -> Iterator[ServingCluster]:
    tp, pp = map(int, request.param.split("x"))
    config = configuration(tp, pp)
    check(config)
    with start(config) as running:
        yield running


async def answers(
    address: str, sampling: SamplingParams, only: list[int] | None = None
) -> dict[int, list[int]]:
    """Ask all prompts (or some) at once; return their tokens."""
    async with AsyncClient(address) as client:

        async def ask(index: int) -> tuple[int, list[int]]:
            done = await client.generate(
                token_ids=prompts()[index], sampling=sampling, timeout_s=120
            )
            return index, list(done.token_ids)

        wanted = only if only is not None else list(range(len(prompts())))
        return dict(await asyncio.gather(*(ask(index) for index in wanted)))


def test_layout_is_identical_to_transformers(
    cluster: ServingCluster, greedy_reference: list[list[int]]
) -> None:
    got = asyncio.run(answers(cluster.address, GREEDY))
    for index, expected in enumerate(greedy_reference):
        assert got[index] == expected, f"prompt {index} of {len(prompts()[index])} tokens"


@pytest.fixture(scope="session")
def seeded_reference() -> dict[int, list[int]]:
    """The same engine on the whole model in this process: no Ray, no gRPC, one prompt at a time."""
    config = configuration(1, 1)
    info = inspect_checkpoint(DEMO_MODEL_PATH)
    runner = ModelRunner(
        config.model,
        config.cache,
        ShardSpec(tp_rank=0, tp=1, pp_rank=0, pp=1),
        NoCollective(),
        max_model_len=info.max_model_len,
        num_blocks=200,
    )
    engine = Engine(
        config.engine,
        executor=InProcessExecutor(runner),
        block_size=config.cache.block_size,
        max_model_len=info.max_model_len,
        fingerprint=b"reference",
        eos_token_ids=frozenset(info.eos_token_ids),
        vocab_size=info.vocab_size,
        prefix_caching=False,
        clock=WallClock(),
    )
    answers: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts()):
        engine.add(EngineRequest(str(index), tuple(prompt), SEEDED))
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        answers[index] = [token.token_id for output in outputs for token in output.tokens]
    return answers


def test_layout_samples_the_same_in_any_batch(
    cluster: ServingCluster, seeded_reference: dict[int, list[int]]
) -> None:
    together = asyncio.run(answers(cluster.address, SEEDED))
    assert together == seeded_reference, "another layout or batch, another answer"
    alone = asyncio.run(answers(cluster.address, SEEDED, only=[3, 9]))
    assert alone == {index: seeded_reference[index] for index in (3, 9)}


COMBINED: dict[str, Completion] = {}  # of the first layout that ran; the others have to agree


def test_layout_combines_every_sampling_parameter(cluster: ServingCluster) -> None:
    with Client(cluster.address) as client:
        done = client.generate(token_ids=prompts()[8], sampling=EVERYTHING, timeout_s=120)
        plain = client.generate(
            token_ids=prompts()[8],
            sampling=replace(EVERYTHING, stop=(), stop_token_ids=(), ignore_eos=True),
            timeout_s=120,
        )
    assert 12 <= len(done.token_ids) == done.usage.completion_tokens <= 48
    assert len(plain.token_ids) == 48
    assert all(len(position.top) == 3 for position in done.logprobs)
    assert len(done.logprobs) == len(done.token_ids)
    for position in done.logprobs:
        assert position.top[0].logprob >= position.logprob - 1e-6
    assert "self" not in done.text[-4:]
    first = COMBINED.setdefault("first", done)
    assert done.token_ids == first.token_ids and done.text == first.text
    assert done.finish_reason == first.finish_reason


def wait_ready(client: Client, other_than: str, timeout_s: float = 90) -> Any:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        ready = [r for r in client.status().replicas if r.state == "ready"]
        if ready and ready[0].replica_id != other_than:
            return ready[0]
        time.sleep(0.1)
    raise AssertionError("no new group came up")


def processes(cluster: ServingCluster, leader: psutil.Process) -> list[psutil.Process]:
    """Return the workers of the cluster's one group."""
    family = psutil.Process(leader.ppid()).children()
    workers = [p for p in family if any("WorkerActor" in part for part in p.cmdline())]
    world_size = cluster.config.parallel.world_size
    assert len(workers) == (0 if world_size == 1 else world_size)
    return workers


@pytest.mark.parametrize("victim", ["leader", "worker"])
def test_layout_is_rebuilt_when_a_process_of_it_is_killed(
    cluster: ServingCluster, greedy_reference: list[list[int]], victim: str
) -> None:
    layout = (cluster.config.parallel.tp, cluster.config.parallel.pp)
    if (victim == "worker") == (layout == (1, 1)) or (victim == "leader" and sum(layout) == 3):
        pytest.skip("1x1 has no workers; a leader with workers is killed in 2x2")
    with Client(cluster.address) as client:
        before = client.status().replicas[0]
        leader = psutil.Process(before.leader_pid)
        workers = processes(cluster, leader)
        long = SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True)
        stream = client.stream(token_ids=prompts()[9], sampling=long, timeout_s=200)
        tokens: list[int] = []
        for event in stream:  # the group is in the middle of it
            tokens += event.token_ids if isinstance(event, TextDelta) else ()
            if tokens:
                break
        os.kill((leader if victim == "leader" else workers[-1]).pid, signal.SIGKILL)
        for process in (leader, *workers):  # the whole group ends
            process.wait(timeout=10)
        after = wait_ready(client, other_than=before.replica_id)
        assert after.leader_pid != before.leader_pid
        for event in stream:  # it has waited for the next group
            tokens += event.token_ids if isinstance(event, TextDelta) else ()
        assert len(tokens) == 900
        done = client.generate(token_ids=prompts()[5], sampling=GREEDY, timeout_s=60)
        assert list(done.token_ids) == greedy_reference[5]


def test_layout_leaves_no_shared_memory_behind(cluster: ServingCluster) -> None:
    with Client(cluster.address) as client:
        client.generate(token_ids=[1, 2, 3], sampling=GREEDY, timeout_s=60)
    left = list(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"))
    assert not left, "segments are unlinked as soon as every rank has mapped them"


def test_errors_name_what_is_wrong_and_the_cluster_goes_on(cluster: ServingCluster) -> None:
    with Client(cluster.address) as client:
        with pytest.raises(SluiceError) as caught:
            client.generate(token_ids=[999_999], sampling=GREEDY, timeout_s=10)
        assert caught.value.code == "INVALID_ARGUMENT"
        assert client.generate(token_ids=[1], sampling=GREEDY, timeout_s=60).token_ids
