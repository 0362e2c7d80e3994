"""Text to tokens, and tokens to text as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from cluster.config import ModelConfig
from cluster.errors import ConfigError

_INLINE_CHARS = 4096  # up to here encoding (1 us per char) is cheaper than a thread's hand-over
_MAX_WINDOW_TOKENS = 64  # a detokenizer's window is cut at this length
_KEPT_TOKENS = 16  # and keeps these
_MAX_CHAR_TOKENS = 4  # a character has at most so many bytes, each at most one token
_REPLACEMENT = "\ufffd"


class Tokenizer:
    """The model's tokenizer.

    Args:
        backend: A `tokenizers.Tokenizer`; never changed after this, so threads may share it.
        vocab_size: Rows of the embedding: a token id is below this.
        max_model_len: Tokens, prompt and answer together.
    """

    def __init__(self, backend: Any, *, vocab_size: int, max_model_len: int) -> None:
        self._backend = backend
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len

    @classmethod
    def load(cls, config: ModelConfig) -> Tokenizer:
        """Read the tokenizer of a checkpoint.

        Raises:
            ConfigError: The folder holds no checkpoint, or none with a fast tokenizer.
        """
        try:
            backend = AutoTokenizer.from_pretrained(config.folder).backend_tokenizer
            text_config = AutoConfig.from_pretrained(config.folder).get_text_config()
        except (OSError, ValueError, KeyError, AttributeError) as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"model.path={config.path}: no tokenizer that transformers can load as a fast one "
                f"({reason}): give a folder with config.json and tokenizer.json",
                field="model.path",
            ) from error
        max_model_len = config.max_model_len or text_config.max_position_embeddings
        return cls(backend, vocab_size=text_config.vocab_size, max_model_len=max_model_len)

    async def encode(self, text: str, *, continues: bool = False) -> tuple[int, ...]:
        """Return the token ids of a text, with what the model expects around it.

        Long texts are encoded in a thread, so that no stream waits for them.

        Args:
            text: Any.
            continues: It follows other tokens, so the model expects nothing around it.
        """
        if len(text) <= _INLINE_CHARS:
            return self._encode(text, continues)
        return await asyncio.to_thread(self._encode, text, continues)

    def _encode(self, text: str, continues: bool) -> tuple[int, ...]:
        return tuple(self._backend.encode(text, add_special_tokens=not continues).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones left out."""
        return str(self._backend.decode(token_ids, skip_special_tokens=True))

    def token_text(self, token_id: int) -> str:
        """Return the text of one token, special ones too."""
        return str(self._backend.decode([token_id], skip_special_tokens=False))


class Detokenizer:
    """Text of a growing sequence of tokens, never half a character.

    A token's text depends on its neighbours, so a window of the last tokens is decoded anew with
    each one:

                       |<---------------- window ----------------->|
        forgotten      |  tokens before `clean`  |  tokens after   |
        tokens         |<------- num_sent characters ------>| held |

    Held back are replacement characters at the end, which the next token may complete. At a clean
    point nothing is held, and the tokens before the last clean point can be forgotten.

    What is out after so many tokens does not depend on how they were cut into calls, so that
    another gateway goes on with the same text: several tokens are taken at once only where that
    ends at a clean point, and one by one elsewhere.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._clean = 0  # index in the window of the last clean point
        self._num_sent = 0  # characters of the window's text that are out

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens; return the text that they complete."""
        if len(token_ids) == 1:
            return self._push_one(token_ids[0])
        window = self._window
        if len(window) - self._clean + len(token_ids) <= _MAX_WINDOW_TOKENS:
            text = self._tokenizer.decode([*window, *token_ids])
            if len(text) > self._num_sent and not text.endswith(_REPLACEMENT):
                window.extend(token_ids)
                return self._send(text, len(text))
        return "".join([self._push_one(token_id) for token_id in token_ids])

    def _push_one(self, token_id: int) -> str:
        window = self._window
        window.append(token_id)
        text = self._tokenizer.decode(window)
        new = self._send(text, len(text.rstrip(_REPLACEMENT)))
        if len(window) - self._clean > _MAX_WINDOW_TOKENS:  # for long no clean point: hardly text
            num_free = max(self._num_sent, len(text) - _MAX_CHAR_TOKENS)
            new += text[self._num_sent : num_free]
            self._forget(len(window) - _KEPT_TOKENS, num_held=len(text) - num_free)
        return new

    def _send(self, text: str, num_stable: int) -> str:
        """Return what is new of the window's text up to `num_stable` characters."""
        new = text[self._num_sent : num_stable]
        if new:
            self._num_sent = num_stable
            if num_stable == len(text):
                self._mark_clean()
        return new

    def flush(self) -> str:
        """Return what is held back; call it once, at the end."""
        return self._tokenizer.decode(self._window)[self._num_sent :] if self._window else ""

    def _mark_clean(self) -> None:
        if len(self._window) >= _KEPT_TOKENS:
            self._forget(self._clean, num_held=0)
        self._clean = len(self._window)

    def _forget(self, num_tokens: int, *, num_held: int) -> None:
        del self._window[:num_tokens]
        self._clean = 0
        self._num_sent = max(0, len(self._tokenizer.decode(self._window)) - num_held)
