from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.router import prefix_index
from cluster.router.prefix_index import PrefixIndex

_REPLICAS = "abcd"
# Some share a shard, some do not; the largest router key is one of them.
_KEYS = (1, 2, 3, 65, 66, 129, 2**40, 2**64 - 1)


def _index(max_bytes: int = 2**20, /, **blocks: Sequence[int]) -> PrefixIndex:
    index = PrefixIndex(max_bytes)
    for replica_id, keys in blocks.items():
        index.replace(replica_id, keys)
    return index


def _matched(index: PrefixIndex, keys: Sequence[int], replica_ids: str = _REPLICAS) -> list[int]:
    """Return how many leading blocks each replica holds, by the one walk over the prompt."""
    lengths = index.match(keys)
    assert len(lengths) == index.num_slots
    slots = [index.slot_of(replica_id) for replica_id in replica_ids]
    assert all(length == 0 for slot, length in enumerate(lengths) if slot not in slots)
    return [0 if slot < 0 else int(lengths[slot]) for slot in slots]


def _expected(held: dict[str, set[int]], keys: Sequence[int]) -> list[int]:
    lengths = []
    for replica_id in _REPLICAS:
        missing = [i for i, key in enumerate(keys) if key not in held.get(replica_id, ())]
        lengths.append(missing[0] if missing else len(keys) if replica_id in held else 0)
    return lengths


def test_match_ends_at_the_first_missing_block_of_each_replica() -> None:
    index = _index(a=[1, 2], b=[2, 3], c=[1, 2, 3, 4])
    assert _matched(index, [1, 2, 3, 4]) == [2, 0, 4, 0]
    assert _matched(index, [2, 3]) == [1, 2, 2, 0]
    assert _matched(index, [1, 2]) == [2, 0, 2, 0]
    assert _matched(index, []) == [0, 0, 0, 0]


def test_match_believes_a_replica_to_hold_what_is_before_a_block_that_it_holds() -> None:
    index = _index(a=[1, 2, 4], b=[2, 3])
    assert _matched(index, [1, 2, 3, 4]) == [4, 0, 0, 0]
    assert _matched(index, [1, 2, 3]) == [2, 0, 0, 0]


def test_match_of_an_empty_index_is_empty() -> None:
    assert len(PrefixIndex().match([1, 2])) == 0


@pytest.mark.parametrize("num_lengths", [2, 7, 300])
@pytest.mark.parametrize("num_replicas", [1, 8, 9, 64, 65, 200])
def test_match_finds_every_slot(num_replicas: int, num_lengths: int) -> None:
    index = PrefixIndex()
    expected = [(place + 1) % num_lengths for place in range(num_replicas)]
    for place, length in enumerate(expected):
        index.replace(str(place), range(100, 100 + length))
    lengths = index.match(range(100, 400))
    assert [lengths[index.slot_of(str(place))] for place in range(num_replicas)] == expected


def test_longest_prefix_is_that_of_one_replica() -> None:
    index = _index(a=[1, 2], b=[2, 3])
    assert index.longest_prefix("a", [1, 2, 3, 4]) == 2
    assert index.longest_prefix("b", [2, 3, 4]) == 2
    assert index.longest_prefix("unknown", [1]) == 0
    assert index.slot_of("unknown") == -1


def test_delta_changes_one_replica_and_removes_before_it_adds() -> None:
    index = _index(a=[1, 2], b=[1, 2])
    index.apply("a", added=[3], removed=[2])
    assert _matched(index, [1, 3], "ab") == [2, 1]
    assert _matched(index, [1, 2], "ab") == [1, 2]
    index.apply("a", added=[2], removed=[2])
    assert _matched(index, [1, 2], "ab") == [2, 2]


def test_delta_of_what_is_known_already_changes_nothing() -> None:
    index = _index(a=[1, 2, 2])
    bytes_before = index.num_bytes
    index.apply("a", added=[1, 1, 2], removed=[7, 7])
    assert (index.num_blocks("a"), index.num_bytes) == (2, bytes_before)
    index.check_invariants()


def test_snapshot_replaces_what_was_known() -> None:
    index = _index(a=[1, 2], b=[1])
    index.replace("a", [7])
    assert (index.num_blocks("a"), index.num_blocks("b")) == (1, 1)
    assert _matched(index, [1], "ab") == [0, 1]
    assert _matched(index, [7], "ab") == [1, 0]


def test_drop_forgets_and_gives_the_memory_back() -> None:
    index = _index(a=range(1000), b=[3])
    bytes_before = index.num_bytes
    index.drop("a")
    index.drop("a")
    assert (index.num_blocks("a"), index.slot_of("a"), index.num_keys) == (0, -1, 1)
    assert index.num_bytes < bytes_before / 3
    index.check_invariants()


def test_dropped_replica_is_unknown_though_its_blocks_are_not_swept_yet() -> None:
    held = range(10 * prefix_index._SWEPT_KEYS)
    index = _index(2**26, a=held, b=held)
    slot = index.slot_of("a")
    index.drop("a")
    assert index.num_keys == len(held)
    assert index.match([1, 2])[slot] == 0
    index.replace("c", [1])
    assert index.slot_of("c") != slot, "its bit is set in masks still"
    assert _matched(index, [1, 2], "abc") == [0, 2, 1]
    for _ in range(11):
        index.apply("b", added=(), removed=())
    index.check_invariants()
    index.replace("d", [2])
    assert index.slot_of("d") == slot
    assert _matched(index, [1, 2], "bcd") == [2, 1, 0]
    assert _matched(index, [2], "bcd") == [1, 0, 1]


