"""The blocks of whole prompts in the store, over workers and layouts."""

from __future__ import annotations

from typing import Any

import pytest
from gateway_fakes import BLOCK_SIZE
from prefix_fakes import TOKENS, flaky_blocks, keys_of, replica_info, stored_blocks

from cluster.errors import UnavailableError
from cluster.gateway.stored_blocks import Prompt

PROMPT = Prompt(TOKENS, b"salt")


async def _put(store: Any, keys: list[bytes]) -> None:
    assert all(await store.put_blocks(dict.fromkeys(keys, b"x" * 10)))


async def _pinned(store: Any) -> int:
    return int((await store.stats()).num_pinned)


async def test_count_is_of_leading_blocks_that_every_worker_has() -> None:
    store = flaky_blocks()
    blocks = stored_blocks(store, replica_info(tp=2, pp=2), replica_info("r2", tp=2, pp=2))
    for part, num_stored in enumerate([3, 3, 2, 3]):
        assert await blocks.count(PROMPT) == 0
        await _put(store, keys_of(TOKENS, salt=b"salt", pp=2, part=part)[:num_stored])
    assert await blocks.count(PROMPT) == 2
    assert await blocks.count(Prompt(TOKENS, b"other")) == 0


async def test_count_is_the_least_of_two_layouts() -> None:
    store = flaky_blocks()
    await _put(store, keys_of(TOKENS, salt=b"salt"))
    assert await stored_blocks(store, replica_info()).count(PROMPT) == 3
    assert (
        await stored_blocks(store, replica_info(), replica_info("r2", fingerprint="ab" * 16)).count(
            PROMPT
        )
        == 0
    )


async def test_blocks_behind_a_gap_do_not_count() -> None:
    store = flaky_blocks()
    first, _, third = keys_of(TOKENS, salt=b"salt")
    await _put(store, [first, third])
    assert await stored_blocks(store, replica_info()).count(PROMPT) == 1


async def test_without_store_or_replica_nothing_is_stored() -> None:
    assert await stored_blocks(None, replica_info()).count(PROMPT) == 0
    assert await stored_blocks(None, replica_info()).pin(PROMPT)
    assert await stored_blocks(flaky_blocks()).count(PROMPT) == 0


async def test_pin_pins_what_is_there_and_says_if_something_is_not() -> None:
    store = flaky_blocks()
    blocks = stored_blocks(store, replica_info())
    keys = keys_of(TOKENS, salt=b"salt")
    await _put(store, keys[:2])
    assert not await blocks.pin(PROMPT)
    assert await _pinned(store) == 2
    await _put(store, keys[2:])
    assert await blocks.pin(PROMPT)
    assert await _pinned(store) == 3


async def test_unpin_spares_what_another_prefix_has() -> None:
    store = flaky_blocks()
    blocks = stored_blocks(store, replica_info(tp=2))
    for part in range(2):
        await _put(store, keys_of(TOKENS, salt=b"salt", part=part))
    assert await blocks.pin(PROMPT)
    assert await _pinned(store) == 6
    beginning = TOKENS[: 2 * BLOCK_SIZE]
    await blocks.unpin(PROMPT, [Prompt(TOKENS, b"other"), Prompt(beginning, b"salt")])
    assert await _pinned(store) == 4
    await blocks.unpin(Prompt(beginning, b"salt"), [])
    assert await _pinned(store) == 0


@pytest.mark.parametrize(
    ("others", "num_kept"),
    [
        ([TOKENS[: 2 * BLOCK_SIZE - 1]], 1),
        ([(0, *TOKENS[1:])], 0),
        ([(*TOKENS[:40], 7, 8, 9)], 2),
        ([(*TOKENS, 7)], 3),
        ([TOKENS[:BLOCK_SIZE], (*TOKENS[:40], 7), (1, 2)], 2),
    ],
)
async def test_unpin_spares_full_blocks_of_a_common_beginning(
    others: list[tuple[int, ...]], num_kept: int
) -> None:
    store = flaky_blocks()
    blocks = stored_blocks(store, replica_info())
    await _put(store, keys_of(TOKENS, salt=b"salt"))
    await blocks.pin(PROMPT)
    await blocks.unpin(PROMPT, [Prompt(tokens, b"salt") for tokens in others])
    assert await _pinned(store) == num_kept


async def test_long_prompt_travels_in_chunks() -> None:
    store = flaky_blocks()
    tokens = tuple(range(2000)) * 9
    await _put(store, keys_of(tokens, salt=b"salt")[:1100])
    assert await stored_blocks(store, replica_info()).count(Prompt(tokens, b"salt")) == 1100
    assert store.calls.count("has_blocks") == 2


async def test_store_that_is_down_is_said() -> None:
    store = flaky_blocks()
    store.is_down = True
    blocks = stored_blocks(store, replica_info())
    for call in (blocks.count(PROMPT), blocks.pin(PROMPT), blocks.unpin(PROMPT, [])):
        with pytest.raises(UnavailableError):
            await call
