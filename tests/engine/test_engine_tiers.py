"""Host tier and store below an engine's KV cache: a store that engines share, and that fails."""

from __future__ import annotations

import pytest
from engine_fakes import FINGERPRINT, Bench

from cluster.config import EngineConfig, StoreConfig
from cluster.engine.mover import MoveKind
from cluster.kvstore.block_hash import block_hashes
from cluster.types import StoreState
from tests.fakes import BLOCK_NBYTES, Content

PROMPT = list(range(100, 141))  # ten full blocks of 4 and a token
NUM_BLOCKS = 10


def bench(store: dict[bytes, Content] | None, **kwargs: object) -> Bench:
    config = StoreConfig(kv_chunk_bytes=16 * 2**20)
    kwargs = {"num_host_slots": 40, "num_blocks": 24, "store_config": config} | kwargs
    return Bench(store=store, **kwargs)  # type: ignore[arg-type]


def ask(server: Bench, request_id: str, prompt: list[int] = PROMPT, **kwargs: object) -> int:
    """Serve one request; return how many tokens of its prompt were cached."""
    server.add(request_id, prompt, **kwargs)
    server.run()
    settle(server)
    server.check_answers()
    end = server.answers[request_id].end
    assert end is not None
    return end.num_cached_tokens


def settle(server: Bench) -> None:
    for _ in range(5):
        server.clock.advance(0.01)
        server.step()


def kinds(server: Bench) -> list[MoveKind]:
    assert server.mover is not None
    return [move.kind for move in server.mover.moves]


def test_evicted_prefix_comes_back_from_the_host_tier() -> None:
    server = bench(None)
    ask(server, "first")
    ask(server, "other", list(range(500, 580)))  # 20 of 24 blocks
    assert ask(server, "again") == 4 * NUM_BLOCKS
    cache = server.engine.load().cache
    assert cache.num_host_hit_tokens > 0 and cache.num_device_evictions > 0
    assert cache.store_state is StoreState.OFF
    restored = sum(len(plan.moves.restores) for plan in server.executor.plans)
    assert restored * 4 == cache.num_host_hit_tokens


def test_engine_without_host_tier_moves_nothing() -> None:
    server = bench(None, num_host_slots=0)
    ask(server, "first")
    ask(server, "other", list(range(500, 580)))
    assert ask(server, "again") < 4 * NUM_BLOCKS
    assert not any(plan.moves for plan in server.executor.plans)


def test_unique_prompts_never_reach_the_store() -> None:
    store: dict[bytes, Content] = {}
    server = bench(store)
    for index in range(20):
        ask(server, f"r{index}", [1000 * 0 + (index * 37 + i) % 997 for i in range(40)])
    assert not store and MoveKind.PUT not in kinds(server)


def test_prefix_used_twice_is_stored_and_serves_another_engine() -> None:
    store: dict[bytes, Content] = {}
    first = bench(store)
    ask(first, "a")
    assert not store
    ask(first, "b")
    assert len(store) == NUM_BLOCKS
    second = bench(store)
    assert ask(second, "c") == 4 * NUM_BLOCKS
    assert second.engine.load().cache.num_store_hit_tokens == 4 * NUM_BLOCKS
    assert second.answers["c"].tokens == first.answers["a"].tokens


def test_stored_blocks_are_not_written_again_within_a_minute() -> None:
    server = bench({})
    for index in range(5):
        ask(server, f"r{index}")
    assert kinds(server).count(MoveKind.PUT) == 1
    server.clock.advance(61.0)
    ask(server, "later")
    assert kinds(server).count(MoveKind.PUT) == 2


def test_registered_prefix_is_stored_at_its_first_use_and_pinned() -> None:
    store: dict[bytes, Content] = {}
    server = bench(store)
    ask(server, "r", pins_prefix=True, max_tokens=1)
    assert server.mover is not None
    assert len(store) == NUM_BLOCKS and server.mover.pinned == store.keys()


def test_other_salt_misses_in_every_tier() -> None:
    store: dict[bytes, Content] = {}
    server = bench(store, num_blocks=60)
    ask(server, "a", salt=b"one")
    ask(server, "b", salt=b"one")
    assert len(store) == NUM_BLOCKS
    assert ask(server, "other", salt=b"two") == 0
    assert ask(server, "none") == 0
    assert ask(bench(store), "other", salt=b"two") == 0
    assert ask(bench(store), "same", salt=b"one") == 4 * NUM_BLOCKS


