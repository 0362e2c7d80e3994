"""The scheduler, seen through the plans that an engine submits."""

from __future__ import annotations

import pytest
from engine_fakes import Bench

from cluster.config import EngineConfig
from cluster.errors import OverloadedError


def seq_ids(bench: Bench) -> list[list[int]]:
    return [[s.seq_id for s in plan.sequences] for plan in bench.executor.plans]


def test_scheduler_computes_long_prompts_in_chunks() -> None:
    bench = Bench(config=EngineConfig(max_num_batched_tokens=8))
    bench.add(prompt=range(20), max_tokens=2)
    bench.run()
    assert bench.plan_sizes() == [[8], [8], [4], [1]]
    bench.check_answers()


def test_scheduler_takes_decodes_first_then_begun_prompts_then_waiting() -> None:
    bench = Bench(config=EngineConfig(max_num_batched_tokens=8))
    bench.add("short", [1, 2], max_tokens=9)
    bench.step()
    bench.add("long", range(20), max_tokens=1)
    bench.add("next", range(50, 53), max_tokens=1)
    bench.run()
    assert bench.plan_sizes()[:4] == [[2], [1, 7], [1, 7], [1, 6, 1]]
    assert seq_ids(bench)[3] == [0, 1, 2]
    bench.check_answers()


def test_scheduler_admits_in_order_of_arrival() -> None:
    bench = Bench(config=EngineConfig(max_num_seqs=2))
    for name, max_tokens in (("a", 3), ("b", 1), ("c", 1), ("d", 1)):
        bench.add(name, max_tokens=max_tokens)
    bench.run()
    assert seq_ids(bench) == [[0, 1], [0, 2], [0, 3]]


def test_scheduler_starves_neither_decodes_nor_chunks_on_a_small_budget() -> None:
    bench = Bench(config=EngineConfig(max_num_seqs=8, max_num_batched_tokens=3))
    for i in range(6):
        bench.add(f"r{i}", [i] * (i + 1), max_tokens=8)
    bench.run()
    bench.check_answers()
    assert all(sum(sizes) <= 3 for sizes in bench.plan_sizes())
    for i in range(6):  # whoever has begun misses no step until it ends
        steps = [n for n, ids in enumerate(seq_ids(bench)) if i in ids]
        assert steps == list(range(steps[0], steps[-1] + 1))


def test_scheduler_shares_decodes_between_the_steps_in_flight() -> None:
    bench = Bench(max_in_flight=2)
    for i in range(5):
        bench.add(f"r{i}", [i], max_tokens=10)
    bench.run()
    bench.check_answers()
    middle = [sorted(ids) for ids in seq_ids(bench)[4:10]]
    assert {len(ids) for ids in middle} == {2, 3}
    pairs = zip(middle[::2], middle[1::2], strict=True)
    assert all(sorted(a + b) == [0, 1, 2, 3, 4] for a, b in pairs)


def test_scheduler_runs_max_num_seqs_per_step_in_flight() -> None:
    bench = Bench(max_in_flight=3, config=EngineConfig(max_num_seqs=2))
    for i in range(9):
        bench.add(f"r{i}", [i], max_tokens=10)
    bench.step()
    assert (bench.engine.load().num_running, bench.engine.load().num_waiting) == (6, 3)
    bench.run()
    assert max(len(ids) for ids in seq_ids(bench)) == 2
    bench.check_answers()


def test_scheduler_preempts_the_last_comer_and_loses_nothing() -> None:
    bench = Bench(num_blocks=6, block_size=2)
    for i in range(3):
        bench.add(f"r{i}", [10 * i, 10 * i + 1, 10 * i + 2], max_tokens=8)
    bench.step()
    bench.step()
    assert bench.engine.load().num_free_blocks == 0
    bench.step()
    load = bench.engine.load()
    assert (load.num_running, load.num_waiting) == (2, 1)
    assert bench.engine.num_preemptions == 1
    bench.run()
    bench.check_answers()
    bench.check_idle()
    # Its output so far was computed again as a part of the prompt, in one chunk.
    again = [s for p in bench.executor.plans for s in p.sequences if s.seq_id == 2][2:]
    assert again[0].num_computed_tokens + len(again[0].token_ids) == 5


