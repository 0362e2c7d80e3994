from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError
from cluster.simulator.cost_model import from_hardware, from_rates, read_cost
from cluster.types import StepShape

FITTED: dict[str, Any] = {
    "cost": asdict(from_rates(prefill_tokens_per_s=9000, decode_step_s=0.03).step),
    "overhead_s": 0.002,
    "model": "demo",
    "machine": "a desk",
    "steps": [[1, 1, 100, 0.0, 0.03], [512, 1, 0, 131072.0, 0.08]],
}


def _seconds(num_tokens: int) -> float:
    cost = from_rates(prefill_tokens_per_s=9000, decode_step_s=0.03).step
    return cost.seconds(StepShape(num_tokens, 1))


def test_cost_of_two_rates_is_the_slower_of_both() -> None:
    assert _seconds(1) == _seconds(270) == 0.03  # what the rate allows in the time of a step
    assert _seconds(9000) == pytest.approx(1.0)
    assert _seconds(18_000) == pytest.approx(2.0)


def test_cost_of_hardware_is_at_first_memory_then_arithmetic() -> None:
    model = from_hardware("h100", num_parameters=8e9, kv_bytes_per_token=131072, num_devices=2)
    floor_s = 16e9 / (0.6 * 2 * 3.35e12)
    token_s = 16e9 / (0.6 * 2 * 989e12)
    assert model.step.seconds(StepShape(1, 1)) == pytest.approx(floor_s)
    assert model.step.seconds(StepShape(8192, 1)) == pytest.approx(8192 * token_s, rel=1e-3)
    # A decode reads the keys and values of its context once.
    read_s = model.step.seconds(StepShape(1, 1, 100_000)) - floor_s
    assert read_s == pytest.approx(100_000 * 131072 / (0.6 * 2 * 3.35e12))
    assert model.source.startswith("estimate: 2 x H100")


def test_cost_of_hardware_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="hardware='tpu', known: a100, h100"):
        from_hardware("tpu", num_parameters=8e9, kv_bytes_per_token=1, num_devices=1)


def test_cost_is_read_as_it_was_fitted(tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(FITTED))
    model = read_cost(path)
    assert asdict(model.step) == FITTED["cost"]
    assert model.overhead_s == 0.002
    assert model.steps == ((1, 1, 100, 0.0, 0.03), (512, 1, 0, 131072.0, 0.08))
    assert model.source == "measured: demo on a desk"


def test_cost_may_go_without_steps_and_overhead(tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    path.write_text(json.dumps({"cost": FITTED["cost"]}))
    model = read_cost(path)
    assert (model.steps, model.overhead_s) == ((), 0.0)


def _changed(**changes: Any) -> str:
    return json.dumps({**FITTED, "cost": {**FITTED["cost"], **changes}})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"cost": 3}',
        b'{"cost": {"floor_s": 1.0}}',
        _changed(hinges=5).encode(),
        _changed(hinges=[[1]]).encode(),
        _changed(hinges=[["many", 1.0]]).encode(),
        _changed(colour="red").encode(),
        json.dumps({**FITTED, "overhead_s": "long"}).encode(),
        json.dumps({**FITTED, "steps": [["one"]]}).encode(),
        json.dumps({**FITTED, "steps": 7}).encode(),
    ],
)
def test_cost_of_a_broken_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_cost(path)
    assert caught.value.field == "cost_model"
    assert str(path) in str(caught.value)
    assert "sluice bench engine --fit" in str(caught.value)


def test_cost_of_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.json"):
        with pytest.raises(ConfigError, match="give a file that"):
            read_cost(path)


@pytest.mark.parametrize(
    "change",
    [
        {"cost": {**FITTED["cost"], "floor_s": -1.0}},
        {"cost": {**FITTED["cost"], "token_s": float("nan")}},
        {"cost": {**FITTED["cost"], "floor_s": "a"}},
        {"steps": [[1, 1, 100, 0.0]]},
        {"steps": [[1, 1, 100, 0.0, -0.03]]},
    ],
)
def test_cost_that_time_cannot_be_made_of_is_refused(change: dict, tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(FITTED | change))
    with pytest.raises(ConfigError, match="sluice bench engine --fit"):
        read_cost(path)
