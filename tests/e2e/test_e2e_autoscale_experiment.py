"""The autoscaling experiment as a researcher runs it: `ray job submit` to a Ray on this machine."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
ENVIRONMENT = os.environ | {
    "RAY_AUTH_MODE": "disabled",  # of a loopback cluster that lives for this test
    "RAY_USAGE_STATS_ENABLED": "0",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def ray_head(tmp_path: Path) -> Iterator[str]:
    """A Ray of its own; yields the address that jobs are submitted to."""
    port = free_port()
    folder = tempfile.mkdtemp(prefix="ray")  # not below tmp_path: paths of sockets have to be short
    command = [RAY, "start", "--head", "--block", "--num-cpus=8", f"--port={free_port()}"]
    command += [
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={port}",
        f"--ray-client-server-port={free_port()}",
        f"--temp-dir={folder}",
    ]
    head = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=(tmp_path / "ray.log").open("w"), stderr=subprocess.STDOUT
    )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline_s = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/version", timeout=2).read()
                break
            except OSError:
                assert head.poll() is None, (tmp_path / "ray.log").read_text()
                assert time.monotonic() < deadline_s, "Ray's dashboard did not come up"
                time.sleep(0.5)
        yield address
    finally:
        family = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        _, alive = psutil.wait_procs([*family, psutil.Process(head.pid)], timeout=15)
        for process in alive:
            process.kill()
        head.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


def test_experiment_scales_up_and_down_and_loses_no_stream(ray_head: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [RAY, "job", "submit", "--address", ray_head, "--"]
    command += [sys.executable, str(ROOT / "scripts" / "autoscale_experiment.py")]
    command += ["--out", str(out), "--low-s", "4", "--peak-s", "60", "--idle-s", "40"]
    done = subprocess.run(
        command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=380
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "succeeded" in done.stdout
    result = json.loads((out / "result.json").read_text())
    assert result["turns"][0] == result["turns"][-1] == 1
    assert max(result["turns"]) == 3
    assert result["num_failed"] == 0 and len(result["requests"]) > 100
    assert (out / "result.png").read_bytes().startswith(b"\x89PNG")
