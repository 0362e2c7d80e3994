"""Two engines, random histories: every request gets what it would have got alone."""

from __future__ import annotations

import random
from collections import Counter

from engine_fakes import Bench

from cluster.config import EngineConfig, StoreConfig
from cluster.types import FinishReason
from tests.fakes import Content

NUM_HISTORIES = 80
COUNTED = ("num_host_hit_tokens", "num_store_hit_tokens", "num_stored_blocks", "num_fetched_blocks")


def make_bench(rng: random.Random, store: dict[bytes, Content] | None, block_size: int) -> Bench:
    bench = Bench(
        num_blocks=rng.choice([20, 24, 60]) * 4 // block_size,
        block_size=block_size,
        max_in_flight=rng.randint(1, 3),
        max_model_len=80,
        vocab_size=12,
        config=EngineConfig(
            max_num_seqs=rng.randint(2, 8), max_num_batched_tokens=rng.choice([5, 16, 64])
        ),
        num_host_slots=rng.choice([4, 16, 64]),
        store=store,
        store_config=StoreConfig(
            kv_write_after_uses=rng.randint(1, 2), kv_chunk_bytes=rng.choice([2**20, 2**23])
        ),
    )
    bench.executor.token_s = rng.choice([0.0, 1e-3, 1e-2])
    bench.step_s = rng.choice([0.0, 0.0, 0.05, 0.3])
    return bench


def happen(rng: random.Random, bench: Bench) -> None:
    """Let something happen to one engine or to the store."""
    what, mover = rng.random(), bench.mover
    if what < 0.4:
        stem, length = rng.randint(0, 2), rng.randint(0, 60)
        prompt = [(stem + i * i) % 12 for i in range(length)]
        prompt += [rng.randrange(12) for _ in range(rng.randint(1, 5))]
        bench.add(
            f"r{len(bench.requests)}",
            prompt,
            max_tokens=rng.randint(1, 12),
            pins_prefix=rng.random() < 0.1,
            salt=rng.choice([b"", b"tenant"]),
        )
    elif what < 0.9:
        for _ in range(rng.randint(1, 8)):
            bench.step()
            bench.clock.advance(rng.choice([0.0, 0.001, 0.01]))
    elif what < 0.96 and mover is not None:
        mover.move_s = rng.choice([0.0, 0.001, 0.01, 0.1])
        mover.error = rng.choice(["", "", "", "no answer"])
        mover.write_error = rng.choice(["", "", "", "read-only"])
        mover.is_silent = rng.random() < 0.1
        for block_hash in list(mover.store)[: rng.choice([0, 0, 10])]:
            del mover.store[block_hash]
    elif what < 0.97:
        bench.engine.flush_cache()
    elif live := [name for name, answer in bench.answers.items() if answer.end is None]:
        bench.engine.abort(rng.choice(live))


def test_engines_with_tiers_answer_as_if_alone() -> None:
    counts: Counter[str] = Counter()
    for seed in range(NUM_HISTORIES):
        rng = random.Random(seed)
        store: dict[bytes, Content] | None = {} if seed % 4 else None
        block_size = rng.choice([1, 2, 4])
        benches = [make_bench(rng, store, block_size) for _ in range(2)]
        for _ in range(rng.randint(20, 80)):
            happen(rng, rng.choice(benches))
        for bench in benches:
            bench.run()
            bench.check_idle()
            for request_id, answer in bench.answers.items():
                if answer.reason is not FinishReason.CANCELLED:
                    expected = bench.expected(request_id)
                    assert (answer.tokens, answer.reason) == expected, (seed, request_id)
            cache = bench.engine.load().cache
            counts.update({name: getattr(cache, name) for name in COUNTED})
    assert all(counts[name] > 100 for name in COUNTED), counts
