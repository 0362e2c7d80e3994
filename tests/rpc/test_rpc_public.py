from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cluster.errors import InvalidArgumentError
from cluster.rpc import public, public_cache


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
