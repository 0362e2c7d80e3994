"""What the router is told of a request."""

from __future__ import annotations

import random

import pytest

from cluster.config import ClusterConfig
from cluster.errors import InvalidArgumentError
from cluster.gateway import routing
from cluster.gateway.routing import PromptKeys, rest_of, route_of, session_key
from cluster.kvstore.block_hash import block_hashes, router_key
from cluster.router.dispatcher import Dispatcher
from cluster.router.route import RouteRequest
from cluster.types import EngineRequest, ReplicaInfo, ReplicaLoad, SamplingParams

PROMPT = tuple(range(1, 41))


def _keys(fingerprint: str, block_size: int, salt: bytes) -> list[int]:
    seed = bytes.fromhex(fingerprint)
    hashes = block_hashes(PROMPT, block_size, fingerprint=seed, salt=salt)
    return [router_key(block_hash) for block_hash in hashes]


def test_keys_are_those_of_the_full_blocks_under_the_tenants_salt() -> None:
    keys = PromptKeys(PROMPT, salt=b"alice")
    assert keys("07" * 16, 16) == _keys("07" * 16, 16, b"alice")
    assert len(keys("07" * 16, 16)) == 2
    assert keys("07" * 16, 16) != PromptKeys(PROMPT, salt=b"bob")("07" * 16, 16)


def test_prompt_is_hashed_once_for_each_kind_of_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    real = routing.block_hashes

    def spy(*args: object, **options: object) -> list[bytes]:
        hashed.append(args[1])
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(routing, "block_hashes", spy)
    keys = PromptKeys(PROMPT, salt=b"")
    for _ in range(3):
        keys("07" * 16, 16)
        keys("07" * 16, 8)
        keys("08" * 16, 16)
    assert hashed == [16, 8, 16]


def test_blocks_of_a_salt_are_found_under_no_other() -> None:
    dispatcher = Dispatcher(ClusterConfig(), rng=random.Random(1))
    load = ReplicaLoad(num_blocks=100, num_free_blocks=100)
    for name in ("r-1", "r-2"):
        dispatcher.index.replace(name, _keys("07" * 16, 16, b"alice") if name == "r-2" else [])
        info = ReplicaInfo(name, "x:1", "m", "07" * 16, 1, 1, 16, max_model_len=512)
        dispatcher.table.add(info, load, now_s=0.0)
    cached = {}
    for salt in (b"alice", b"carol", b""):
        keys = PromptKeys(PROMPT, salt=salt)
        outcome = dispatcher.submit(RouteRequest(f"of {salt!r}", len(PROMPT), keys, 0.0), 0.0)
        assert outcome.decision is not None
        cached[salt] = {c.replica_id: c.num_cached_tokens for c in outcome.decision.candidates}
    assert cached == {
        b"alice": {"r-1": 0, "r-2": 32},
        b"carol": {"r-1": 0, "r-2": 0},
        b"": {"r-1": 0, "r-2": 0},
    }


def test_session_belongs_to_its_tenant() -> None:
    assert session_key("chat", "alice") == session_key("chat", "alice")
    assert session_key("chat", "alice") != session_key("chat", "bob")
    assert session_key("chat1", "2") != session_key("chat", "12")
    assert session_key("", "alice") == ""
    assert session_key("x" * 128, "alice")


@pytest.mark.parametrize("session", ["x" * 129, "a\0b", "a\nb"])
def test_session_that_is_too_long_or_not_printable_is_refused(session: str) -> None:
    with pytest.raises(InvalidArgumentError, match="limit=128") as caught:
        session_key(session, "alice")
    assert caught.value.field == "session"


def test_rest_of_an_answer_that_is_complete_asks_for_no_room_for_one_more_token() -> None:
    request = EngineRequest("r", tuple(range(10)), SamplingParams(max_tokens=6))
    route = route_of(request, model="m", session="", arrived_s=0.0, expires_s=9.0)
    for num_tokens, num_asked in ((0, 10), (3, 13), (5, 15), (6, 15)):
        rest = rest_of(route, request, [7] * num_tokens, fingerprint="ab", excluded=("a",))
        assert rest.num_prompt_tokens == num_asked
        assert rest.fingerprint == ("ab" if num_tokens else "")
        assert rest.is_resumed and rest.excluded == ("a",)
