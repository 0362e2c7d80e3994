"""One line of a public trace to what it says, checked; errors do not know file or line."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NoReturn

from cluster.errors import InvalidArgumentError

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE_FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")

MAX_TOKENS = 10_000_000
"""Of a prompt or an answer."""

MAX_TIME_S = 1e10
"""Some three hundred years: times since 1970 are below."""

_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?[0-9]{1,18}(\.[0-9]*)?")


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace."""

    time_s: float  # since whenever the trace counts from
    num_input_tokens: int  # >= 1
    num_output_tokens: int  # >= 1
    block_ids: tuple[int, ...] | None  # one per block of the prompt; None: the trace has none


def mooncake_row(line: str, block_size: int) -> TraceRow:
    """Return what a line of a Mooncake trace says.

    Raises:
        InvalidArgumentError: It is no JSON object, or a field is missing or out of range.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"is no JSON ({error}): repair or remove it") from None
    if not isinstance(row, dict):
        raise InvalidArgumentError(
            f"is {type(row).__name__}, each line is a JSON object: repair or remove it"
        )
    missing = [name for name in MOONCAKE_FIELDS if name not in row]
    if missing:
        raise InvalidArgumentError(
            f"{', '.join(missing)} missing, each line has {', '.join(MOONCAKE_FIELDS)}: add it",
            field=missing[0],
        )
    timestamp = row["timestamp"]
    if type(timestamp) not in (int, float) or not 0 <= timestamp <= MAX_TIME_S * 1000:
        _reject("timestamp", timestamp, f"it is milliseconds from 0 to {MAX_TIME_S * 1000:g}")
    num_input_tokens = _tokens("input_length", row["input_length"])
    return TraceRow(
        timestamp / 1000,
        num_input_tokens,
        _tokens("output_length", row["output_length"]),
        _block_ids(row["hash_ids"], num_input_tokens, block_size),
    )


def _block_ids(ids: object, num_input_tokens: int, block_size: int) -> tuple[int, ...]:
    if not isinstance(ids, list) or any(type(i) is not int or i < 0 for i in ids):
        _reject("hash_ids", ids, "it is a list of whole numbers from 0 on")
    num_blocks = -(-num_input_tokens // block_size)
    if len(ids) != num_blocks:
        raise InvalidArgumentError(
            f"hash_ids has {len(ids)} ids, input_length={num_input_tokens} has {num_blocks} blocks "
            f"of {block_size} tokens: correct one of them, or give the trace's own block size",
            field="hash_ids",
        )
    return tuple(ids)


def azure_row(line: str, columns: Sequence[str]) -> TraceRow:
    """Return what a line of an Azure trace says.

    Args:
        line: Below the header.
        columns: The header; has AZURE_COLUMNS.

    Raises:
        InvalidArgumentError: Its quotes are wrong, it has more or fewer values than the header, or
            one is out of range.
    """
    values = _csv_values(line)
    if len(values) != len(columns):
        raise InvalidArgumentError(
            f"has {len(values)} values, the header has {len(columns)}: repair or remove it"
        )
    row = dict(zip(columns, values, strict=True))
    time, context, generated = AZURE_COLUMNS
    return TraceRow(
        _azure_time_s(time, row[time]),
        _tokens(context, _whole_number(row[context])),
        _tokens(generated, _whole_number(row[generated])),
        None,
    )


def _csv_values(line: str) -> list[str]:
    """Return the values of a line of CSV; one value never goes over several lines."""
    try:
        values = next(csv.reader([line], strict=True), [])
    except csv.Error as error:
        raise InvalidArgumentError(f"is no CSV ({error}): repair or remove it") from None
    return [value.strip() for value in values]


def _azure_time_s(name: str, text: str) -> float:
    """Return the seconds since 1970, or whenever plain seconds count from."""
    try:
        if _NUMBER.fullmatch(text):
            time_s = float(text)
        else:
            time = datetime.fromisoformat(text)  # a seventh digit of the second is cut off
            time_s = (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    except ValueError:
        _reject(name, text, "it is a date and time as 2023-11-16 18:17:03.97, or plain seconds")
    if not 0 <= time_s <= MAX_TIME_S:
        _reject(name, text, f"it is a time from 1970 on, or seconds from 0 to {MAX_TIME_S:g}")
    return time_s


def _whole_number(text: str) -> int | str:
    """Return the number, or the text where it is none."""
    return int(text) if _WHOLE_NUMBER.fullmatch(text) else text


def _tokens(name: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= MAX_TOKENS:
        _reject(name, value, f"it is a whole number of tokens from 1 to {MAX_TOKENS}")
    return value


def _reject(name: str, value: object, limit: str) -> NoReturn:
    raise InvalidArgumentError(
        f"{name}={value!r:.40}, {limit}: correct or remove the line", field=name
    )
