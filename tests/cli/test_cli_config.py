"""`sluice config`, and what becomes of a wrong configuration: one line, exit status 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_run import error_of, run

from cluster.cli.config import list_knobs
from cluster.config import load_config


def test_config_lists_every_knob_with_a_meaning() -> None:
    knobs = list(list_knobs(load_config()))
    assert {"model.path", "cache.block_size", "replica.autoscaling"} <= {k.path for k in knobs}
    assert [knob.path for knob in knobs if not knob.description] == []
    assert not any(knob.is_changed for knob in knobs)


def test_config_json_has_value_default_and_range(tmp_path: Path) -> None:
    file = tmp_path / "sluice.yaml"
    file.write_text("cache: {block_size: 32}\n")
    result = run("config", "--config", str(file), "--set", "parallel.tp=2", "--json")
    assert result.exit_code == 0
    knobs = json.loads(result.stdout)
    assert knobs["cache.block_size"]["value"] == 32
    assert knobs["cache.block_size"]["default"] == 16
    assert knobs["cache.block_size"]["allowed"] == ">= 1, <= 512"
    assert knobs["parallel.tp"]["value"] == 2
    assert knobs["model.device"]["allowed"] == "cpu | cuda"


def test_config_shows_the_knobs_of_a_section_that_is_switched_on() -> None:
    result = run("config", "--set", "replica.autoscaling.max_replicas=3", "--json")
    knobs = json.loads(result.stdout)
    assert knobs["replica.autoscaling.max_replicas"]["value"] == 3
    assert knobs["replica.autoscaling.max_replicas"]["default"] == 1


def test_config_table_names_changed_values() -> None:
    result = run("config", "--set", "gateway.port=9123")
    assert result.exit_code == 0
    assert "9123" in result.stdout


@pytest.mark.parametrize("command", ["config", "serve"])
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("cache.blocksize=4", "cache.blocksize: unknown key; known here: block_size"),
        ("cache.block_size=0", "cache.block_size=0"),
        ("cache.block_size=many", "cache.block_size='many'"),
        ("cache.block_size", "expected a.b=value"),
        ("model.path.name=1", "model.path={'name': 1}"),
    ],
)
def test_command_refuses_a_wrong_override_in_one_line(
    command: str, override: str, expected: str
) -> None:
    assert expected in error_of(command, "--set", override)


@pytest.mark.parametrize("content", ["a: [1", "- 1", "nonsense: 3"])
def test_command_refuses_a_wrong_file_in_one_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / "sluice.yaml"
    file.write_text(content)
    error_of("config", "--config", str(file))


def test_command_refuses_a_missing_file_in_one_line(tmp_path: Path) -> None:
    assert "nowhere.yaml" in error_of("config", "--config", str(tmp_path / "nowhere.yaml"))
