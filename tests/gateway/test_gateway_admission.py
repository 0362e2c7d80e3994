from __future__ import annotations

import asyncio

import pytest

from cluster.config import GatewayConfig
from cluster.errors import InvalidArgumentError, OverloadedError, UnavailableError
from cluster.gateway.admission import Admission


def _admission() -> Admission:
    return Admission(GatewayConfig(max_inflight_requests=2))


def test_places_are_bounded_and_given_back() -> None:
    admission = _admission()
    with admission.admit("a"), admission.admit("b"):
        assert admission.num_inflight == 2
        with pytest.raises(OverloadedError, match="max_inflight_requests=2"):
            admission.admit("c").__enter__()
        admission.check_invariants()
    assert admission.num_inflight == 0
    with admission.admit("c"):
        pass


def test_failed_request_gives_its_place_back() -> None:
    admission = _admission()
    with pytest.raises(RuntimeError), admission.admit("a"):
        assert admission.num_inflight == 1
        raise RuntimeError
    assert admission.num_inflight == 0
    admission.check_invariants()


def test_id_in_use_is_refused() -> None:
    admission = _admission()
    with admission.admit("a"):
        with pytest.raises(InvalidArgumentError) as caught:
            admission.admit("a").__enter__()
        assert caught.value.field == "request_id"
        assert admission.num_inflight == 1


async def test_closed_admission_refuses_and_becomes_idle() -> None:
    admission = _admission()
    with admission.admit("a"):
        admission.close()
        with pytest.raises(UnavailableError):
            admission.admit("b").__enter__()
        assert not await admission.wait_idle(0.0)
    assert await admission.wait_idle(0.0)


async def test_idle_is_told_when_the_last_request_ends() -> None:
    admission = _admission()
    with admission.admit("a"):
        waiting = asyncio.create_task(admission.wait_idle(60.0))
        with admission.admit("b"):
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not waiting.done()
    assert await asyncio.wait_for(waiting, 1.0)


async def test_place_of_an_id_is_told_free_when_its_request_ends() -> None:
    admission = _admission()
    assert await admission.wait_free("a", 0.0)
    with admission.admit("a"):
        assert not await admission.wait_free("a", 0.0)
        assert await admission.wait_free("b", 0.0)
        waiting = asyncio.create_task(admission.wait_free("a", 60.0))
        await asyncio.sleep(0)
        assert not waiting.done()
    assert await asyncio.wait_for(waiting, 1.0)


async def test_place_that_is_taken_again_at_once_is_not_free() -> None:
    admission = _admission()
    first = admission.admit("a")
    first.__enter__()
    waiting = asyncio.create_task(admission.wait_free("a", 60.0))
    await asyncio.sleep(0)
    first.__exit__(None, None, None)
    with admission.admit("a"):
        assert not await asyncio.wait_for(waiting, 1.0)
