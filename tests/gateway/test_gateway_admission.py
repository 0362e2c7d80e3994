from __future__ import annotations

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
        assert not admission._idle.is_set()
    await admission.wait_idle()
