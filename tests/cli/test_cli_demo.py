"""scripts/demo.py, small: a real cluster comes up, every stream finishes, nothing is left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

DEMO = Path(__file__).parents[2] / "scripts" / "demo.py"


def test_demo_finishes_every_stream_and_reports() -> None:
    command = [sys.executable, str(DEMO), "--json", "--max-tokens", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["result"]["num_ok"] == report["result"]["num_requests"] >= 20
    assert 0 < report["prefix_hit_rate"] < 1
    assert "\x1b[" not in done.stderr.replace("\x1b[33m(raylet)\x1b[0m", "")
