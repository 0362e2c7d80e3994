"""The training of the demo model, small: schedule, batches, going on where it stopped."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from rich.console import Console

from scripts import train_demo_model
from scripts.train_demo_model import Recipe, Trainer

TINY = Recipe(
    steps=3, seed=0, extension_steps=2, batch_tokens=128, seq_tokens=32, long_seq_tokens=64
)


@pytest.fixture(autouse=True)
def small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [inspect.getsource(textwrap), inspect.getsource(inspect)]
    monkeypatch.setattr(train_demo_model, "read_sources", lambda seed: (texts, texts[:1]))
    torch.set_num_threads(1)


def make(folder: Path, recipe: Recipe = TINY) -> Trainer:
    return Trainer(recipe, folder / "out", folder / "checkpoint", Console(quiet=True))


def test_rate_rises_falls_to_zero_and_does_so_again() -> None:
    recipe = Recipe(steps=1000, seed=0)
    assert recipe.lr(0) < recipe.lr(50) < recipe.lr(99) == pytest.approx(recipe.peak_lr)
    assert recipe.lr(500) > recipe.lr(900) > recipe.lr(999)
    assert recipe.lr(999) < 1e-4 * recipe.peak_lr
    assert recipe.lr(1000) == pytest.approx(recipe.extension_lr)
    assert recipe.lr(recipe.total_steps - 1) < 1e-3 * recipe.extension_lr


def test_batches_follow_from_seed_and_step_alone() -> None:
    recipe, stream = Recipe(steps=100, seed=3), np.arange(100_000)
    assert torch.equal(recipe.batch(stream, 7), recipe.batch(stream, 7))
    assert not torch.equal(recipe.batch(stream, 7), recipe.batch(stream, 8))
    assert recipe.batch(stream, 7).shape == (8, 513)
    assert recipe.batch(stream, 95).shape == (2, 2049)
    assert [recipe.batch(stream, step).shape[1] for step in (100, 101)] == [2049, 513]


def test_stopped_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole")
    for _ in range(4):
        whole.train_step()
    first = make(tmp_path / "parts")
    for _ in range(2):
        first.train_step()
    first.save()
    second = make(tmp_path / "parts")
    assert second.step == 2
    for _ in range(2):
        second.train_step()
    expected = whole.model.state_dict()
    for name, tensor in second.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.save()
    with pytest.raises(typer.BadParameter, match="checkpoint-dir"):
        make(tmp_path, Recipe(steps=4, seed=0, batch_tokens=128, seq_tokens=32))
