"""Trace files for tests: the public ones beside the repository, and others that are written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

TRACES = Path(__file__).parents[3] / "shared" / "traces"
MOONCAKE = "mooncake_conversation.jsonl"
AZURE = "azure_llm_2023_code.csv"

Row = tuple[int, int, int, list[int]]  # milliseconds, input, output, ids


def public_trace(name: str) -> Path:
    path = TRACES / name
    if not path.is_file():
        pytest.skip(f"{path} is missing: the traces are not part of this repository")
    return path


def mooncake_line(timestamp: object, input_length: object, output: object, ids: object) -> str:
    row = {
        "timestamp": timestamp,
        "input_length": input_length,
        "output_length": output,
        "hash_ids": ids,
    }
    return json.dumps(row)


def write_mooncake(path: Path, rows: Iterable[Row]) -> Path:
    path.write_text("".join(mooncake_line(*row) + "\n" for row in rows))
    return path


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path
