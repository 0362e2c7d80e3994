from __future__ import annotations

import pytest

from cluster.kvstore.budget import BLOCK_OVERHEAD_BYTES, FRAME_BYTES, block_cost


@pytest.mark.parametrize(
    ("num_bytes", "allocated"),
    [
        (1, 16),
        (128, 128),
        (129, 160),
        (257, 320),
        (16_384, 16_384),
        (16_385, 20_480),
        (2**20, 2**20),
        (2**20 + 1, 5 * 2**18),
    ],
)
def test_budget_counts_the_sizes_of_the_allocator(num_bytes: int, allocated: int) -> None:
    # What the frame adds is taken off, so that the sum is the size that is named.
    payload = num_bytes - FRAME_BYTES
    if payload >= 0:
        assert block_cost(payload) == allocated + BLOCK_OVERHEAD_BYTES


def test_budget_never_counts_less_than_what_is_stored() -> None:
    for size in range(0, 300_000, 97):
        cost = block_cost(size)
        assert size + FRAME_BYTES + BLOCK_OVERHEAD_BYTES <= cost
        assert cost <= 1.25 * (size + FRAME_BYTES) + BLOCK_OVERHEAD_BYTES + 16
