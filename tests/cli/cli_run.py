"""Run the command in this process."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from cluster.cli.app import app


def run(*arguments: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, arguments, input=stdin, prog_name="sluice")


def error_of(*arguments: str) -> str:
    """Return the one line that a wrong command line or configuration leads to."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("sluice: ")
    return lines[0]
