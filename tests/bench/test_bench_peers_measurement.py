"""What a driver measures, with an engine whose time is made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.bench.peers.drivers import measurement
from cluster.bench.peers.drivers.measurement import Arguments, Generate, Prompts, measure

PREFILL_S, DECODE_S, LOAD_S = 0.5, 0.04, 3.0


@pytest.fixture
def arguments(tmp_path: Path) -> Arguments:
    config = {
        "vocab_size": 1000,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_hidden_layers": 24,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return Arguments(tmp_path, requests=4, input_len=64, output_len=16, threads=2, seed=7)


class Engine:
    """Takes half a second for a prompt and 40 ms for each further token.

    A batch or a prompt of a size that it has not seen yet costs a minute more.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self.prompts: list[list[int]] = []
        self.lost_tokens = 0
        self.seen: set[tuple[str, int]] = set()

    def load(self, arguments: Arguments) -> Generate:
        self.now_s += LOAD_S
        return self.generate

    def generate(self, prompts: list[list[int]], output_len: int) -> list[int]:
        self.prompts += prompts
        shapes = {("requests", len(prompts)), ("input", len(prompts[0]))}
        self.now_s += 60.0 * len(shapes - self.seen)
        self.seen |= shapes
        self.now_s += PREFILL_S * len(prompts) + DECODE_S * (output_len - 1)
        return [output_len - self.lost_tokens] * len(prompts)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine()
    monkeypatch.setattr(measurement.time, "perf_counter", lambda: made.now_s)
    return made


def test_figures_leave_out_loading_and_the_first_run_of_each_shape(
    engine: Engine, arguments: Arguments
) -> None:
    figures = measure(engine.load, arguments)
    wall_s = 4 * PREFILL_S + 15 * DECODE_S
    assert figures["load_s"] == pytest.approx(LOAD_S)
    assert figures["wall_s"] == pytest.approx(wall_s)
    assert figures["out_tokens_per_s"] == pytest.approx(64 / wall_s)
    assert figures["total_tokens_per_s"] == pytest.approx(4 * 80 / wall_s)
    assert figures["ttft_s"] == pytest.approx(PREFILL_S)
    assert figures["single_stream_tokens_per_s"] == pytest.approx(1 / DECODE_S)
    assert figures["peak_rss_bytes"] > 2**20


def test_no_prompt_comes_twice(engine: Engine, arguments: Arguments) -> None:
    measure(engine.load, arguments)
    assert len({tuple(prompt) for prompt in engine.prompts}) == len(engine.prompts)
    assert {len(prompt) for prompt in engine.prompts} == {32, 64}


def test_prompts_follow_from_the_seed(arguments: Arguments) -> None:
    first, second = Prompts(arguments).draw(2), Prompts(arguments).draw(2)
    assert first == second
    assert all(0 < token < 1000 for prompt in first for token in prompt)


def test_answer_that_ends_early_is_an_error(engine: Engine, arguments: Arguments) -> None:
    engine.lost_tokens = 1
    with pytest.raises(RuntimeError, match="asked for 16 tokens per prompt"):
        measure(engine.load, arguments)


def test_kv_size_is_that_of_keys_and_values(arguments: Arguments) -> None:
    assert measurement.kv_bytes_per_token(arguments.model) == 12_288
