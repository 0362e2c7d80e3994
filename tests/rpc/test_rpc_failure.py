"""What a status stands for, and who made it."""

from __future__ import annotations

import pytest

from cluster.errors import (
    RESUME_ELSEWHERE,
    AlreadyExistsError,
    CancelledError,
    DeadlineError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    OverloadedError,
    PermissionDeniedError,
    PoisonError,
    SluiceError,
    SupersededError,
    UnauthenticatedError,
    UnavailableError,
)
from cluster.gateway.status import status_of
from cluster.rpc.failure import failure_from_status


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgumentError("top_p=2: ...", field="sampling.top_p"),
        NotFoundError("model"),
        AlreadyExistsError("name"),
        UnauthenticatedError("who"),
        PermissionDeniedError("no"),
        OverloadedError("full", retry_after_s=2.5),
        OverloadedError("too late", retry_after_s=0.5, reason="SLO_NOT_ATTAINABLE"),
        DeadlineError("late"),
        CancelledError("gone"),
        UnavailableError("away"),
        UnavailableError("drains", reason=RESUME_ELSEWHERE),
        FailedPreconditionError("contradicts"),
        OutOfRangeError("ahead"),
        SupersededError("elsewhere"),
        PoisonError("kills"),
    ],
    ids=lambda error: f"{type(error).__name__}-{error.reason}",
)
def test_error_survives_the_way_to_the_client(error: SluiceError) -> None:
    status = status_of(error)
    got = failure_from_status(error.code, status.message, status.SerializeToString())
    assert type(got.error) is type(error)
    assert str(got.error) == str(got) == str(error)
    assert vars(got.error) == vars(error)
    assert (got.code, got.is_ours) == (error.code, True)
    assert got.retry_after_s == getattr(error, "retry_after_s", 0.0)


def test_plain_internal_error_is_no_poison() -> None:
    status = status_of(SluiceError("a defect"))
    got = failure_from_status("INTERNAL", status.message, status.SerializeToString())
    assert type(got.error) is SluiceError
    assert str(got.error) == "INTERNAL: a defect"


@pytest.mark.parametrize("details", [b"\xff\xff\xff", b"", None])
def test_status_of_a_stranger_is_an_error_too(details: bytes | None) -> None:
    got = failure_from_status("DATA_LOSS", "hm", details)
    assert type(got.error) is SluiceError
    assert str(got.error) == "DATA_LOSS: hm"
    assert not got.is_ours
    aborted = failure_from_status("ABORTED", "by a proxy", details)
    assert type(aborted.error) is SluiceError and not aborted.is_ours
