"""An engine on a fake executor, small enough to follow by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from cluster.clock import VirtualClock
from cluster.config import EngineConfig, StoreConfig
from cluster.engine.engine import Engine
from cluster.types import (
    SLO,
    EngineOutput,
    EngineRequest,
    FinishReason,
    SamplingParams,
    ServiceClass,
)
from tests.fakes import (
    BLOCK_NBYTES,
    Choose,
    Content,
    FakeExecutor,
    FakeMover,
    expected_answer,
)

FINGERPRINT = b"model"


def make_request(
    request_id: str = "r",
    prompt: Iterable[int] = range(1, 6),
    *,
    max_tokens: int = 4,
    salt: bytes = b"",
    deadline_s: float | None = None,
    ttft_s: float | None = None,
    tpot_s: float | None = None,
    pins_prefix: bool = False,
    service_class: ServiceClass = ServiceClass.STANDARD,
    tenant: str = "",
    tenant_weight: float = 1.0,
    **sampling: object,
) -> EngineRequest:
    params = replace(SamplingParams(max_tokens=max_tokens), **sampling)
    return EngineRequest(
        request_id,
        tuple(prompt),
        params,
        salt,
        deadline_s,
        SLO(ttft_s, tpot_s),
        pins_prefix=pins_prefix,
        service_class=service_class,
        tenant=tenant,
        tenant_weight=tenant_weight,
    )


@dataclass
class Answer:
    """What a request has got so far; refuses outputs after the last one."""

    tokens: list[int] = field(default_factory=list)
    end: EngineOutput | None = None

    def take(self, output: EngineOutput) -> None:
        assert self.end is None, f"{output} after {self.end}"
        self.tokens += [token.token_id for token in output.tokens]
        if output.finish_reason is not None or output.error is not None:
            assert output.finish_reason is None or output.error is None
            self.end = output
        else:
            assert output.tokens, "an output that says nothing"

    @property
    def reason(self) -> FinishReason | None:
        return self.end.finish_reason if self.end else None


class Bench:
    """An engine, its executor and clock, and what every request got."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_in_flight: int = 1,
        max_model_len: int = 200,
        vocab_size: int = 1000,
        eos_token_ids: frozenset[int] = frozenset(),
        prefix_caching: bool = True,
        choose: Choose | None = None,
        config: EngineConfig | None = None,
        num_host_slots: int = 0,
        store: dict[bytes, Content] | None = None,
        store_config: StoreConfig | None = None,
    ) -> None:
        self.clock = VirtualClock()
        self.executor = FakeExecutor(
            num_blocks=num_blocks,
            block_size=block_size,
            vocab_size=vocab_size,
            max_in_flight=max_in_flight,
            choose=choose,
        )
        self.mover = None
        if store is not None:
            self.mover = FakeMover(self.executor, store, self.clock)
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.engine = Engine(
            config or EngineConfig(),
            executor=self.executor,
            block_size=block_size,
            max_model_len=max_model_len,
            fingerprint=FINGERPRINT,
            eos_token_ids=eos_token_ids,
            vocab_size=vocab_size,
            prefix_caching=prefix_caching,
            clock=self.clock,
            num_host_slots=num_host_slots,
            block_nbytes=BLOCK_NBYTES,
            mover=self.mover,
            store_config=store_config,
        )
        self.step_s = 0.0  # that passes while a step is computed
        self.executor.while_computing = lambda: self.clock.advance(self.step_s)
        self.requests: dict[str, EngineRequest] = {}
        self.answers: dict[str, Answer] = {}

    def add(self, request_id: str = "r", *args: object, **kwargs: object) -> EngineRequest:
        request = make_request(request_id, *args, **kwargs)
        self.engine.add(request)
        self.requests[request_id] = request
        self.answers[request_id] = Answer()
        return request

    def step(self) -> list[EngineOutput]:
        outputs = self.engine.step()
        ids = [output.request_id for output in outputs]
        assert len(ids) == len(set(ids)), f"two outputs for one request: {ids}"
        for output in outputs:
            self.answers[output.request_id].take(output)
        self.engine.check_invariants()
        return outputs

    def run(self, max_steps: int = 20_000) -> None:
        """Step until nothing is left."""
        for _ in range(max_steps):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError(f"still at work after {max_steps} steps: {self.engine.load()}")

    def expected(self, request_id: str) -> tuple[list[int], FinishReason]:
        return expected_answer(
            self.requests[request_id],
            choose=self.executor.choose,
            vocab_size=self.executor.vocab_size,
            max_model_len=self.max_model_len,
            eos_token_ids=self.eos_token_ids,
        )

    def check_answers(self) -> None:
        """Every request got what it would have got alone."""
        for request_id, answer in self.answers.items():
            assert (answer.tokens, answer.reason) == self.expected(request_id), request_id

    def check_idle(self) -> None:
        """No request, block or step is left over, and no move but those that never end."""
        if self.mover is not None and not self.mover.is_silent:
            for _ in range(1000):
                self.clock.advance(0.5)
                self.step()
                if not self.mover.is_at_work and not self.engine.has_work:
                    break
        load = self.engine.load()
        assert not self.engine.has_work
        assert (load.num_running, load.num_waiting, load.num_queued_prefill_tokens) == (0, 0, 0)
        assert load.num_free_blocks == load.num_blocks
        self.engine.check_invariants()

    def plan_sizes(self) -> list[list[int]]:
        """Tokens per sequence of every step so far."""
        return [[len(s.token_ids) for s in plan.sequences] for plan in self.executor.plans]
