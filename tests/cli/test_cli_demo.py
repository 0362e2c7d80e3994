"""scripts/demo.py: its exit status; and small, with a real cluster: every stream finishes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.client import AsyncClient
from scripts.demo import Stream, exit_status, follow
from tests.bench.bench_fakes import FakeInference, serving

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

DEMO = Path(__file__).parents[2] / "scripts" / "demo.py"


@pytest.mark.parametrize(
    ("outcomes", "status"), [(["ok", "ok"], 0), (["ok", "break"], 1), (["refuse", "ok"], 1)]
)
async def test_demo_fails_where_one_stream_fails(outcomes: list[str], status: int) -> None:
    streams = [Stream("x"), Stream("y")]
    with serving(FakeInference(outcomes)) as address:
        async with AsyncClient(address) as client:
            for stream in streams:
                await follow(client, stream, 2, 0.0)
    assert exit_status(streams) == status
    assert [bool(stream.error) for stream in streams] == [o != "ok" for o in outcomes]


def test_demo_without_streams_that_ended_fails() -> None:
    assert exit_status([Stream("x")]) == 1


def test_demo_finishes_every_stream_and_reports() -> None:
    command = [sys.executable, str(DEMO), "--json", "--max-tokens", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["result"]["num_ok"] == report["result"]["num_requests"] >= 20
    assert 0 < report["prefix_hit_rate"] < 1
    assert "\x1b[" not in done.stderr.replace("\x1b[33m(raylet)\x1b[0m", "")
