"""Text that the demo model has not seen, and how a text becomes windows to be scored."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError

_SEED = 0  # of the demo model's training
_SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
_MAX_WINDOW_TOKENS = 1024


def held_out_texts() -> list[str]:
    """Return the files of Python's standard library that the demo model was not trained on.

    One in 50, by a hash of its path, as scripts/train_demo_model.py has it.

    Raises:
        ConfigError: This Python has no sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    keyed = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata"):
            key = hashlib.sha256(f"{_SEED}:{name.as_posix()}".encode()).hexdigest()
            if int(key[-8:], 16) % 50 == 0:
                keyed.append((key, path))
    if not keyed:
        raise ConfigError(f"text: {root} has no sources of Python: give --text FILE", field="text")
    return [path.read_bytes().decode("utf-8", errors="replace") for _, path in sorted(keyed)]


def read_text(file: Path) -> str:
    """Return a text file's content.

    Raises:
        ConfigError: It cannot be read, or it is no UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"text={file}: {error}: give a file of UTF-8 text", field="text"
        ) from error


def encode_texts(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each text, led by the model's first token where it has one.

    Raises:
        ConfigError: `folder` has no tokenizer.
    """
    from transformers import AutoTokenizer  # seconds to import: only where text is scored

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"model.path={folder}: no tokenizer: {error}", field="model.path"
        ) from error
    encoded = [tokenizer.encode(text, verbose=False) for text in texts]
    first = tokenizer.bos_token_id
    return [ids if first is None or ids[:1] == [first] else [first, *ids] for ids in encoded]


def cut_windows(
    texts: Sequence[Sequence[int]], max_model_len: int, max_num_tokens: int
) -> list[tuple[int, ...]]:
    """Return windows that do not overlap, each text on its own; the last token is only predicted.

    Args:
        texts: Token ids.
        max_model_len: Of the model, tokens.
        max_num_tokens: Stop near this many predicted tokens, spread over all texts; 0: all.

    Raises:
        ConfigError: There is no text of two tokens.
    """
    size = min(_MAX_WINDOW_TOKENS, max_model_len)
    windows = [
        tuple(text[at : at + size + 1]) for text in texts for at in range(0, len(text) - 1, size)
    ]
    if not windows:
        raise ConfigError("text: fewer than two tokens: give more", field="text")
    num_tokens = sum(len(window) - 1 for window in windows)
    stride = max(1, round(num_tokens / max_num_tokens)) if max_num_tokens else 1
    return windows[::stride]
