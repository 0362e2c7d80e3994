"""Perplexity by the runner that serves, and what quantization costs the demo model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from model_fakes import generate_reference, prompts, save_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cluster.config import DEMO_MODEL_PATH, CacheConfig, ModelConfig
from cluster.errors import ConfigError
from cluster.model.evaluate import Evaluation, compare, cut_prompts, evaluate
from cluster.model.held_out import cut_windows, encode_texts, held_out_texts
from cluster.model.native_linear import why_not_native
from cluster.model.quantization.writer import quantize_checkpoint

needs_kernels = pytest.mark.skipif(bool(why_not_native()), reason=why_not_native())


def run(folder: Path, windows: Any, **options: Any) -> Evaluation:
    plan = {"prompt_tokens": 8, "num_prompts": 0, "num_continued": 6} | options
    precision = {name: plan.pop(name) for name in ("dtype", "quantization") if name in plan}
    model = ModelConfig(path=str(folder), **{"dtype": "float32"} | precision)
    return evaluate(model, CacheConfig(block_size=4), windows, **plan)


def test_score_and_continuations_are_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.model.evaluate.CHUNK_TOKENS", 7)  # windows take several steps
    folder = save_model("mistral", tmp_path)
    windows = [prompt for prompt in prompts() if len(prompt) > 1]
    seen: list[tuple[int, int]] = []
    result = run(folder, windows, num_prompts=3, on_progress=lambda *at: seen.append(at))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    nats, choices = 0.0, []
    for window in windows:
        tokens = torch.tensor([window])
        with torch.inference_mode():
            logits_TV = model(tokens[:, :-1]).logits[0]
        nats += float(torch.nn.functional.cross_entropy(logits_TV, tokens[0, 1:], reduction="sum"))
        choices.append(logits_TV.argmax(-1))
    assert result.num_tokens == sum(len(window) - 1 for window in windows)
    assert result.nats == pytest.approx(nats, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / result.num_tokens), rel=1e-5)
    assert torch.equal(result.choices_T, torch.cat(choices))
    pieces = cut_prompts(windows, 8, 3)
    assert len(pieces) == 3
    assert result.continuations == [generate_reference(folder, piece, 6) for piece in pieces]
    assert seen[-1] == (result.num_tokens, result.num_tokens)


def test_agreement_counts_what_is_equal() -> None:
    ours = Evaluation(4.0, torch.tensor([1, 2, 3, 4]), [[1, 2, 3], [4, 5, 6]])
    theirs = Evaluation(8.0, torch.tensor([1, 2, 3, 5]), [[1, 2, 3], [4, 9, 6]])
    agreement = compare(ours, theirs)
    assert agreement.perplexity_ratio == pytest.approx(math.exp(1) / math.exp(2))
    assert (agreement.choices, agreement.continuations) == (0.75, 0.5)
    assert agreement.continued_tokens == pytest.approx(4 / 6)
    alone = compare(Evaluation(1.0, torch.tensor([1]), []), Evaluation(1.0, torch.tensor([1]), []))
    assert math.isnan(alone.continuations)


def test_prompts_are_spread_over_the_windows() -> None:
    windows = [list(range(0, 10)), list(range(10, 13)), list(range(20, 32))]
    assert cut_prompts(windows, 4, 9) == [
        (0, 1, 2, 3),
        (4, 5, 6, 7),
        (20, 21, 22, 23),
        (24, 25, 26, 27),
        (28, 29, 30, 31),
    ]
    assert cut_prompts(windows, 4, 2) == [(0, 1, 2, 3), (20, 21, 22, 23)]
    assert cut_prompts(windows, 4, 0) == []


@pytest.mark.parametrize("scheme", ["none", pytest.param("int8", marks=needs_kernels)])
def test_damaged_weights_are_an_error(scheme: str, tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ConfigError, match="probabilities are no numbers"):
        run(folder, prompts()[1:], quantization=scheme)


@pytest.fixture(scope="module")
def demo() -> tuple[list[tuple[int, ...]], Evaluation]:
    """Return windows of held-out text, and what the demo model makes of them in bfloat16."""
    texts = encode_texts(DEMO_MODEL_PATH, held_out_texts())
    windows = cut_windows(texts, 512, 1500)
    return windows, run(DEMO_MODEL_PATH, windows, dtype="bfloat16")


@needs_kernels
@pytest.mark.parametrize(
    ("scheme", "limit", "choices"), [("int8", 1.01, 0.95), ("int4", 1.05, 0.9)]
)
def test_quantization_costs_the_demo_model_little(
    scheme: str,
    limit: float,
    choices: float,
    demo: tuple[list[tuple[int, ...]], Evaluation],
    tmp_path: Path,
) -> None:
    windows, theirs = demo
    quantize_checkpoint(DEMO_MODEL_PATH, tmp_path / "out", scheme, 32)
    agreement = compare(run(tmp_path / "out", windows, dtype="bfloat16"), theirs)
    assert 0.98 < agreement.perplexity_ratio < limit
    assert choices < agreement.choices < 1, "equal everywhere: nothing was quantized"