def test_scheduler_preempted_sequence_is_counted_once_in_the_hit_rate() -> None:
    bench = Bench(num_blocks=6, block_size=2)
    for i in range(3):
        bench.add(f"r{i}", [10 * i, 10 * i + 1, 10 * i + 2], max_tokens=8)
    bench.run()
    load = bench.engine.load()
    assert bench.engine.num_preemptions > 0
    assert (load.num_prefix_query_tokens, load.num_prefix_hit_tokens) == (9, 0)
    assert load.num_generated_tokens == 24


def test_scheduler_does_not_preempt_what_is_in_flight() -> None:
    bench = Bench(num_blocks=5, block_size=2, max_in_flight=2)
    for i in range(3):
        bench.add(f"r{i}", [10 * i, 10 * i + 1], max_tokens=6)
    bench.run()  # the fake executor refuses plans that write to blocks of a step in flight
    assert bench.engine.num_preemptions > 0
    bench.check_answers()
    bench.check_idle()


def test_scheduler_does_not_begin_a_prompt_that_finds_no_room() -> None:
    bench = Bench(num_blocks=4, block_size=4, config=EngineConfig(max_num_batched_tokens=4))
    bench.add("a", range(12), max_tokens=3)
    bench.add("b", range(20, 28), max_tokens=2)
    bench.run()
    assert seq_ids(bench) == [[0]] * 5 + [[1]] * 3
    assert bench.engine.num_preemptions == 0
    bench.check_answers()


def test_scheduler_queue_is_bounded() -> None:
    bench = Bench(config=EngineConfig(max_num_waiting=2))
    bench.add("a")
    bench.add("b")
    with pytest.raises(OverloadedError, match="2 requests wait in this replica, limit=2"):
        bench.add("c")
    bench.step()
    bench.add("c")
    bench.run()
    bench.check_answers()


def test_scheduler_finds_the_longest_cached_prefix() -> None:
    bench = Bench()
    bench.add("first", range(10), max_tokens=1)
    bench.run()
    bench.add("same start", [*range(8), 50, 51, 52, 53], max_tokens=1)
    bench.add("other start", [60, *range(1, 10)], max_tokens=1)
    bench.run()
    assert [s.num_computed_tokens for s in bench.executor.plans[1].sequences] == [8, 0]
    assert bench.answers["same start"].end.num_cached_tokens == 8
    assert bench.answers["other start"].end.num_cached_tokens == 0
    load = bench.engine.load()
    assert (load.num_prefix_query_tokens, load.num_prefix_hit_tokens) == (32, 8)


def test_scheduler_computes_at_least_the_last_token_of_a_cached_prompt() -> None:
    bench = Bench()
    for name in ("first", "again"):
        bench.add(name, range(8), max_tokens=3)
        bench.run()
    assert bench.plan_sizes() == [[8], [1], [1], [4], [1], [1]]
    assert bench.answers["again"].end.num_cached_tokens == 4
    bench.check_answers()


def test_scheduler_finds_generated_tokens_too() -> None:
    bench = Bench()
    request = bench.add("first", range(6), max_tokens=7)
    bench.run()
    talk = [*request.prompt_token_ids, *bench.answers["first"].tokens, 1, 2, 3]
    bench.add("second", talk, max_tokens=1)
    bench.run()
    assert bench.answers["second"].end.num_cached_tokens == 12
    bench.check_answers()


def test_scheduler_keeps_one_copy_of_what_two_compute_at_once() -> None:
    bench = Bench(num_blocks=16)
    bench.add("a", range(16), max_tokens=3)
    bench.add("b", range(16), max_tokens=3)
    bench.step()
    assert bench.engine.load().num_free_blocks == 12
    bench.run()
    bench.check_answers()
    bench.check_idle()


def test_scheduler_caches_per_salt() -> None:
    bench = Bench()
    for name, salt in (("a", b"x"), ("b", b"y"), ("c", b"x")):
        bench.add(name, range(8), max_tokens=1, salt=salt)
        bench.run()
    assert [bench.answers[name].end.num_cached_tokens for name in "abc"] == [0, 0, 4]


def test_scheduler_without_prefix_caching_finds_nothing() -> None:
    bench = Bench(prefix_caching=False)
    for name in "ab":
        bench.add(name, range(8), max_tokens=2)
        bench.run()
    assert bench.answers["b"].end.num_cached_tokens == 0
    assert bench.engine.cached_blocks() == []
    bench.check_answers()
    bench.check_idle()
