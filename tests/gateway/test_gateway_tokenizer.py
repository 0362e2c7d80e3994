from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

from cluster.config import ModelConfig, parse_config
from cluster.errors import ConfigError
from cluster.gateway.tokenizer import Detokenizer, Tokenizer

TOKENIZER = Tokenizer.load(ModelConfig())
_pieces = st.lists(
    st.sampled_from(["a", " def", "é", "世", "👍", "\ufffd", "\n", "👩‍👩‍👧"]) | st.text(max_size=3),
    max_size=30,
)


def _pushed(groups: list[list[int]]) -> list[str]:
    detokenizer = Detokenizer(TOKENIZER)
    texts = [detokenizer.push(group) for group in groups]
    return [*texts, detokenizer.flush()]


@given(_pieces)
def test_any_text_comes_out_whole_and_in_whole_characters(pieces: list[str]) -> None:
    text = "".join(pieces)
    texts = _pushed([[token] for token in TOKENIZER._encode(text, continues=False)])
    assert "".join(texts) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in texts)


@given(st.lists(st.lists(st.integers(0, 4095), max_size=6), max_size=40))
def test_any_tokens_give_the_text_of_all_of_them(groups: list[list[int]]) -> None:
    assert "".join(_pushed(groups)) == TOKENIZER.decode([t for group in groups for t in group])


_BYTES = [token for token in range(4096) if "\ufffd" in TOKENIZER.token_text(token)]


@pytest.mark.parametrize("share", [0.3, 0.9, 1.0])  # of bytes that are no text alone
@pytest.mark.parametrize("seed", range(60))
def test_text_after_so_many_tokens_does_not_depend_on_how_they_came(
    seed: int, share: float
) -> None:
    rng = random.Random(seed)
    token_ids = [
        rng.choice(_BYTES) if rng.random() < share else rng.randrange(4096) for _ in range(200)
    ]
    sizes = [rng.choice((1, 2, 3, 12, 100)) for _ in range(200)]
    one_by_one, texts, text = Detokenizer(TOKENIZER), [""], ""
    for token_id in token_ids:
        text += one_by_one.push([token_id])
        texts.append(text)
    pushed, start, text = Detokenizer(TOKENIZER), 0, ""
    for size in itertools.cycle(sizes):
        text += pushed.push(token_ids[start : start + size])
        start = min(start + size, len(token_ids))
        assert text == texts[start]
        if start == len(token_ids):
            break
    assert pushed.flush() == one_by_one.flush()


@pytest.mark.parametrize("num_bad", [61, 62, 63, 64, 200])  # the window is cut at 65
@pytest.mark.parametrize("tail", [0, 3])
def test_bytes_that_are_no_text_do_not_grow_the_window(num_bad: int, tail: int) -> None:
    emoji = list(TOKENIZER._encode("👍", continues=False))  # one byte per token
    tokens = emoji[:1] * num_bad + emoji + emoji[:tail]
    detokenizer = Detokenizer(TOKENIZER)
    text = ""
    for token in tokens:
        text += detokenizer.push([token])
        assert len(detokenizer._window) <= 130  # as much before a clean point as behind it
    assert text + detokenizer.flush() == TOKENIZER.decode(tokens)
    assert "👍" in text


def test_long_texts_are_encoded_like_short_ones() -> None:
    text = "x = 1\n" * 1000
    assert asyncio.run(TOKENIZER.encode(text)) == TOKENIZER._encode(text, continues=False)


def test_special_tokens_have_no_text_in_an_answer() -> None:
    assert TOKENIZER.decode([65, 0, 66]) == "ab"
    assert TOKENIZER.token_text(0) == "<|endoftext|>"


def test_folder_without_tokenizer_is_a_config_error(tmp_path: Path) -> None:
    config = parse_config({"model": {"path": str(tmp_path)}}).model
    with pytest.raises(ConfigError, match=r"model\.path=") as caught:
        Tokenizer.load(config)
    assert caught.value.field == "model.path"
    assert "\n" not in str(caught.value)


async def test_text_that_continues_another_has_no_beginning_of_its_own() -> None:
    backend = Backend(WordLevel({"<s>": 0, "x": 1}, unk_token="<s>"))
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = Tokenizer(backend, vocab_size=2, max_model_len=8)
    assert await tokenizer.encode("x") == (0, 1)
    assert await tokenizer.encode("x", continues=True) == (1,)
