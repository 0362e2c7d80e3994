"""`sluice model quantize` and `sluice model eval`, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_run import error_of, run

from cluster.config import DEMO_MODEL_PATH

TEXT = "import os\n\n\ndef main(path):\n    return os.path.join(path, 'x')\n" * 12


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.py"
    file.write_text(TEXT)
    return str(file)


def test_a_model_is_quantized_inspected_and_compared(tmp_path: Path, text: str) -> None:
    out = str(tmp_path / "out")
    made = run(
        *("model", "quantize", "demo", out, "--scheme", "int4", "--group-size", "32", "--json")
    )
    assert made.exit_code == 0, made.output
    report = json.loads(made.stdout)
    assert report["path"] == out
    assert (report["scheme"], report["group_size"]) == ("int4", 32)
    assert report["weight_bytes"] < 0.5 * report["source_bytes"]
    info = run("model", "info", out)
    assert "int4 in groups of 32" in info.stdout
    command = ("model", "eval", out, "--text", text, "--against", "demo", "--prompts", "2")
    scored = run(*command, "--continue-tokens", "3", "--json")
    assert scored.exit_code == 0, scored.output
    figures = json.loads(scored.stdout)
    assert (figures["quantization"], figures["dtype"]) == ("int4", "bfloat16")
    assert figures["num_tokens"] == figures["against"]["num_tokens"] > 100
    ratio = figures["perplexity"] / figures["against"]["perplexity"]
    assert figures["against"]["perplexity_ratio"] == pytest.approx(ratio)
    assert 0.5 < figures["against"]["choices"] < 1
    table = run(*command, "--continue-tokens", "3")
    assert "perplexity ratio" in table.stdout
    assert "equal greedy continuations" in table.stdout


def test_a_model_alone_has_no_comparison(text: str) -> None:
    scored = run("model", "eval", "--text", text, "--json")
    assert scored.exit_code == 0, scored.output
    figures = json.loads(scored.stdout)
    assert figures["model"] == str(DEMO_MODEL_PATH)
    assert "against" not in figures
    assert 1 < figures["perplexity"] < 500
    assert "against" not in run("model", "eval", "--text", text).stdout


def test_quantize_refuses_in_one_line(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert "use 32" in error_of("model", "quantize", "demo", out, "--scheme", "int4")
    assert "scheme=fp8" in error_of("model", "quantize", "demo", out, "--scheme", "fp8")
    nowhere = str(tmp_path / "nowhere")
    assert nowhere in error_of("model", "quantize", nowhere, out, "--scheme", "int8")
    assert "not empty" in error_of(
        "model", "quantize", "demo", str(tmp_path.parent), "--scheme", "int8"
    )
    assert not Path(out).exists()


def test_eval_refuses_in_one_line(tmp_path: Path, text: str) -> None:
    several = error_of("model", "eval", "--set", "parallel.tp=2", "--text", text)
    assert "leave both at 1" in several
    assert "text=" in error_of("model", "eval", "--text", str(tmp_path / "missing.txt"))
    out = str(tmp_path / "out")
    assert run("model", "quantize", "demo", out, "--scheme", "int8").exit_code == 0
    message = error_of("model", "eval", out, "--text", text, "--against", "bf16")
    assert "is quantized itself" in message
    setting = ("--set", "model.quantization=int8")
    assert "int8 already" in error_of("model", "eval", out, "--text", text, *setting)
