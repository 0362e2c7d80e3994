"""Random histories: whatever happens, every request gets what it would have got alone."""

from __future__ import annotations

import random
from typing import Any

import hypothesis.strategies as st
import pytest
from engine_fakes import FINGERPRINT, Answer, Bench
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.config import EngineConfig, StoreConfig
from cluster.errors import InvalidArgumentError, OverloadedError
from cluster.kvstore.block_hash import block_hashes
from cluster.types import FinishReason, ServiceClass

VOCAB_SIZE = 12
REQUESTS = st.fixed_dictionaries(
    {
        # Few stems, so that prompts share prefixes; a few tokens of their own. Sizes are relative
        # to what the model and the pool can take, and sometimes beyond it.
        "stem": st.integers(0, 2),
        "stem_percent": st.integers(0, 80),
        "tail": st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=5),
        "output_percent": st.integers(0, 50),
        "min_tokens": st.sampled_from([0, 0, 3]),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.sampled_from([(), (5,), (5, 7)]),
        "salt": st.sampled_from([b"", b"", b"tenant"]),
        "deadline_s": st.sampled_from([None, None, 3.0, 10.0]),
        "ttft_s": st.sampled_from([None, None, 1e-3, 0.5, 5.0]),
        "tpot_s": st.sampled_from([None, None, 1e-3, 0.1, 10.0]),
        "service_class": st.sampled_from(ServiceClass),
        "tenant": st.sampled_from(["", "", "one", "other"]),
        "tenant_weight": st.sampled_from([1.0, 0.1, 30.0]),
        "pins_prefix": st.sampled_from([False, False, True]),
    }
)