def filled_store() -> dict[bytes, Content]:
    store: dict[bytes, Content] = {}
    ask(bench(store), "r", pins_prefix=True)
    assert len(store) == NUM_BLOCKS
    return store


def test_silent_store_costs_a_bounded_wait_then_nothing() -> None:
    server = bench(filled_store(), store_config=StoreConfig(timeout_s=0.5))
    assert server.mover is not None
    server.mover.is_silent = True
    began_s = server.clock.now()
    server.add("r", PROMPT)
    server.run()
    server.check_answers()
    assert server.clock.now() - began_s <= 0.5
    cache = server.engine.load().cache
    assert cache.num_late == 1 and cache.num_store_hit_tokens == 0


def test_failing_store_is_left_alone_and_comes_back_by_itself() -> None:
    server = bench(filled_store(), num_blocks=100)
    assert server.mover is not None
    server.mover.error = "no answer"
    for index in range(3):
        ask(server, f"r{index}", [index, *PROMPT])
    assert server.engine.load().cache.store_state is StoreState.OFF
    num_moves = len(server.mover.moves)
    server.add("while_off", [7, *PROMPT])
    server.step()
    assert len(server.mover.moves) == num_moves, "a request asked a store that is off"
    server.run()
    server.check_answers()
    server.mover.error = ""
    for _ in range(300):  # 3 s without a request
        server.clock.advance(0.01)
        server.step()
    assert server.engine.load().cache.store_state is StoreState.EXACT
    assert ask(server, "after") == 4 * NUM_BLOCKS


def test_store_that_refuses_writes_is_degraded_and_read() -> None:
    store = filled_store()
    server = bench(store, num_blocks=100)
    assert server.mover is not None
    server.mover.write_error = "read-only"
    num_stored = len(store)
    for index in range(4):
        ask(server, f"r{index}", [index, *range(200, 240)], pins_prefix=True)
    assert server.engine.load().cache.store_state is StoreState.DEGRADED
    assert len(store) == num_stored
    assert ask(server, "read") == 4 * NUM_BLOCKS
    server.mover.write_error = ""
    for _ in range(400):
        server.clock.advance(0.01)
        server.step()
    assert server.engine.load().cache.store_state is StoreState.EXACT
    assert len(store) > num_stored, "what could not be written is written later"


def test_blocks_lost_between_search_and_fetch_are_computed() -> None:
    store = filled_store()
    server = bench(store)
    assert server.mover is not None
    server.add("r", PROMPT)
    server.clock.advance(0.01)
    server.engine._move_blocks(0.0)  # the search has ended, the fetch is on its way
    assert kinds(server) == [MoveKind.FIND, MoveKind.GET]
    for block_hash in list(store)[5:]:
        del store[block_hash]
    server.run()
    server.check_answers()
    end = server.answers["r"].end
    assert end is not None and end.num_cached_tokens == 4 * 5


def test_running_streams_go_on_while_another_waits_for_the_store() -> None:
    server = bench(filled_store(), store_config=StoreConfig(timeout_s=10.0))
    assert server.mover is not None
    server.add("stream", [1, 2, 3], max_tokens=20)
    server.step()
    server.mover.is_silent = True
    server.add("waits", PROMPT)
    for _ in range(10):
        server.step()
    assert len(server.answers["stream"].tokens) == 11
    assert not server.answers["waits"].tokens


def test_copies_beside_a_decode_keep_to_their_share_of_a_step() -> None:
    server = bench(None, num_blocks=60, num_host_slots=200)
    server.executor.token_s = 0.1  # 3 % of 0.1 s at 4 GB/s are 11 blocks of 1 MiB
    ask(server, "warm")
    server.add("stream", [1, 2, 3], max_tokens=60)
    for _ in range(2):
        server.step()
    num_plans = len(server.executor.plans)
    for index in range(4):
        server.add(f"r{index}", list(range(200 * index, 200 * index + 120)), max_tokens=1)
        for _ in range(5):
            server.step()
    copies = [
        len(plan.moves.offloads) + len(plan.moves.restores)
        for plan in server.executor.plans[num_plans:]
    ]
    assert 0 < max(copies) <= 13, copies
    server.run()
    server.check_answers()


def test_slow_store_is_not_waited_for() -> None:
    store = filled_store()
    server = bench(store)
    assert server.mover is not None
    server.executor.token_s = 1e-5  # the whole prompt takes 0.4 ms, one block 2 ms
    ask(server, "measured", list(range(700, 780)), max_tokens=9)
    server.mover.moves.clear()
    assert ask(server, "r") == 0
    assert MoveKind.GET not in kinds(server)


