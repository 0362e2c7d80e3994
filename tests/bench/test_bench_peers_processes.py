"""Command lines, environments, and the processes that they start."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.bench.peers.comparison import FIGURES
from cluster.bench.peers.environments import Environments, default_cache
from cluster.bench.peers.measuring import Measuring
from cluster.bench.peers.peers import (
    DRIVERS,
    PEERS,
    Command,
    export_command,
    peer_command,
    sluice_command,
)
from cluster.bench.peers.processes import RunFailedError, last_object, run_command
from cluster.bench.peers.rows import ROWS, Row, Work
from cluster.config import DEMO_MODEL_PATH
from cluster.model.random_models import write_random_model

ROW = Row("int8", "int8", Work(16, 256, 64), ("sluice", "openvino"))


def test_sluice_is_asked_for_the_row() -> None:
    args = " ".join(sluice_command(Path("/m"), ROW, threads=2, seed=5).args)
    assert args.startswith(f"{sys.executable} -m cluster.cli bench engine --model /m ")
    assert "--requests 16 --input-len 256 --output-len 64" in args
    assert "--quantization int8" in args
    assert args.endswith("--threads 2 --seed 5 --json")
    unquantized = sluice_command(Path("/m"), replace(ROW, scheme="bf16"), threads=2, seed=5)
    assert "--quantization none" in " ".join(unquantized.args)


def test_peer_runs_in_its_own_environment() -> None:
    command = peer_command(PEERS["vllm"], Path("/c/vllm"), Path("/m"), ROW, threads=3, seed=5)
    assert command.args[:3] == ("/c/vllm/bin/python", "-m", "drivers.vllm_cpu")
    assert " ".join(command.args[3:]) == (
        "--model /m --requests 16 --input-len 256 --output-len 64 --threads 3 --seed 5"
    )
    assert command.environment["OMP_NUM_THREADS"] == "3"
    assert command.environment["LD_PRELOAD"] == "/c/vllm/lib/libiomp5.so"
    assert command.folder == DRIVERS


def test_every_peer_has_pins_a_driver_and_its_rows() -> None:
    for peer in PEERS.values():
        assert all("==" in requirement for requirement in peer.requirements)
        for module in filter(None, (peer.driver, peer.export)):
            assert (DRIVERS / "drivers" / f"{module}.py").is_file()
    known = {"sluice", *PEERS}
    assert all(row.peers[0] == "sluice" and set(row.peers) <= known for row in ROWS)


def test_export_is_asked_for_the_scheme() -> None:
    command = export_command(PEERS["openvino"], Path("/c/openvino"), Path("/m"), "int4", Path("/o"))
    assert " ".join(command.args[1:]) == (
        "-m drivers.openvino_export --model /m --scheme int4 --out /o"
    )


def test_cache_is_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_CACHE_DIR", "/big")
    assert default_cache() == Path("/big/peers")
    monkeypatch.delenv("SLUICE_CACHE_DIR")
    assert default_cache() == Path.home() / ".cache/sluice/peers"


def test_figures_are_the_last_line_of_the_output() -> None:
    assert last_object('INFO started\n{"a": 1}\n{"ttft_s": 0.5}\n\n') == {"ttft_s": 0.5}
    for output in ("", "started\n", "[1]\n", '{"a": 1}\nbye\n'):
        with pytest.raises(RunFailedError, match="printed no figures"):
            last_object(output)


@pytest.fixture
def installing(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Commands of an installation, none of which is run."""
    commands: list[tuple[str, ...]] = []

    def run(command: Command, log: Path, timeout_s: float) -> str:
        commands.append(command.args)
        if "venv" in command.args:
            Path(command.args[-1]).mkdir(parents=True, exist_ok=True)
        return '{"torch": "2.13.0+cpu"}' if "-c" in command.args else ""

    monkeypatch.setattr("cluster.bench.peers.environments.run_command", run)
    return commands


def test_environment_is_made_once_per_pins(
    tmp_path: Path, installing: list[tuple[str, ...]]
) -> None:
    place, peer = Environments(tmp_path), PEERS["openvino"]
    assert place.versions(peer) == {}
    assert not place.is_installed(peer)
    place.install(peer)
    assert "torch==2.13.0" in installing[1]
    assert "torchvision" in installing[2]
    assert place.is_installed(peer)
    assert place.versions(peer) == {"torch": "2.13.0+cpu"}
    newer = replace(peer, requirements=("openvino==2099.1",))
    assert not place.is_installed(newer)