class EngineMachine(RuleBasedStateMachine):
    """Adds, aborts, steps and the passing of time, on tiny pools."""

    @initialize(
        num_blocks=st.integers(4, 30),
        block_size=st.sampled_from([1, 2, 3, 4, 8, 16]),
        max_in_flight=st.integers(1, 3),
        max_model_len=st.sampled_from([12, 40, 100]),
        max_num_seqs=st.integers(1, 8),
        max_num_batched_tokens=st.sampled_from([1, 2, 5, 16, 64]),
        max_num_waiting=st.sampled_from([2, 100]),
        order=st.sampled_from(["slack", "slack", "fcfs"]),
        fair_burst_tokens=st.sampled_from([1, 50, 8192]),
        prefix_caching=st.sampled_from([True, True, False]),
        token_s=st.sampled_from([0.0, 0.0, 0.01]),  # measured, so that objectives have an effect
        num_host_slots=st.sampled_from([0, 1, 3, 8, 64]),
        has_store=st.booleans(),
        num_uses=st.integers(1, 3),
        requests=st.lists(REQUESTS, min_size=1, max_size=8),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_in_flight: int,
        max_model_len: int,
        prefix_caching: bool,
        token_s: float,
        num_host_slots: int,
        has_store: bool,
        num_uses: int,
        requests: list[dict[str, Any]],
        **config: Any,
    ) -> None:
        self.bench = Bench(
            num_blocks=num_blocks,
            block_size=block_size,
            max_in_flight=max_in_flight,
            max_model_len=max_model_len,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=frozenset({0}),
            prefix_caching=prefix_caching,
            config=EngineConfig(**config),
            num_host_slots=num_host_slots,
            store={} if has_store and num_host_slots else None,
            store_config=StoreConfig(kv_write_after_uses=num_uses, timeout_s=0.2),
        )
        self.bench.executor.token_s = token_s
        self.reach = num_host_slots == 0 or not prefix_caching
        self.block_size = block_size
        self.aborted: set[str] = set()
        self.index: set[bytes] = set()  # what a router knows from the events
        self.add(requests)

    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=8))
    def add(self, requests: list[dict[str, Any]]) -> None:
        for request in requests:
            self.add_one(**request)

    def add_one(
        self, stem: int, stem_percent: int, tail: list[int], output_percent: int, **kwargs: object
    ) -> None:
        capacity = self.bench.executor.num_blocks * self.block_size
        limit = min(capacity, self.bench.max_model_len, 100)
        prompt = [(stem + i * i) % VOCAB_SIZE for i in range(limit * stem_percent // 100)] + tail
        max_tokens = limit * output_percent // 100
        request_id = f"r{len(self.bench.requests)}"
        try:
            self.bench.add(request_id, prompt, max_tokens=max_tokens, **kwargs)
        except InvalidArgumentError:
            num_computed = min(len(prompt) + max_tokens, self.bench.max_model_len) - 1
            fits = len(prompt) < self.bench.max_model_len and num_computed <= capacity
            assert not prompt or max_tokens == 0 or not fits
        except OverloadedError:
            assert self.bench.engine.load().num_waiting >= 2

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.bench.step()

    def live(self) -> list[str]:
        return [name for name, answer in self.bench.answers.items() if answer.end is None]

    @precondition(lambda self: hasattr(self, "bench") and self.live())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(self.live()))
        self.bench.engine.abort(request_id)
        self.aborted.add(request_id)

    @rule(delta_s=st.sampled_from([0.5, 2.0, 8.0]))
    def wait(self, delta_s: float) -> None:
        self.bench.clock.advance(delta_s)

    @precondition(lambda self: hasattr(self, "bench") and self.bench.mover)
    @rule(
        error=st.sampled_from(["", "", "store: no answer"]),
        write_error=st.sampled_from(["", "", "store: read-only"]),
        is_silent=st.sampled_from([False, False, True]),
        move_s=st.sampled_from([0.0, 0.001, 0.1, 1.0]),
        num_lost=st.integers(0, 10),
    )
    def trouble_store(self, num_lost: int, **troubles: Any) -> None:
        mover = self.bench.mover
        assert mover is not None
        for name, value in troubles.items():
            setattr(mover, name, value)
        for block_hash in list(mover.store)[:num_lost]:
            del mover.store[block_hash]

    @rule()
    def flush(self) -> None:
        self.bench.engine.flush_cache()

    @precondition(lambda self: hasattr(self, "bench") and self.bench.mover)
    @rule()
    def preload(self) -> None:
        assert self.bench.mover is not None
        self.bench.engine.preload(list(self.bench.mover.store))

    @rule()
    def follow_events(self) -> None:
        added, removed = self.bench.engine.take_block_events()
        assert self.index.issuperset(removed) and self.index.isdisjoint(added)
        self.index = self.index.difference(removed).union(added)
        assert self.index == set(self.bench.engine.cached_blocks())

    @invariant()
    def is_sound(self) -> None:
        if hasattr(self, "bench"):
            self.bench.engine.check_invariants()

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.bench.run()
        self.bench.check_idle()
        for request_id, answer in self.bench.answers.items():
            self.check_answer(request_id, answer)
        self.follow_events()
        self.check_chains()

    def check_answer(self, request_id: str, answer: Answer) -> None:
        tokens, reason = self.bench.expected(request_id)
        assert answer.end is not None
        if answer.end.error is not None:
            assert answer.end.error.startswith("DEADLINE_EXCEEDED: ")
            assert self.bench.requests[request_id].deadline_s is not None
        elif answer.reason is FinishReason.CANCELLED:
            assert request_id in self.aborted
        else:
            assert (answer.tokens, answer.reason) == (tokens, reason)
        assert answer.tokens == tokens[: len(answer.tokens)]

    def check_chains(self) -> None:
        """Every cached block belongs to a request's chain; so does its predecessor on a device."""
        cached, reachable = set(self.bench.engine.cached_blocks()), set()
        for request_id, request in self.bench.requests.items():
            tokens = [*request.prompt_token_ids, *self.bench.answers[request_id].tokens]
            for block_hash in block_hashes(
                tokens, self.block_size, fingerprint=FINGERPRINT, salt=request.salt
            ):
                if block_hash in cached:
                    reachable.add(block_hash)
                elif self.reach:  # a host tier keeps what is used most, whatever comes before it
                    break
        assert reachable == cached


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@pytest.mark.parametrize("max_in_flight", [1, 3])
def test_engine_is_at_its_start_after_a_thousand_cancellations(max_in_flight: int) -> None:
    rng = random.Random(max_in_flight)
    bench = Bench(
        num_blocks=40,
        max_in_flight=max_in_flight,
        vocab_size=VOCAB_SIZE,
        config=EngineConfig(max_num_seqs=6, max_num_batched_tokens=16, max_num_waiting=4),
    )
    start = bench.engine.load()
    phases: dict[str, int] = {}
    steps_left: dict[str, int] = {}  # until it is cancelled
    while len(bench.requests) < 1000 or bench.engine.has_work:
        while len(bench.requests) < 1000 and bench.engine.load().num_waiting < 4:
            request_id = f"r{len(bench.requests)}"
            prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 40))]
            bench.add(request_id, prompt, max_tokens=100)
            steps_left[request_id] = rng.choice([0, 3, 10, 20, 40, 60])
        for request_id in [name for name, left in steps_left.items() if left == 0]:
            phase = phase_of(bench, request_id)
            phases[phase] = phases.get(phase, 0) + 1
            bench.engine.abort(request_id)
            del steps_left[request_id]
        steps_left = {name: left - 1 for name, left in steps_left.items()}
        bench.step()
    assert all(a.reason is FinishReason.CANCELLED for a in bench.answers.values())
    assert len(bench.answers) == 1000
    expected = {"waiting", "prefilling", "decoding", "preempted"}
    expected |= {"prefill in flight", "decode in flight"} if max_in_flight > 1 else set()
    assert phases.keys() == expected and min(phases.values()) >= 10, phases
    end = bench.engine.load()
    assert (end.num_running, end.num_waiting, end.num_queued_prefill_tokens) == (0, 0, 0)
    assert (end.num_free_blocks, end.num_blocks) == (start.num_free_blocks, start.num_blocks)
    bench.check_idle()


def phase_of(bench: Bench, request_id: str) -> str:
    sequence = bench.engine._sequences[request_id]
    if not sequence.block_table:
        return "waiting" if sequence.admitted_s is None else "preempted"
    if sequence.is_decoding:
        return "decode in flight" if sequence.in_flight else "decoding"
    return "prefill in flight" if sequence.in_flight else "prefilling"
