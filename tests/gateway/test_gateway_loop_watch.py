"""A gateway whose event loop stands still ends, and says where it stood."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIMIT_S = 1.5
PROGRAM = f"""
import asyncio, sys, time
from cluster.gateway.loop_watch import LoopWatch

def sleeps():
    time.sleep(60)

def spins():
    while True:
        pass

async def main():
    watch = LoopWatch({LIMIT_S})
    await asyncio.sleep(2 * {LIMIT_S})
    print("served", flush=True)
    if sys.argv[1] == "closed":
        watch.close()
        time.sleep(2 * {LIMIT_S})
        return
    {{"sleeps": sleeps, "spins": spins}}[sys.argv[1]]()

asyncio.run(main())
"""


def run(how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, how]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize("how", ["sleeps", "spins"])
def test_loop_that_stands_still_ends_its_process(how: str) -> None:
    done = run(how)
    assert done.returncode == 1 and done.stdout == "served\n"
    assert f"stood still for {LIMIT_S:g} s: the gateway ends" in done.stderr
    assert f"in {how}\n" in done.stderr, "where it stood"


def test_loop_that_is_no_longer_watched_may_block() -> None:
    done = run("closed")
    assert (done.returncode, done.stdout, done.stderr) == (0, "served\n", "")
