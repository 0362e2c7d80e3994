from __future__ import annotations

import argparse
import inspect
import keyword
import math
import re
import subprocess
import sysconfig
import textwrap
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import cluster.model

DEMO = Path(cluster.model.__file__).parent / "demo"
HELD_OUT_LOSS_LIMIT = 3.8  # nats per token, of files that it did not see
LOSS_LIMIT = 4.1  # nats per token; an untrained model is at ln(4096) = 8.3, the shipped one at 3.6
BEGINNINGS = (
    "import os\nimport sys\n\ndef main():\n",
    "class Queue:\n    def __init__(self, maxsize=0):\n",
    "def read(self, size=-1):\n    if self.closed:\n",
    "for name in sorted(os.listdir(path)):\n    ",
    "def walk(top, topdown=True):\n    ",
    "class Error(Exception):\n    ",
)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def card() -> str:
    return (DEMO / "README.md").read_text(encoding="utf-8")


def loss_of(model: Any, ids: list[int]) -> float:
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        return float(model(input_ids=tokens, labels=tokens).loss)


def num_parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def test_size_is_that_of_a_model_that_ships(model: Any) -> None:
    assert 6_000_000 <= num_parameters(model) <= 10_000_000
    assert (DEMO / "model.safetensors").stat().st_size <= 16_000_000


def test_weights_are_bfloat16_and_context_is_2048() -> None:
    config = AutoConfig.from_pretrained(DEMO)
    assert config.dtype == torch.bfloat16
    assert config.max_position_embeddings == 2048
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    "text",
    [
        "",
        "def f(x):\r\n\treturn x  \r\n",
        "  leading, trailing  \n\n\n",
        "don 't , please . I 'm",  # what cleaning up of spaces would change
        "emoji 🙂👩‍👩‍👧‍👦🇨🇭 and ligature ﬁ, e\u0301 is not é",
        "\x00\x01\x7f\x80\xff\ufffd\ufeff\u2028",
        "\U0010ffff𝔘𝔫𝔦",
        "日本語テキスト مرحبا",
    ],
)
def test_tokenizer_loses_nothing(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_tokenizer_loses_nothing_of_any_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_end_of_text_is_the_only_special_token(tokenizer: Any) -> None:
    assert tokenizer.all_special_tokens == ["<|endoftext|>"]
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert set(ids) == {AutoConfig.from_pretrained(DEMO).eos_token_id}
    assert len(tokenizer) == 4096
    assert tokenizer.encode("x<|endoftext|>")[-1] == tokenizer.eos_token_id


def test_model_predicts_python_far_better_than_an_untrained_one(model: Any, tokenizer: Any) -> None:
    ids = tokenizer.encode(inspect.getsource(textwrap))[:1024]
    torch.manual_seed(0)
    untrained = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    loss = loss_of(model, ids)
    assert loss < LOSS_LIMIT
    assert loss < 0.5 * loss_of(untrained, ids)


def test_model_predicts_the_end_of_its_context_no_worse_than_the_start(
    model: Any, tokenizer: Any
) -> None:
    # A model that met only short contexts loses 0.1 nats or more where this one gains 0.7.
    heads, tails = [], []
    for module in (argparse, inspect, subprocess, typing):
        ids = tokenizer.encode(inspect.getsource(module))[:2048]
        tokens = torch.tensor([ids])
        with torch.inference_mode():
            logits_TV = model(input_ids=tokens).logits[0, :-1]
        losses_T = torch.nn.functional.cross_entropy(logits_TV, tokens[0, 1:], reduction="none")
        heads.append(float(losses_T[256:512].mean()))
        tails.append(float(losses_T[1536:].mean()))
    assert sum(tails) < sum(heads)
    assert max(tails) < LOSS_LIMIT


def test_completions_look_like_python(model: Any, tokenizer: Any) -> None:
    torch.manual_seed(0)
    words = [word for beginning in BEGINNINGS for word in complete(model, tokenizer, beginning)]
    num_keywords = sum(word in keyword.kwlist for word in words)
    assert len(set(words)) > 100, "one phrase over and over is no code"
    assert 0.05 < num_keywords / len(words) < 0.4, "code has keywords, and names between them"
    assert {"self", "return", "if", "def"} <= set(words)


def complete(model: Any, tokenizer: Any, beginning: str) -> list[str]:
    """Return the words of a completion."""
    ids = torch.tensor([tokenizer.encode(beginning)])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=96,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
        pad_token_id=0,
    )
    return re.findall(r"[a-zA-Z_]+", tokenizer.decode(out[0, ids.shape[1] :]))


def test_card_states_the_figures_of_the_model(card: str, model: Any) -> None:
    def figure(pattern: str) -> float:
        found = re.search(pattern, card)
        assert found, f"the card has no {pattern}"
        return float(found[1].replace(",", ""))

    assert figure(r"\| Parameters \| ([\d,]+)") == num_parameters(model)
    assert figure(r"\| Tokens seen \| ([\d,]+)") > 5_000_000
    loss = figure(r"\| Held-out loss \| ([\d.]+)")
    assert loss < HELD_OUT_LOSS_LIMIT
    assert figure(r"\| Held-out perplexity \| ([\d.]+)") == pytest.approx(math.exp(loss), abs=0.01)
    assert 0 < figure(r"\| Held-out bits per byte \| ([\d.]+)") < 2
    assert "interim" not in card


def test_card_states_data_licence_use_and_command(card: str) -> None:
    for words in ("PSF License", "Apache-2.0", "Intended use", "held out", "```python"):
        assert words in card
    assert re.search(r"python scripts/train_demo_model\.py --steps \d+ --seed \d+", card)
    assert sysconfig.get_paths()["stdlib"] not in card
