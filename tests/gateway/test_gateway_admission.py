from __future__ import annotations

import pytest

from cluster.config import GatewayConfig
from cluster.errors import InvalidArgumentError, OverloadedError, UnavailableError
from cluster.gateway.admission import Admission


def _admission(inflight: int = 2, queued: int = 1) -> Admission:
    return Admission(GatewayConfig(max_inflight_requests=inflight, max_queued_requests=queued))


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


def test_failed_request_gives_its_places_back() -> None:
    admission = _admission()
    with pytest.raises(RuntimeError), admission.admit("a"), admission.queue():
        assert (admission.num_inflight, admission.num_queued) == (1, 1)
        raise RuntimeError
    assert (admission.num_inflight, admission.num_queued) == (0, 0)
    admission.check_invariants()


def test_queue_gives_positions_and_is_bounded() -> None:
    admission = _admission(inflight=3, queued=2)
    with admission.admit("a"), admission.admit("b"), admission.admit("c"):
        with admission.queue() as first, admission.queue() as second:
            assert (first, second) == (0, 1)
            with pytest.raises(OverloadedError, match="max_queued_requests=2"):
                admission.queue().__enter__()
        with admission.queue() as again:
            assert again == 0


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
