"""The script that submits a sweep, with a `ray` that only notes what it is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.simulator import scenario
from tests.cli.cli_run import run
from tests.simulator.simulation_results import request, result

SCRIPT = Path(__file__).parents[2] / "deploy" / "sweep-job"

_NOTING_RAY = f"""#!{sys.executable}
import json, os, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--working-dir") + 1])
files = {{path.name: path.read_text() for path in folder.iterdir()}}
pathlib.Path(os.environ["NOTE"]).write_text(json.dumps([sys.argv[1:], files]))
"""


def submit(tmp_path: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Return what `ray` was called with, and the files that it would have uploaded."""
    fake = tmp_path / "bin" / "ray"
    fake.parent.mkdir()
    fake.write_text(_NOTING_RAY)
    fake.chmod(0o755)
    note = tmp_path / "note.json"
    path = f"{fake.parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(SCRIPT), *arguments]
    subprocess.run(command, env={**os.environ, "PATH": path, "NOTE": str(note)}, check=True)
    told, files = json.loads(note.read_text())
    return told, files


def test_sweep_job_uploads_the_trace_and_submits_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "own.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0,100,5\n1,100,5\n")
    (tmp_path / "secret.txt").write_text("not to be uploaded")
    told, files = submit(tmp_path, str(trace), "--rate-scale", "1,2", "--json")
    assert told[:3] == ["job", "submit", "--working-dir"]
    assert files == {"own.csv": trace.read_text()}

    def fake(*given: Any) -> Any:
        return result([request()], policy=given[1].config.router.policy)

    monkeypatch.setattr(scenario, "simulate", fake)
    monkeypatch.chdir(tmp_path)
    job = told[told.index("--") + 1 :]
    assert job[:2] == ["sluice", "simulate"]
    done = run(*job[1:], "--serial")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert len(figures["points"]) == 2 * len(figures["knees"]) == 16


def test_sweep_job_without_a_trace_says_how_to_call_it() -> None:
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage" in done.stderr
