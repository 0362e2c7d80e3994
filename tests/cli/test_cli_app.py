"""The command as a whole: quick help, exit statuses, one line per error."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import typer
from cli_run import error_of, run

HEAVY = ("torch", "ray", "transformers", "grpc", "numpy", "matplotlib")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from cluster.cli.app import app; "
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_commands_switch_the_fork_handlers_of_grpc_off() -> None:
    code = (
        "import os, sys; from cluster.cli.app import main; sys.argv[1:] = ['config']\n"
        "try: main()\n"
        "finally: print(os.environ['GRPC_ENABLE_FORK_SUPPORT'])"
    )
    environment = {name: os.environ[name] for name in os.environ if not name.startswith("GRPC_")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.splitlines()[-1] == "0"


COMMANDS = ["serve", "generate", "status", "drain", "config", "prefix", "cache", "model", "bench"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    assert run(command, "--help").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["status", "--nonsense"], "--nonsense; see `sluice status --help`"),
        (["nonsense"], "'nonsense'; see `sluice --help`"),
        (["bench", "serve", "--rate", "fast"], "'--rate'"),
        (["generate", "x", "--top-k", "-1"], "'--top-k'"),
        (["generate"], "no prompt"),
        (["drain"], "replica"),
        (["model", "random", "--shape", "tiny"], "'--out'"),
        (["bench", "serve", "--rate", "1", "--cert-file", "c"], "--key-file=None"),
        (["status", "--key-file", "k"], "--cert-file=None"),
        (["status", "--cert-file", "c", "--key-file", "k"], "without --ca-file"),
        (["status", "--api-key-file", "/none"], "--api-key-file=/none: No such file"),
        (["prefix", "add", "a"], "exactly one of TEXT, --file and --token-ids"),
        (["prefix", "add", "a", "x", "--token-ids", "1"], "exactly one of"),
        (["prefix", "add", "a", "--token-ids", "1,x"], "--token-ids=1,x"),
        (["prefix", "add", "a", "x", "--file", "f"], "TEXT and --file"),
        (["prefix", "add", "a", "--file", "/none"], "--file=/none: No such file"),
        (["cache", "flush"], "--replicas, --store or both"),
        (["cache", "inspect"], "TEXT, --file or --prefix"),
    ],
)
def test_wrong_arguments_lead_to_one_line(arguments: list[str], expected: str) -> None:
    assert expected in error_of(*arguments)


@pytest.mark.parametrize("arguments", [[], ["bench"], ["model"], ["prefix"], ["cache"]])
def test_group_without_a_command_prints_its_help(arguments: list[str]) -> None:
    result = run(*arguments)
    assert "Usage: sluice" in result.stdout
    assert not result.stderr


def test_bench_needs_exactly_one_kind_of_load() -> None:
    assert "exactly one" in error_of("bench", "serve")
    assert "exactly one" in error_of("bench", "serve", "--rate", "1", "--concurrency", "1")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, typer.Abort])
def test_interruption_exits_with_130(
    monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]
) -> None:
    def interrupted(path: object, overrides: object) -> None:
        raise interruption

    monkeypatch.setattr("cluster.cli.config.load_config", interrupted)
    result = run("config")
    assert result.exit_code == 130
    assert result.output == "sluice: interrupted\n"
