"""`sluice prefix`, `sluice cache` and keys, against a gateway whose leader has no engine."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cli_run import error_of, run

from cluster.clock import WallClock
from cluster.config import StoreConfig
from cluster.kvstore.embedded_blocks import EmbeddedBlocks
from tests.gateway.gateway_fakes import FakeLeader, stage
from tests.gateway.tenant_files import KEYS, auth_config

pytestmark = pytest.mark.integration


@contextmanager
def _gateway(**options: Any) -> Iterator[tuple[str, FakeLeader]]:
    """Run a gateway on a loop of its own; yields its address and its leader."""
    leader = FakeLeader()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    running = stage(leader, **options)
    try:
        entered = asyncio.run_coroutine_threadsafe(running.__aenter__(), loop).result(30)
        yield entered.address, leader
        asyncio.run_coroutine_threadsafe(running.__aexit__(None, None, None), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@pytest.fixture(scope="module")
def gateway() -> Iterator[tuple[str, FakeLeader]]:
    with _gateway(block_store=EmbeddedBlocks(StoreConfig(), clock=WallClock())) as running:
        yield running


@pytest.fixture
def ask(gateway: tuple[str, FakeLeader], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command against the gateway; it must not fail."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("SLUICE_ADDRESS", gateway[0])

    def ask(*arguments: str, stdin: str | None = None) -> Any:
        result = run(*arguments, stdin=stdin)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout) if "--json" in arguments else result.stdout

    return ask


def test_prefix_is_added_listed_used_and_removed(ask: Any, gateway: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("You are a helpful assistant. " * 4)
    added = ask("prefix", "add", "system", "--file", str(file), "--timeout-s", "0.5", "--json")
    assert (added["name"], added["num_stored_blocks"]) == ("system", 0)
    assert added["num_tokens"] // 16 == added["num_blocks"] > 0
    assert ask("prefix", "list", "--json") == {"prefixes": [added]}
    table = ask("prefix", "list")
    assert "system" in table and f"0 / {added['num_blocks']}" in table
    answer = ask("generate", "Hi", "--prefix", "system", "--max-tokens", "2", "--json")
    assert answer["usage"]["prompt_tokens"] > added["num_tokens"]
    asked = gateway[1].submitted[-1].prompt_token_ids
    assert len(asked) == answer["usage"]["prompt_tokens"]
    found = ask("cache", "inspect", "--prefix", "system", "--json")
    assert found["num_tokens"] == added["num_tokens"]
    assert ask("prefix", "list", "--tenant", "*", "--json") == {"prefixes": [added]}
    assert ask("prefix", "list", "--tenant", "nobody", "--json") == {"prefixes": []}
    assert "not registered" in run("prefix", "remove", "system", "--tenant", "nobody").stderr
    assert ask("prefix", "remove", "system", "--tenant", "") == "removed system\n"
    gone = run("generate", "Hi", "--prefix", "system")
    assert (gone.exit_code, gone.stdout) == (1, "")
    assert "'system' is not registered" in gone.stderr


def test_prefix_of_token_ids_and_of_standard_input(ask: Any, gateway: Any) -> None:
    short = ("--timeout-s", "0.5", "--json")
    assert ask("prefix", "add", "ids", "--token-ids", "5,6,7", *short)["num_tokens"] == 3
    assert gateway[1].submitted[-1].prompt_token_ids == (5, 6, 7)
    assert ask("prefix", "add", "read", "-", *short, stdin="def f")["num_tokens"] > 0
    for name in ("ids", "read"):
        assert ask("prefix", "remove", name, "--json") == {"removed": name}


def test_stats_are_a_table_or_json(ask: Any) -> None:
    books = ask("cache", "stats", "--json")
    assert books["store"]["num_blocks"] == 0
    assert books["replicas"][0]["tiers"]["store_state"] == "off"
    text = ask("cache", "stats")
    assert "store: 0.0 of 512 MiB, 0 blocks (0 pinned)" in text
    assert "replica-1" in text and "off" in text
    assert "off" in ask("status")
    assert ask("status", "--json")["replicas"][0]["cache"]["store_state"] == "off"


def test_flush_asks_first(ask: Any, gateway: Any) -> None:
    leader = gateway[1]
    leader.num_flushed = 0
    declined = run("cache", "flush", "--replicas", stdin="n\n")
    assert declined.exit_code == 130
    assert leader.num_flushed == 0
    assert ask("cache", "flush", "--replicas", "--store", "--json", "--yes") == {
        "num_replica_blocks": 0,
        "num_store_blocks": 0,
        "failed_replica_ids": [],
    }
    assert "forgot 0 blocks on replicas" in ask("cache", "flush", "--replicas", stdin="y\n")
    assert leader.num_flushed == 2


def test_flush_that_misses_a_replica_fails(ask: Any, gateway: Any) -> None:
    gateway[1].flush_fails = True
    try:
        result = run("cache", "flush", "--replicas", "--yes")
    finally:
        gateway[1].flush_fails = False
    assert result.exit_code == 1
    assert "not asked: replica-1" in result.stderr


def test_inspect_says_what_is_where(ask: Any) -> None:
    text = ask("cache", "inspect", "def f(x):\n" * 20)
    assert "full blocks" in text
    assert "replica-1" in text and "store" in text


def test_key_comes_from_the_environment_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auth = auth_config(tmp_path).model_dump()
    key_file = tmp_path / "key"
    key_file.write_text(KEYS["root"] + "\n")
    with _gateway(auth=auth) as (address, _):
        monkeypatch.setenv("SLUICE_ADDRESS", address)
        commands = [
            ["status"],
            ["generate", "x", "--max-tokens", "1"],
            ["prefix", "list"],
            ["cache", "stats"],
            ["bench", "serve", "--concurrency", "1", "--num-requests", "1", "--input-tokens", "9"],
        ]
        for command in commands:
            assert run(*command, "--json").exit_code == 1
            named = run(*command, "--json", "--api-key-file", str(key_file))
            assert named.exit_code == 0, named.output
        monkeypatch.setenv("SLUICE_API_KEY", KEYS["alice"])
        assert run("prefix", "list", "--json").exit_code == 0
        denied = run("cache", "stats")
        assert denied.exit_code == 1 and "no administrator" in denied.stderr
        assert run("cache", "stats", "--api-key-file", str(key_file)).exit_code == 0


def test_key_is_not_sent_to_other_machines_as_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_API_KEY", "sk-secret")
    for command in (["status"], ["bench", "serve", "--concurrency", "1"]):
        line = error_of(*command, "--address", "gateway.example:9000")
        assert "without TLS" in line
        assert "sk-secret" not in line
