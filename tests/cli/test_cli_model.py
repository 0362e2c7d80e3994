"""`sluice model`: make one, look at it, refuse what is none."""

from __future__ import annotations

import json
from pathlib import Path

from cli_run import error_of, run


def test_random_model_can_be_inspected(tmp_path: Path) -> None:
    out = tmp_path / "model"
    made = run("model", "random", "--shape", "tiny", "--out", str(out), "--json")
    assert made.exit_code == 0, made.output
    info = run("model", "info", str(out), "--json")
    assert info.exit_code == 0, info.output
    assert json.loads(info.stdout)["num_layers"] == 2
    assert json.loads(info.stdout)["weight_bytes"] == json.loads(made.stdout)["weight_bytes"]


def test_demo_model_info_is_a_table() -> None:
    result = run("model", "info")
    assert result.exit_code == 0
    assert "2048 tokens" in result.stdout


def test_unknown_shape_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "shape='huge'" in error_of("model", "random", "--shape", "huge", "--out", str(tmp_path))


def test_folder_without_a_model_is_refused_in_one_line(tmp_path: Path) -> None:
    assert str(tmp_path) in error_of("model", "info", str(tmp_path))
