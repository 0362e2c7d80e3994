from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cluster.errors import (
    AlreadyExistsError,
    CancelledError,
    DeadlineError,
    InvalidArgumentError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    SluiceError,
    UnauthenticatedError,
    UnavailableError,
)
from cluster.gateway.status import status_of
from cluster.rpc import public, public_cache


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
    ],
    ids=lambda error: type(error).__name__,
)
def test_error_survives_the_way_to_the_client(error: SluiceError) -> None:
    status = status_of(error)
    got = public.error_from_status(error.code, status.message, status.SerializeToString())
    assert type(got) is type(error)
    assert str(got) == str(error)
    assert vars(got) == vars(error)


def test_status_of_a_stranger_is_an_error_too() -> None:
    got = public.error_from_status("DATA_LOSS", "hm", b"\xff\xff\xff")
    assert type(got) is SluiceError
    assert str(got) == "DATA_LOSS: hm"


def _request(**fields: Any) -> Callable[[], object]:
    given = {"prompt": "x", "token_ids": None, "model": "", "sampling": None, "request_id": ""}
    given |= fields
    return lambda: public.generate_request(given.pop("prompt"), given.pop("token_ids"), **given)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (_request(sampling={"max_tokens": -1}), "sampling.max_tokens"),
        (_request(sampling={"max_token": 1}), "sampling.max_token"),
        (_request(sampling={"temperature": "hot"}), "sampling.temperature"),
        (_request(prompt=None), "prompt"),
        (_request(token_ids=[1]), "prompt"),
        (_request(prompt=None, token_ids=[-1]), "token_ids"),
        (_request(prompt="\ud800"), "text"),
        (_request(model="\ud800"), "model"),
        (_request(prefix="\ud800"), "prefix"),
        (lambda: public_cache.remove_request("\ud800"), "name"),
        (lambda: public_cache.register_request("\ud800", "x", None, ""), "name"),
        (lambda: public_cache.inspect_request("x", None, "\ud800", ""), "prefix"),
        (lambda: public_cache.register_request("a", None, None, ""), "prompt"),
        (lambda: public_cache.register_request("a", "x", [1], ""), "prompt"),
        (lambda: public_cache.register_request("a", None, [-1], ""), "token_ids"),
        (lambda: public_cache.inspect_request(None, None, "", ""), "prompt"),
        (lambda: public_cache.inspect_request("x", [1], "a", ""), "prompt"),
    ],
)
def test_what_cannot_be_written_down_is_refused_here(
    make: Callable[[], object], field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        make()
    assert caught.value.field == field
