from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.router.prefix_index import PrefixIndex


def _index(**blocks: list[int]) -> PrefixIndex:
    index = PrefixIndex()
    for replica_id, keys in blocks.items():
        index.replace(replica_id, keys)
    return index


def test_longest_prefix_ends_at_the_first_missing_block() -> None:
    index = _index(a=[1, 2, 4], b=[2, 3])
    assert index.longest_prefix("a", [1, 2, 3, 4]) == 2
    assert index.longest_prefix("b", [1, 2, 3]) == 0
    assert index.longest_prefix("a", [1, 2]) == 2
    assert index.longest_prefix("a", []) == 0


def test_longest_prefix_of_an_unknown_replica_is_nothing() -> None:
    assert _index().longest_prefix("a", [1]) == 0


def test_delta_changes_one_replica() -> None:
    index = _index(a=[1, 2], b=[1, 2])
    index.apply("a", added=[3], removed=[2])
    assert index.longest_prefix("a", [1, 3]) == 2
    assert index.longest_prefix("a", [1, 2]) == 1
    assert index.longest_prefix("b", [1, 2]) == 2


def test_snapshot_replaces_what_was_known() -> None:
    index = _index(a=[1, 2])
    index.replace("a", [7])
    assert index.num_blocks("a") == 1
    assert index.longest_prefix("a", [1]) == 0


def test_drop_forgets_and_gives_the_memory_back() -> None:
    index = _index(a=[1, 2], b=[3])
    bytes_before = index.num_bytes
    index.drop("a")
    index.drop("a")
    assert index.num_blocks("a") == 0
    assert 0 < index.num_bytes < bytes_before


_keys = st.lists(st.integers(0, 5), max_size=4)


@given(_keys, st.lists(st.tuples(_keys, _keys), max_size=5), _keys)
def test_index_agrees_with_a_plain_set(
    snapshot: list[int], deltas: list[tuple[list[int], list[int]]], prompt: list[int]
) -> None:
    index, held = _index(a=snapshot), set(snapshot)
    for added, removed in deltas:
        index.apply("a", added=added, removed=removed)
        held = (held - set(removed)) | set(added)
    expected = 0
    while expected < len(prompt) and prompt[expected] in held:
        expected += 1
    assert index.longest_prefix("a", prompt) == expected
    assert index.num_blocks("a") == len(held)
