from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.kvstore.block_hash import (
    HASH_BYTES,
    block_hashes,
    child_hash,
    root_hash,
    router_key,
)

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=64)
sizes = st.integers(1, 9)


@given(tokens, tokens, tokens, sizes)
def test_block_hash_equal_prefixes_have_equal_hashes(shared, left, right, size) -> None:
    ours = block_hashes(shared + left, size, fingerprint=b"m")
    theirs = block_hashes(shared + right, size, fingerprint=b"m")
    num_shared = len(shared) // size
    assert ours[:num_shared] == theirs[:num_shared] == block_hashes(shared, size, fingerprint=b"m")


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64), sizes, st.data())
def test_block_hash_first_difference_changes_all_that_follow(ids, size, data) -> None:
    index = data.draw(st.integers(0, len(ids) - 1))
    changed = list(ids)
    changed[index] ^= 1
    ours = block_hashes(ids, size, fingerprint=b"m")
    theirs = block_hashes(changed, size, fingerprint=b"m")
    first = index // size
    assert ours[:first] == theirs[:first]
    assert not set(ours[first:]) & set(theirs)


@given(tokens, sizes)
def test_block_hash_partial_block_has_none(ids, size) -> None:
    hashes = block_hashes(ids, size, fingerprint=b"m")
    assert len(hashes) == len(ids) // size
    assert all(len(digest) == HASH_BYTES for digest in hashes)
    assert len(set(hashes)) == len(hashes)


@given(tokens, sizes, st.integers(0, 64), st.binary(max_size=8), st.binary(max_size=8))
def test_block_hash_incremental_equals_batch(ids, size, cut, fingerprint, salt) -> None:
    batch = block_hashes(ids, size, fingerprint=fingerprint, salt=salt)
    parent = root_hash(fingerprint, salt)
    for index, digest in enumerate(batch):
        parent = child_hash(parent, ids[index * size : (index + 1) * size])
        assert parent == digest
    cut = min(cut // size, len(batch))
    head = block_hashes(ids[: cut * size], size, fingerprint=fingerprint, salt=salt)
    parent = head[-1] if head else None
    rest = block_hashes(ids[cut * size :], size, fingerprint=fingerprint, salt=salt, parent=parent)
    assert head + rest == batch


seeds = st.tuples(st.binary(max_size=6), st.binary(max_size=6))


@given(seeds, seeds)
def test_block_hash_other_fingerprint_or_salt_shares_nothing(ours, theirs) -> None:
    a = block_hashes(range(32), 8, fingerprint=ours[0], salt=ours[1])
    b = block_hashes(range(32), 8, fingerprint=theirs[0], salt=theirs[1])
    if ours == theirs:
        assert a == b
    else:
        assert not set(a) & set(b)


@pytest.mark.parametrize(
    ("ours", "theirs"), [((b"ab", b"c"), (b"a", b"bc")), ((b"", b"x"), (b"x", b""))]
)
def test_block_hash_fingerprint_and_salt_do_not_run_together(ours, theirs) -> None:
    assert root_hash(*ours) != root_hash(*theirs)


def test_block_hash_is_the_same_in_every_version() -> None:
    """The values lie in stores that outlive a process: a change here needs a new version."""
    (digest,) = block_hashes([1, 2, 3, 4], 4, fingerprint=b"model", salt=b"tenant")
    assert digest.hex() == "b4cdf386fa6c71f6138a19895c3526cc"
    assert router_key(digest) == int.from_bytes(digest[:8], "little")
    assert router_key(bytes(range(16))) == 0x0706050403020100


def test_block_hash_of_2000_tokens_is_fast() -> None:
    ids = tuple(range(2000))
    best_s = float("inf")
    for _ in range(20):
        start_s = time.perf_counter()
        block_hashes(ids, 16, fingerprint=b"m")
        best_s = min(best_s, time.perf_counter() - start_s)
    assert best_s < 1e-3
