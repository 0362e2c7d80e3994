"""The command as a process of its own: Ctrl-C, and the benchmark that starts processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.rpc.sluice.v1 import inference_pb2 as pb
from tests.bench.bench_fakes import FakeInference, serving

pytestmark = pytest.mark.integration

SLUICE = [sys.executable, "-m", "cluster.cli"]


class StuckInference(FakeInference):
    """Accepts requests and makes no token until it is released."""

    def __init__(self) -> None:
        super().__init__([])
        self.was_asked = threading.Event()
        self.is_released = threading.Event()

    def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: Any
    ) -> Iterator[pb.GenerateStreamResponse]:
        yield pb.GenerateStreamResponse(running=pb.Running(replica_id="r1"))
        self.was_asked.set()
        self.is_released.wait(60)


@pytest.mark.parametrize(
    "command",
    [["generate", "x"], ["bench", "serve", "--concurrency", "2", "--warmup", "0"]],
    ids=["generate", "bench"],
)
def test_ctrl_c_ends_a_waiting_command_with_one_line(command: list[str]) -> None:
    fake = StuckInference()
    with serving(fake) as address:
        process = subprocess.Popen(
            [*SLUICE, *command, "--address", address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Run in the background, the tests have Ctrl-C ignored, and a child inherits that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            assert fake.was_asked.wait(60)
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=20)
        finally:
            process.kill()
            fake.is_released.set()
    assert process.returncode == 130, errors
    assert errors == "sluice: interrupted\n"
    assert not output.strip()


def test_bench_gateway_json_is_one_object() -> None:
    command = [*SLUICE, "bench", "gateway", "--json", "--seconds", "0.3", "--streams", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    report = json.loads(line)
    assert report["benchmark"] == "gateway"
    assert report["unthrottled"]["num_messages"] > 0
    assert report["provenance"]["versions"]["grpcio"]
