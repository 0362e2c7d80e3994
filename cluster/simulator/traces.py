"""Public request traces as workloads; a file's format is recognized by its first line.

    {"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, ...]}   Mooncake
    TIMESTAMP,ContextTokens,GeneratedTokens                                                 Azure

A line of Mooncake's has milliseconds, and one id for each block of the prompt, the last one maybe
partial: prompts are equal as far as their ids are. A row of Azure's has a date and time (UTC, or
with an offset) or plain seconds and says nothing of prefixes: all prompts are distinct.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

from cluster.errors import ConfigError, InvalidArgumentError
from cluster.simulator.arrival import Arrival, Run
from cluster.simulator.trace_rows import (
    AZURE_COLUMNS,
    MOONCAKE_FIELDS,
    TraceRow,
    azure_row,
    mooncake_row,
)
from cluster.simulator.workload import FIRST_ANSWER_TOKEN, MAX_NUM_REQUESTS, Workload

MAX_LINE_CHARACTERS = 2**20
"""The ids of a prompt of a million tokens take some 16,000."""

MAX_DURATION_S = 366 * 86_400
"""Of a trace."""

_Line = tuple[int, str]  # number from 1 on, text


def read_trace(
    path: str | Path,
    *,
    block_size: int = 512,
    skip_invalid: bool = False,
    max_num_requests: int | None = None,
) -> Workload:
    """Return the requests of a trace; the first one comes at 0.

    Args:
        path: Of a Mooncake JSONL or an Azure CSV file, UTF-8.
        block_size: Tokens that an id of a Mooncake trace stands for.
        skip_invalid: Leave out rows that are invalid, and count them in `num_skipped`.
        max_num_requests: Read no further; None is all.

    Raises:
        ConfigError: The file cannot be read, or is in neither format.
        InvalidArgumentError: A row is invalid or comes before the one above it; names file, line
            and field. There is no request, or more than MAX_NUM_REQUESTS.
    """
    for name, value in (("block_size", block_size), ("max_num_requests", max_num_requests)):
        if value is not None and value < 1:
            raise InvalidArgumentError(f"{name}={value}, it is 1 or more: change it", field=name)
    reader = _TraceReader(Path(path), block_size, skip_invalid)
    # One more than are allowed is enough for the workload to refuse them.
    limit = MAX_NUM_REQUESTS + 1 if max_num_requests is None else max_num_requests
    arrivals = list(_arrivals(islice(reader.rows(), limit), block_size))
    if not arrivals:
        raise InvalidArgumentError(
            f"{path} has no valid request, {reader.num_skipped} rows are invalid: give another",
            field="trace",
        )
    return Workload.in_order(
        reader.path.name,
        arrivals,
        block_size=block_size,
        num_skipped=reader.num_skipped,
        description=f"trace {reader.path.name}",
    )


def _arrivals(rows: Iterator[TraceRow], block_size: int) -> Iterator[Arrival]:
    # One tuple per block, not one per mention: half of the memory. Blocks get tokens in order of
    # appearance, so whatever numbers a trace has for them, tokens stay below the answers'.
    blocks: dict[int, Run] = {}
    begin_s: float | None = None
    for index, row in enumerate(rows):
        begin_s = row.time_s if begin_s is None else begin_s
        if row.block_ids is None:
            runs = [(index, row.num_input_tokens)]
        else:
            runs = [blocks.setdefault(i, (len(blocks), block_size)) for i in row.block_ids]
            token, _ = runs[-1]
            runs[-1] = (token, row.num_input_tokens - (len(runs) - 1) * block_size)
        yield Arrival(
            request_id=str(index),
            arrived_s=row.time_s - begin_s,
            runs=tuple(runs),
            num_output_tokens=row.num_output_tokens,
            answer_token=FIRST_ANSWER_TOKEN + index,
        )


@dataclass(slots=True)
class _TraceReader:
    """Reads one file once."""

    path: Path
    block_size: int  # tokens
    skip_invalid: bool
    num_skipped: int = 0  # rows

    def rows(self) -> Iterator[TraceRow]:
        """Yield the valid rows; raise at the first that is not, or count them."""
        lines = self._lines()
        header = next(lines, None)
        if header is None:
            raise self._refusal("is empty: give a trace with requests")
        parse, lines = self._parser(header, lines)
        begin_s: float | None = None
        last_s = 0.0
        for number, line in lines:
            try:
                row = parse(line)
                begin_s = row.time_s if begin_s is None else begin_s
                _check_time(row.time_s, begin_s, last_s)
            except InvalidArgumentError as error:
                if not self.skip_invalid:
                    message = f"{self.path} line {number}: {error} (or skip invalid rows)"
                    raise InvalidArgumentError(message, field=error.field) from None
                self.num_skipped += 1
                continue
            last_s = row.time_s
            yield row

    def _parser(
        self, header: _Line, lines: Iterator[_Line]
    ) -> tuple[Callable[[str], TraceRow], Iterator[_Line]]:
        """Return what reads a line of this file's format, and the lines that it is for."""
        number, text = header
        if text.startswith("{"):
            return partial(mooncake_row, block_size=self.block_size), chain([header], lines)
        columns = [column.strip(' "') for column in text.split(",")]
        missing = [column for column in AZURE_COLUMNS if column not in columns]
        if len(missing) == len(AZURE_COLUMNS):
            raise self._refusal(
                f"line {number} begins {text[:40]!r}, which is neither format: give JSON lines "
                f"with {', '.join(MOONCAKE_FIELDS)}, or CSV with {', '.join(AZURE_COLUMNS)}"
            )
        if missing:
            raise self._refusal(
                f"line {number} has no column {', '.join(missing)}, an Azure trace has "
                f"{', '.join(AZURE_COLUMNS)}: add it"
            )
        return partial(azure_row, columns=columns), lines

    def _lines(self) -> Iterator[_Line]:
        """Yield the lines that are not blank."""
        try:
            with self.path.open(encoding="utf-8-sig") as file:
                number = 0
                while line := file.readline(MAX_LINE_CHARACTERS + 1):
                    number += 1
                    if len(line) > MAX_LINE_CHARACTERS:
                        raise self._refusal(
                            f"line {number} has more than {MAX_LINE_CHARACTERS} characters: give a "
                            "trace in JSON lines or CSV"
                        )
                    if line := line.strip():
                        yield number, line
        except OSError as error:
            raise self._refusal(f"cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise self._refusal("is no UTF-8 text: unpack it, or give another file") from None

    def _refusal(self, reason: str) -> ConfigError:
        return ConfigError(f"{self.path} {reason}", field="trace")


def _check_time(time_s: float, begin_s: float, last_s: float) -> None:
    if time_s < last_s:
        raise InvalidArgumentError(
            f"time {time_s:.3f} s is before that of the row above, {last_s:.3f} s: sort the trace",
            field="timestamp",
        )
    if time_s - begin_s > MAX_DURATION_S:
        raise InvalidArgumentError(
            f"time {time_s:.3f} s is {time_s - begin_s:.0f} s after the first row, "
            f"limit={MAX_DURATION_S}: correct one of them",
            field="timestamp",
        )