def test_fetch_and_computation_take_one_end_each() -> None:
    store = filled_store()
    config = EngineConfig(max_num_batched_tokens=8)
    server = bench(store, config=config)
    assert server.mover is not None
    server.executor.token_s = 0.5e-3  # 8 tokens, two blocks, in 4 ms: as long as their bytes take
    ask(server, "measured", list(range(700, 780)), max_tokens=9)
    server.mover.moves.clear()
    server.mover.move_s = 0.0
    num_cached = ask(server, "r")
    (get,) = [move for move in server.mover.moves if move.kind is MoveKind.GET]
    assert 0 < len(get.hashes) < NUM_BLOCKS and num_cached == 4 * len(get.hashes)
    assert get.hashes[-1] == list(store)[-1], "the end is fetched, the beginning computed"


def test_preload_brings_blocks_before_anybody_asks() -> None:
    store = filled_store()
    server = bench(store)
    server.engine.preload(list(store))
    assert server.engine.num_preloading == NUM_BLOCKS
    settle(server)
    assert (server.engine.num_preloading, server.engine.num_preloaded) == (0, NUM_BLOCKS)
    assert server.engine.cached_blocks() == list(store)
    store.clear()
    assert ask(server, "r") == 4 * NUM_BLOCKS


def test_flush_forgets_both_tiers_and_tells_the_router() -> None:
    server = bench({})
    ask(server, "a")
    ask(server, "b")
    cached = server.engine.cached_blocks()
    server.engine.take_block_events()
    assert server.engine.flush_cache() >= len(cached) > 0
    added, removed = server.engine.take_block_events()
    assert not added and sorted(removed) == sorted(cached)
    assert server.engine.cached_blocks() == []


def test_writes_beyond_the_bound_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.engine.store_writer.MAX_WANTED_BLOCKS", 4)
    server = bench({})
    assert server.mover is not None
    server.mover.is_silent = True
    ask(server, "r", pins_prefix=True)
    server.add("s", list(range(300, 380)), pins_prefix=True)
    server.run()
    assert server.engine.load().cache.num_rejected > 0


def test_computation_stops_where_the_fetched_blocks_begin() -> None:
    server = bench(filled_store(), config=EngineConfig(max_num_batched_tokens=9))
    assert server.mover is not None
    server.executor.token_s = 0.5e-3
    ask(server, "measured", list(range(700, 780)), max_tokens=9)
    server.mover.moves.clear()
    server.mover.move_s = 0.0
    num_cached = ask(server, "r")  # a step has room for two blocks and a quarter of the third
    (get,) = [move for move in server.mover.moves if move.kind is MoveKind.GET]
    assert 0 < len(get.hashes) < NUM_BLOCKS and num_cached == 4 * len(get.hashes)


def test_long_steps_of_others_do_not_keep_a_prompt_from_the_store() -> None:
    server = bench(filled_store(), num_blocks=60)
    server.step_s = 0.2  # every answer of the store has come long before it is looked at
    server.add("stream", [1, 2, 3], max_tokens=40)
    for _ in range(3):
        server.step()
    assert ask(server, "r") == 4 * NUM_BLOCKS


def test_prompts_that_miss_the_same_blocks_fetch_them_once() -> None:
    server = bench(filled_store(), num_blocks=200)
    assert server.mover is not None
    for index in range(8):
        server.add(f"r{index}", [*PROMPT, index])
    server.run()
    settle(server)
    server.check_answers()
    cache = server.engine.load().cache
    assert cache.num_fetched_blocks == NUM_BLOCKS
    assert all(a.end and a.end.num_cached_tokens == 4 * NUM_BLOCKS for a in server.answers.values())


def test_aborted_request_fetches_nothing() -> None:
    server = bench(filled_store())
    server.add("r", PROMPT)
    server.engine.abort("r")
    for _ in range(3):
        settle(server)
    assert kinds(server) == [MoveKind.FIND]


def test_writes_recover_after_the_host_tier_was_flushed_meanwhile() -> None:
    store: dict[bytes, Content] = {}
    server = bench(store, num_blocks=100)
    assert server.mover is not None
    server.mover.write_error = "read-only"
    for index in range(4):
        ask(server, f"r{index}", [index, *range(200, 240)], pins_prefix=True)
    assert server.engine.load().cache.store_state is StoreState.DEGRADED
    server.engine.flush_cache()
    server.mover.write_error = ""
    for index in range(4):
        server.clock.advance(3.0)
        ask(server, f"later{index}", [index, *range(300, 340)], pins_prefix=True)
    assert server.engine.load().cache.store_state is StoreState.EXACT and store


