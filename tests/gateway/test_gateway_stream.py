"""What a slow reader is given at once."""

from __future__ import annotations

import asyncio

import pytest

from cluster.errors import UnavailableError
from cluster.gateway.stream import PIECE_TOKENS, OutputStream
from cluster.types import EngineOutput, SampledToken


def output(num_tokens: int) -> EngineOutput:
    return EngineOutput("r", tuple(SampledToken(token_id) for token_id in range(num_tokens)))


async def test_reader_who_fell_behind_gets_all_of_it_in_pieces() -> None:
    stream = OutputStream()
    pushed = [output(3) for _ in range(PIECE_TOKENS)]
    for each in pushed:
        stream.push(each)
    stream.fail(UnavailableError("gone"))
    taken = []
    async with asyncio.timeout(5.0):
        while len(taken) < len(pushed):
            piece = await stream.take()
            assert 0 < sum(len(each.tokens) for each in piece) <= PIECE_TOKENS
            taken += piece
        assert taken == pushed
        with pytest.raises(UnavailableError, match="gone"):
            await stream.take()


@pytest.mark.parametrize("sizes", [(0, 0), (1, 2, 0), (PIECE_TOKENS,), (PIECE_TOKENS - 1, 1, 0)])
async def test_what_fits_is_given_at_once(sizes: tuple[int, ...]) -> None:
    stream = OutputStream()
    for size in sizes:
        stream.push(output(size))
    assert [len(each.tokens) for each in await stream.take()] == list(sizes)


async def test_single_output_is_never_cut() -> None:
    stream = OutputStream()
    stream.push(output(2 * PIECE_TOKENS))
    stream.push(output(1))
    assert [len(each.tokens) for each in await stream.take()] == [2 * PIECE_TOKENS]
    assert [len(each.tokens) for each in await stream.take()] == [1]