def test_environment_that_was_not_finished_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: Command, log: Path, timeout_s: float) -> str:
        if "venv" in command.args:
            Path(command.args[-1]).mkdir(parents=True)
            return ""
        raise RunFailedError("no network")

    monkeypatch.setattr("cluster.bench.peers.environments.run_command", fail)
    place = Environments(tmp_path)
    with pytest.raises(RunFailedError, match="no network"):
        place.install(PEERS["vllm"])
    assert not place.is_installed(PEERS["vllm"])


def test_peer_that_cannot_be_prepared_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: Command, log: Path, timeout_s: float) -> str:
        raise RunFailedError("no network")

    def answer(command: Command, log: Path, timeout_s: float) -> str:
        return json.dumps({"result": dict.fromkeys(FIGURES, 1.0)})

    monkeypatch.setattr("cluster.bench.peers.environments.run_command", fail)
    monkeypatch.setattr("cluster.bench.peers.measuring.run_command", answer)
    measuring = Measuring(Environments(tmp_path), tmp_path, threads=2, seed=0, timeout_s=1)
    steps: list[str] = []
    measuring.prepare([ROW], steps.append)
    assert steps == ["openvino: making its environment, minutes"]
    assert measuring.measure(ROW, "sluice", 1)["ttft_s"] == 1.0
    with pytest.raises(RunFailedError, match="no network"):
        measuring.measure(ROW, "openvino", 1)


def test_answer_without_a_figure_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cluster.bench.peers.measuring.run_command", lambda *args: '{"result": {"ttft_s": 1}}'
    )
    measuring = Measuring(Environments(tmp_path), tmp_path, threads=2, seed=0, timeout_s=1)
    with pytest.raises(RunFailedError, match="gave no out_tokens_per_s"):
        measuring.measure(ROW, "sluice", 1)


def python(code: str) -> Command:
    return Command((sys.executable, "-c", code), {"PEER": "x"})


@pytest.mark.integration
def test_process_gives_its_output_and_its_log(tmp_path: Path) -> None:
    log = tmp_path / "logs/run.log"
    code = "import os, sys; print(os.environ['PEER']); print('note', file=sys.stderr)"
    assert run_command(python(code), log, timeout_s=30) == "x\n"
    assert log.read_text() == "note\n"


@pytest.mark.integration
def test_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match=r"exit status 1: ValueError: no such device"):
        run_command(python("raise ValueError('no such device')"), tmp_path / "log", timeout_s=30)


@pytest.mark.integration
def test_process_past_its_deadline_is_ended_with_its_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time, pathlib\n"
        f"made = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL)\n"
        f"pathlib.Path({str(child)!r}).write_text(str(made.pid))\n"
        "time.sleep(60)"
    )
    with pytest.raises(RunFailedError, match="more than 3 s"):
        run_command(python(code), tmp_path / "log", timeout_s=3)
    state = Path(f"/proc/{child.read_text()}/stat")
    deadline_s = time.monotonic() + 10
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline_s, "the child lives on"
        time.sleep(0.05)


@pytest.mark.integration
def test_driver_measures_a_tiny_model(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_random_model("tiny", model, dtype="float32", seed=0, tokenizer_from=DEMO_MODEL_PATH)
    row = Row("bf16", "bf16", Work(3, 16, 4), ("transformers",))
    venv = Path(sys.prefix)  # ours has transformers too
    command = peer_command(PEERS["transformers"], venv, model, row, threads=1, seed=0)
    figures = last_object(run_command(command, tmp_path / "log", timeout_s=240))
    assert set(FIGURES) < set(figures)
    assert all(value > 0 for value in figures.values())
    assert figures["out_tokens_per_s"] == pytest.approx(12 / figures["wall_s"])


@pytest.mark.integration
def test_drivers_import_nothing_of_sluice() -> None:
    code = (
        "import sys; from drivers import measurement\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'cluster'])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=DRIVERS, capture_output=True, text=True, timeout=60
    )
    assert json.loads(found.stdout) == []
