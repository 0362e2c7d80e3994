"""The command as a whole: quick help, exit statuses, one line per error."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cli_run import error_of, run

HEAVY = ("torch", "ray", "transformers", "grpc", "numpy", "matplotlib")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from cluster.cli.app import app; "
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["serve", "generate", "status", "config", "model", "bench"])
def test_every_command_has_help(command: str) -> None:
    assert run(command, "--help").exit_code == 0


def test_unknown_option_is_a_usage_error() -> None:
    assert run("status", "--nonsense").exit_code == 2


def test_bench_needs_exactly_one_kind_of_load() -> None:
    assert "exactly one" in error_of("bench", "serve")
    assert "exactly one" in error_of("bench", "serve", "--rate", "1", "--concurrency", "1")


def test_keyboard_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: object, overrides: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cluster.cli.config.load_config", interrupted)
    assert run("config").exit_code == 130
