"""How many prefixes and tokens may be registered, and what one tenant may have of that."""

from __future__ import annotations

import pytest
from prefix_fakes import flaky_store, record

from cluster.config import GatewayConfig
from cluster.errors import OverloadedError
from cluster.gateway.prefix_limits import check_room
from cluster.gateway.prefix_record import PrefixRecord, encode_record
from cluster.gateway.prefixes import Prefixes

KNOWN = [
    record("a", token_ids=(1,) * 30),
    record("b", token_ids=(2,) * 10),
    record("c", tenant="bob", token_ids=(3,) * 10),
]


def _check(new: PrefixRecord, **limits: int) -> None:
    check_room(new, KNOWN, GatewayConfig(**limits))


@pytest.mark.parametrize(
    ("tenant", "limits", "reason"),
    [
        ("bob", {"max_prefixes": 3}, r"3 prefixes .* limit=3 \(gateway\.max_prefixes\)"),
        ("bob", {"max_prefix_tokens_total": 59}, r"have 50 tokens, with this one 60, limit=59 "),
        ("alice", {"max_prefixes": 4}, r"2 prefixes .* limit=2 .*max_prefixes / 2 for one tenant"),
        ("alice", {"max_prefix_tokens_total": 98}, r"with this one 50, limit=49 .* one tenant"),
    ],
)
def test_what_is_too_much_is_refused(tenant: str, limits: dict[str, int], reason: str) -> None:
    new = record("new", tenant=tenant, token_ids=(4,) * 10)
    with pytest.raises(OverloadedError, match=reason):
        _check(new, **limits)
    _check(new, **{name: limit + 2 for name, limit in limits.items()})


def test_tenant_at_its_share_leaves_room_for_others() -> None:
    _check(record("new", tenant="carol", token_ids=(4,) * 10), max_prefixes=4)
    _check(record("new", tenant="carol", token_ids=(4,) * 10), max_prefix_tokens_total=60)


def test_without_tenants_there_are_no_shares() -> None:
    known = [record(f"n{i}", tenant="") for i in range(3)]
    check_room(record("new", tenant=""), known, GatewayConfig(max_prefixes=4))


def test_all_prefixes_of_the_defaults_fit_a_reply_that_keeps_its_deadline() -> None:
    config = GatewayConfig()
    per_prefix = len(encode_record(record("n" * 128, tenant="t" * 128, token_ids=(1,)))) + 64
    reply_bytes = 4 * config.max_prefix_tokens_total + config.max_prefixes * per_prefix
    assert reply_bytes < 2 * 2**20


async def test_registry_refuses_one_tenant_and_takes_another() -> None:
    prefixes = Prefixes(flaky_store(), GatewayConfig(max_prefixes=2), model="m", vocab_size=9)
    await prefixes.put(record("a"))
    with pytest.raises(OverloadedError, match="for one tenant"):
        await prefixes.put(record("b"))
    await prefixes.put(record("b", tenant="bob"))