def test_sweep_looks_at_a_bounded_number_of_keys() -> None:
    index = _index(2**26, a=range(4 * prefix_index._SWEPT_KEYS))
    numbers = []
    for _ in range(5):
        before = index.num_keys
        index.drop("a")  # the first forgets the replica, each sweeps
        numbers.append(before - index.num_keys)
    assert numbers == [*[prefix_index._SWEPT_KEYS] * 4, 0]


_some_keys = st.lists(st.sampled_from(_KEYS), max_size=5)
_events = st.lists(
    st.tuples(
        st.sampled_from(["replace", "apply", "apply", "drop"]),
        st.sampled_from(_REPLICAS),
        _some_keys,
        _some_keys,
    ),
    max_size=25,
)


def _run(
    index: PrefixIndex,
    events: list[tuple[str, str, list[int], list[int]]],
    after_each: Callable[[dict[str, set[int]]], None],
) -> None:
    """Let index and plain sets take the same events."""
    held: dict[str, set[int]] = {}
    for name, replica_id, added, removed in events:
        if name == "replace":
            index.replace(replica_id, added)
            held[replica_id] = set(added)
        elif name == "drop":
            index.drop(replica_id)
            held.pop(replica_id, None)
        elif replica_id in held:
            index.apply(replica_id, added=added, removed=removed)
            held[replica_id] = (held[replica_id] - set(removed)) | set(added)
        index.check_invariants()
        after_each(held)


@settings(deadline=None)
@given(_events, st.lists(_some_keys, min_size=1, max_size=3), st.integers(1, 4))
def test_index_agrees_with_plain_sets(
    events: list[tuple[str, str, list[int], list[int]]],
    prompts: list[list[int]],
    num_swept: int,
) -> None:
    index = PrefixIndex()

    def agrees(held: dict[str, set[int]]) -> None:
        for prompt in prompts:
            matched, expected = _matched(index, prompt), _expected(held, prompt)
            for replica_id, length, least in zip(_REPLICAS, matched, expected, strict=True):
                beyond = held.get(replica_id, set()) & set(prompt[least:])
                assert length == least or (length > least and beyond), (replica_id, prompt)
        counts = [index.num_blocks(replica_id) for replica_id in _REPLICAS]
        assert counts == [len(held.get(replica_id, ())) for replica_id in _REPLICAS]

    with pytest.MonkeyPatch.context() as patch:  # slots are reused amid sweeps
        patch.setattr(prefix_index, "_SWEPT_KEYS", num_swept)
        _run(index, events, agrees)
    assert index.num_dropped == 0
    assert index.num_slots <= 2 * len(events)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_budget_holds_and_what_is_indexed_is_true(seed: int, num_swept: int) -> None:
    rng = random.Random(seed)

    def keys() -> list[int]:
        return [rng.randrange(1500) for _ in range(rng.randrange(600))]

    kinds = ["replace", "apply", "apply", "drop"]
    events = [(rng.choice(kinds), rng.choice(_REPLICAS), keys(), keys()) for _ in range(12)]
    index = PrefixIndex(2**16)

    def is_true(held: dict[str, set[int]]) -> None:
        for replica_id, blocks in held.items():
            slot = index.slot_of(replica_id)
            known = [key for key in range(1500) if index.match([key])[slot]]
            assert blocks.issuperset(known)
            assert len(known) == index.num_blocks(replica_id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_index, "_SWEPT_KEYS", 100 * num_swept)
        _run(index, events, is_true)


def test_blocks_beyond_the_budget_are_counted_and_the_first_ones_kept() -> None:
    chain = [random.Random(7).getrandbits(64) + offset for offset in range(5000)]
    index = _index(2**16, a=chain)
    num_kept = index.num_blocks("a")
    assert 0.4 * 2**16 < index.num_bytes <= 2**16
    assert num_kept + index.num_dropped == len(chain)
    assert index.longest_prefix("a", chain) > 0.9 * num_kept
    index.apply("a", added=(), removed=chain)
    index.apply("a", added=chain[:100], removed=())
    assert index.longest_prefix("a", chain) == 100, "there is room again"


def test_block_whose_replicas_cannot_be_told_apart_is_forgotten() -> None:
    rng = random.Random(3)
    index = _index(2**16, a=range(400), b=range(400), c=range(400))
    for replica_id in map(str, range(200)):  # as many different sets as the budget can hold
        index.replace(replica_id, [key for key in range(400) if rng.random() < 0.5])
        index.check_invariants()
    assert index.num_dropped > 0
    num_dropped = index.num_dropped
    for key in range(400):
        index.apply("a", added=(), removed=[key])
        assert index.match([key])[index.slot_of("a")] == 0
        index.check_invariants()
    assert index.num_blocks("a") == 0
    assert index.num_dropped > num_dropped


def test_equal_sets_are_kept_once() -> None:
    index = _index(2**26)
    for replica_id in map(str, range(300)):
        index.replace(replica_id, range(2000))
    # A mask of 300 bits for each of 2000 keys alone would take 160 kB.
    assert index.num_bytes < 2000 * 48 + 2000 * 54 + 20_000
