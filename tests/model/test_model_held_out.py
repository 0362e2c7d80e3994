"""The text that a model is scored on."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import DEMO_MODEL_PATH
from cluster.errors import ConfigError
from cluster.model.held_out import cut_windows, encode_texts, held_out_texts, read_text

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_demo_model.py"


def test_held_out_files_are_those_that_training_left_out() -> None:
    spec = importlib.util.spec_from_file_location("train_demo_model", SCRIPT)
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    try:
        spec.loader.exec_module(script)
        train, held_out = script.read_sources(0)
    finally:
        del sys.modules[spec.name]
    texts = held_out_texts()
    assert texts == held_out
    assert len(texts) > 5
    assert not set(texts) & {text for text in train if text}


def test_texts_are_led_by_the_first_token() -> None:
    ids, empty = encode_texts(DEMO_MODEL_PATH, ["def f():\n", ""])
    assert ids[0] == 0
    assert ids.count(0) == 1
    assert empty == [0]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer"):
        encode_texts(tmp_path, ["x"])


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=4), st.integers(2, 1500))
def test_windows_cover_every_token_once(lengths: list[int], max_model_len: int) -> None:
    texts = [list(range(10_000 * i, 10_000 * i + n)) for i, n in enumerate(lengths)]
    predicted = [token for text in texts for token in text[1:]]
    if not predicted:
        with pytest.raises(ConfigError, match="fewer than two tokens"):
            cut_windows(texts, max_model_len, 0)
        return
    windows = cut_windows(texts, max_model_len, 0)
    assert [token for window in windows for token in window[1:]] == predicted
    assert all(2 <= len(window) <= min(1024, max_model_len) + 1 for window in windows)


def test_fewer_windows_are_spread_over_the_text() -> None:
    windows = cut_windows([list(range(40_001))], 100, 4000)
    assert len(windows) == 40
    assert [window[0] for window in windows[:3]] == [0, 1000, 2000]


def test_a_text_is_utf8(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("ä\n", encoding="utf-8")
    assert read_text(file) == "ä\n"
    file.write_bytes(b"\xff\xfe\x00")
    for bad in (file, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=r"text=.*give a file of UTF-8 text") as caught:
            read_text(bad)
        assert caught.value.field == "text"
