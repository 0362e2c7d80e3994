"""Replays a trace or a synthetic workload against a real cluster.

A workload's prompts are runs of token ids of no model. Here each run becomes random tokens of the
model's vocabulary, drawn by its id and the seed: prompts share a prefix exactly where the workload
says so, and of two others hardly a token is the same. Where a turn of a session repeats an answer,
it repeats what the cluster answered.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from cluster.bench.aims import NO_AIM, Aim
from cluster.bench.sender import PlannedRequest, Sender
from cluster.bench.statistics import RequestRecord
from cluster.config import EngineConfig
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.simulator.arrival import Arrival, Run
from cluster.simulator.workload import Workload
from cluster.types import NO_SLO, ServiceClass

Answers = Mapping[int, Sequence[int]]
"""What the cluster answered, by the token that stands for it in the workload."""


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """A workload, and how it is sent."""

    workload: Workload
    rate_scale: float = 1.0  # that the workload has been scaled by
    timeout_s: float = 600.0  # deadline of a request that has none of its own
    seed: int = 0  # of the tokens: another one finds nothing cached of an earlier run
    config: EngineConfig = field(default_factory=EngineConfig)  # has the objectives of the classes
    sends_standard: bool = False  # standard is a choice, not what the workload leaves open

    @property
    def num_requests(self) -> int:
        """Requests of the workload."""
        return len(self.workload.arrivals)

    def aim(self, arrival: Arrival) -> Aim:
        """Return what a request asks for: times of its own, else its class.

        The API takes one of the two, and a batch request with times would be an interactive one.
        """
        is_batch = arrival.service_class is ServiceClass.BATCH
        if arrival.slo != NO_SLO and not is_batch:
            return Aim.of_slo(arrival.slo)
        if arrival.service_class is ServiceClass.STANDARD and not self.sends_standard:
            return NO_AIM
        return Aim.of_class(arrival.service_class, self.config)

    def figures(self) -> dict[str, object]:
        """Return it as plain data, for JSON."""
        return {
            "workload": self.workload.name,
            "rate_scale": self.rate_scale,
            "num_requests": self.num_requests,
            "num_skipped": self.workload.num_skipped,
            "timeout_s": self.timeout_s,
            "seed": self.seed,
        }


def fitted_lengths(arrival: Arrival, max_model_len: int) -> tuple[int, int]:
    """Return the tokens of prompt and answer, clipped to a model's context.

    A prompt loses its end, never its prefix; an answer gets half of the context at the most.
    """
    num_output = min(arrival.num_output_tokens, max_model_len // 2)
    return min(arrival.num_prompt_tokens, max_model_len - num_output), num_output


def clipped(workload: Workload, max_model_len: int) -> dict[str, int]:
    """Return how much of a workload does not fit into a model's context, as plain data."""
    counts: dict[str, int] = defaultdict(int)
    for arrival in workload.arrivals:
        num_input, num_output = fitted_lengths(arrival, max_model_len)
        lost = {
            "prompt": arrival.num_prompt_tokens - num_input,
            "output": arrival.num_output_tokens - num_output,
        }
        counts["num_requests"] += any(lost.values())
        for name, num_tokens in lost.items():
            counts[f"num_{name}s"] += num_tokens > 0
            counts[f"num_{name}_tokens"] += num_tokens
    return dict(counts)


def prompt_of(
    runs: Sequence[Run], num_tokens: int, *, vocab_size: int, seed: int, answers: Answers
) -> list[int]:
    """Return the first `num_tokens` tokens of a prompt in a model's vocabulary."""
    prompt: list[int] = []
    for token, same in groupby(runs, key=lambda run: run[0]):
        num_wanted = min(sum(count for _, count in same), num_tokens - len(prompt))
        known = list(answers.get(token, ()))[:num_wanted]  # fewer where the answer was cut off
        # The same tokens however many of them are wanted: a shorter run is a prefix of a longer.
        rng = random.Random(f"{seed}/run/{token}")
        prompt += known + rng.choices(range(vocab_size), k=num_wanted - len(known))
        if len(prompt) >= num_tokens:
            break
    return prompt


class ReplayRun:
    """One replay against one server.

    Args:
        sender: To the server.
        model: That is asked for.
        plan: What is sent.
    """

    def __init__(self, sender: Sender, model: pb.Model, plan: ReplayPlan) -> None:
        self._sender = sender
        self._model = model
        self._plan = plan
        self._group = asyncio.TaskGroup()
        self._followers: dict[str, list[Arrival]] = defaultdict(list)
        self._repeated: set[int] = set()  # answers that later prompts have in them
        self._answers: dict[int, list[int]] = {}
        for arrival in plan.workload.arrivals:
            if arrival.follows:
                self._followers[arrival.follows].append(arrival)
                self._repeated.update(token for token, _ in arrival.runs)

    async def run(self) -> list[RequestRecord]:
        """Send every request when it is due, wait for all of them, and return their records."""
        self._sender.start()
        async with self._group:
            for arrival in self._plan.workload.arrivals:
                if not arrival.follows:
                    planned = self._planned(arrival)
                    await self._sleep_until(arrival.arrived_s)
                    self._group.create_task(self._send(arrival, planned, arrival.arrived_s))
        return self._sender.records

    async def _send(self, arrival: Arrival, planned: PlannedRequest, due_s: float) -> None:
        answer = await self._sender.send(planned, due_s)
        ended_s = self._sender.now_s()
        if arrival.answer_token in self._repeated:
            self._answers[arrival.answer_token] = answer
        for follower in self._followers.pop(arrival.request_id, ()):
            self._group.create_task(self._follow(follower, ended_s + follower.arrived_s))

    async def _follow(self, arrival: Arrival, due_s: float) -> None:
        planned = self._planned(arrival)
        await self._sleep_until(due_s)
        await self._send(arrival, planned, due_s)

    async def _sleep_until(self, due_s: float) -> None:
        await asyncio.sleep(max(0.0, due_s - self._sender.now_s()))

    def _planned(self, arrival: Arrival) -> PlannedRequest:
        plan, model = self._plan, self._model
        num_input, num_output = fitted_lengths(arrival, model.max_model_len)
        prompt = prompt_of(
            arrival.runs,
            num_input,
            vocab_size=model.vocab_size,
            seed=plan.seed,
            answers=self._answers,
        )
        message = pb.GenerateRequest(
            model=model.name,
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True),
        )
        aim = plan.aim(arrival)
        aim.write(message, arrival.session)
        timeout_s = plan.timeout_s if arrival.deadline_s is None else arrival.deadline_s
        return PlannedRequest(message, arrival.request_id, aim, timeout_s)