def test_emptied_store_is_filled_again_by_the_first_that_misses() -> None:
    store: dict[bytes, Content] = {}
    server = bench(store)
    ask(server, "a")
    ask(server, "b")
    assert len(store) == NUM_BLOCKS
    store.clear()
    server.engine._host.clear()
    server.engine._cache.flush()
    ask(server, "misses")
    assert len(store) == NUM_BLOCKS


def test_host_tier_gives_up_the_end_of_a_chain_first() -> None:
    server = bench(None, num_host_slots=30, num_blocks=24)
    chain = block_hashes(PROMPT, 4, fingerprint=FINGERPRINT)
    ask(server, "a")
    seen: set[int] = set()
    for index in range(12):
        ask(server, f"other{index}", list(range(200 + 40 * index, 229 + 40 * index)))
        kept = [block_hash in server.engine._host for block_hash in chain]
        assert index < 3 or kept == sorted(kept, reverse=True), kept
        seen.add(sum(kept))
    assert seen & set(range(1, NUM_BLOCKS)), "it went as a whole, which shows nothing"


def test_large_block_comes_back_beside_a_stream_that_waits_for_blocks() -> None:
    # The last to come needs a block and may preempt nobody; the prompt before it waits for blocks
    # that are larger than what a step beside streams may copy.
    server = bench(None, num_blocks=14, num_host_slots=64)
    ask(server, "warm")
    ask(server, "evicts", list(range(500, 550)))
    server.add("decodes", [1, 2, 3], max_tokens=3)
    server.step()
    server.add("prompt", PROMPT)
    server.add("last", [7, 8, 9], max_tokens=30)
    server.run(max_steps=500)
    server.check_answers()


def test_restores_keep_within_the_objective_of_streams() -> None:
    server = bench(None, num_blocks=48, num_host_slots=90)
    server.executor.token_s = 0.001
    ask(server, "warm", max_tokens=1)
    ask(server, "evicts", list(range(500, 690)), max_tokens=1)
    server.add("stream", [1, 2, 3], max_tokens=60, tpot_s=0.0035)
    for _ in range(4):
        server.step()
    num_plans = len(server.executor.plans)
    server.add("again", PROMPT, max_tokens=1)
    server.run()
    server.check_answers()
    restores = [len(plan.moves.restores) for plan in server.executor.plans[num_plans:]]
    assert sum(restores) > 5 and max(restores) <= 9, restores


def test_silent_mover_is_noticed_without_an_answer() -> None:
    server = bench(filled_store(), num_blocks=100)
    assert server.mover is not None
    server.mover.is_silent = True
    server.add("r", PROMPT)
    server.run()
    for _ in range(30):
        server.clock.advance(0.1)
        server.step()
    assert server.engine.load().cache.store_state is not StoreState.EXACT
    server.mover.is_silent = False
    for _ in range(40):
        server.clock.advance(0.1)
        server.step()
    assert server.engine.load().cache.store_state is StoreState.EXACT


def test_long_prompt_waits_longer_for_its_blocks() -> None:
    def wait_s(token_s: float) -> float:
        server = bench(filled_store(), store_config=StoreConfig(timeout_s=10.0))
        assert server.mover is not None
        server.executor.token_s = token_s
        for length in (20, 40, 80):
            ask(server, f"measured{length}", list(range(700, 700 + length)), max_tokens=1)
        server.mover.is_silent = True
        began_s = server.clock.now()
        server.add("r", PROMPT)
        server.run()
        return server.clock.now() - began_s

    assert wait_s(1e-3) == pytest.approx(0.02, abs=0.01)
    assert wait_s(0.1) == pytest.approx(0.1 * 40 * 0.1, rel=0.4)


def test_fetched_blocks_keep_their_places_across_the_pieces_of_a_fetch() -> None:
    pieces_of_two = StoreConfig(kv_chunk_bytes=2 * BLOCK_NBYTES)
    server = bench(filled_store(), num_host_slots=NUM_BLOCKS, store_config=pieces_of_two)
    assert ask(server, "r") == 4 * NUM_BLOCKS
    order, chain = server.engine._host._order, block_hashes(PROMPT, 4, fingerprint=FINGERPRINT)
    values = [order.value(block_hash) for block_hash in chain]
    assert values == sorted(values, reverse=True) and len(set(values)) == NUM_BLOCKS, values
