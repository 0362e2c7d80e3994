"""A simulated replica group: the real engine on an executor that only knows how long steps take."""

from __future__ import annotations

import random
from dataclasses import replace

from cluster.clock import VirtualClock
from cluster.engine.engine import Engine
from cluster.engine.step_time import StepTimeModel
from cluster.errors import SluiceError
from cluster.kvstore.block_hash import router_key
from cluster.simulator.arrival import Arrival
from cluster.simulator.executor import EOS_TOKEN, SimulatedExecutor
from cluster.simulator.record import ReplicaRecord
from cluster.simulator.settings import SimulationSettings
from cluster.types import (
    SLO,
    EngineOutput,
    EngineRequest,
    ReplicaInfo,
    ReplicaLoad,
    SamplingParams,
    StepCost,
    StepShape,
)

MODEL = "simulated"
FINGERPRINT = "00" * 16

_Command = tuple[float, Arrival, int, SLO, float | None]  # when it came, what `submit` was given


class SimulatedReplica:
    """Takes commands between two steps, as a leader's engine loop does.

    Args:
        replica_id: Unique in the simulation.
        settings: Of the simulation.
        slowness: Factor on its steps.
        rng: Of the jitter of its steps.
        now_s: When it begins to serve.
    """

    def __init__(
        self,
        replica_id: str,
        settings: SimulationSettings,
        *,
        slowness: float,
        rng: random.Random,
        now_s: float,
    ) -> None:
        config = settings.config
        self.info = ReplicaInfo(
            replica_id,
            address="",
            model=MODEL,
            fingerprint=FINGERPRINT,
            tp=config.parallel.tp,
            pp=config.parallel.pp,
            block_size=config.cache.block_size,
            max_model_len=settings.max_model_len,
        )
        self.record = ReplicaRecord(replica_id, started_s=now_s)
        self.is_stepping = False
        self.is_draining = False
        self.is_dead = False
        self.load_due_s = now_s  # when the next report is due
        self._clock = VirtualClock(now_s)
        self._max_output_tokens = settings.max_output_tokens
        self._commands: list[_Command] = []
        self._seeds: dict[str, int] = {}
        self._executor = SimulatedExecutor(
            settings.cost.step,
            num_blocks=config.cache.num_blocks,
            clock=self._clock,
            overhead_s=settings.cost.overhead_s,
            jitter=settings.jitter,
            rng=rng,
        )
        self._executor.slowness = slowness
        step_time = StepTimeModel()
        step_time.restore(settings.cost.steps or synthetic_steps(settings.cost.step))
        self.engine = Engine(
            config.engine,
            executor=self._executor,
            block_size=config.cache.block_size,
            max_model_len=settings.max_model_len,
            fingerprint=bytes.fromhex(FINGERPRINT),
            eos_token_ids=frozenset({EOS_TOKEN}),
            vocab_size=2**32,
            prefix_caching=config.cache.prefix_caching,
            clock=self._clock,
            step_time=step_time,
        )

    @property
    def has_work(self) -> bool:
        """Whether a step is worth it."""
        return bool(self._commands) or self.engine.has_work

    @property
    def num_requests(self) -> int:
        """Requests that have not ended here."""
        return len(self._seeds)

    def submit(
        self, arrival: Arrival, seed: int, slo: SLO, deadline_s: float | None, now_s: float
    ) -> None:
        """Let a request wait for the present step to end."""
        self._commands.append((now_s, arrival, seed, slo, deadline_s))
        self._seeds[arrival.request_id] = seed
        self.record.num_requests += 1

    def step(self, now_s: float) -> tuple[float, list[EngineOutput]]:
        """Take the commands, run a step; return when it ends and what it brings then."""
        clock = self._clock
        clock.advance(max(0.0, now_s - clock.now()))
        commands, self._commands = self._commands, []
        refused = [output for command in commands if (output := self._apply(command)) is not None]
        outputs = refused + self.engine.step()
        for output in outputs:
            if output.finish_reason is not None or output.error is not None:
                self._executor.forget(self._seeds.pop(output.request_id))
        return clock.now(), outputs

    def block_events(self) -> tuple[list[int], list[int]]:
        """Return the router keys of blocks that came and went since the last call."""
        added, removed = self.engine.take_block_events()
        return [router_key(block) for block in added], [router_key(block) for block in removed]

    def load(self) -> ReplicaLoad:
        """Return what the leader would report."""
        load = self.engine.load()
        return replace(load, is_draining=True) if self.is_draining else load

    def set_slowness(self, factor: float) -> None:
        """Make its steps take so many times as long."""
        self._executor.slowness = factor

    def close(self, now_s: float | None) -> ReplicaRecord:
        """Return its record; `now_s` is when it ended, None: it ran to the end."""
        executor, record, load = self._executor, self.record, self.engine.load()
        record.ended_s = now_s
        record.busy_s = executor.busy_s
        record.num_steps = executor.num_steps
        record.num_prefill_tokens = executor.num_prefill_tokens
        record.num_output_tokens = load.num_generated_tokens
        record.num_prefix_query_tokens = load.num_prefix_query_tokens
        record.num_prefix_hit_tokens = load.num_prefix_hit_tokens
        record.num_preemptions = self.engine.num_preemptions
        return record

    def _apply(self, command: _Command) -> EngineOutput | None:
        sent_s, arrival, seed, slo, deadline_s = command
        waited_s = self._clock.now() - sent_s
        prompt = arrival.prompt()
        self._executor.expect(
            seed, arrival.answer_token, len(prompt) + arrival.num_output_tokens - 1
        )
        ttft_s = None if slo.ttft_s is None else max(1e-6, slo.ttft_s - waited_s)
        request = EngineRequest(
            arrival.request_id,
            prompt,
            SamplingParams(max_tokens=self._max_output_tokens, temperature=0.0, seed=seed),
            deadline_s=deadline_s,
            slo=SLO(ttft_s, slo.tpot_s),
            service_class=arrival.service_class,
            tenant=arrival.tenant,
            tenant_weight=arrival.tenant_weight,
        )
        try:
            self.engine.add(request)
        except SluiceError as error:
            return EngineOutput(arrival.request_id, error=f"{error.code}: {error}")
        return None


def synthetic_steps(cost: StepCost) -> list[tuple[float, ...]]:
    """Return steps as a leader would have measured them before: decodes, chunks, both."""
    steps: list[tuple[float, ...]] = []
    for num_decodes in (0, 1, 4, 16, 64):
        for chunk in (0, 64, 256, 512, 1024, 2048, 4096):
            shape = StepShape()
            for _ in range(num_decodes):
                shape = shape.with_decode(1024)
            if chunk:
                shape = shape.with_chunk(chunk, 1024)
            if shape.num_tokens:
                steps.append(
                    (
                        float(shape.num_tokens),
                        float(shape.num_sequences),
                        float(shape.context_tokens),
                        shape.prompt_work,
                        cost.seconds(shape),
                    )
                )
    return steps
