from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError, InvalidArgumentError
from cluster.simulator import traces
from cluster.simulator.summary import describe
from cluster.simulator.traces import read_trace
from cluster.simulator.workload import FIRST_ANSWER_TOKEN
from tests.simulator.workload_files import (
    AZURE,
    MOONCAKE,
    Row,
    mooncake_line,
    public_trace,
    write_lines,
    write_mooncake,
)

GOOD = mooncake_line(0, 600, 5, [0, 1])
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


def test_workload_mooncake_trace_has_its_published_figures() -> None:
    summary = describe(read_trace(public_trace(MOONCAKE)))
    assert summary.num_requests == 12031
    assert summary.duration_s == pytest.approx(3537, abs=1)
    assert summary.recurring == pytest.approx(0.366, abs=5e-4)
    assert summary.input_tokens.mean == pytest.approx(12035, abs=1)
    assert summary.output_tokens.mean == pytest.approx(343, abs=1)


def test_workload_azure_trace_has_its_published_figures() -> None:
    workload = read_trace(public_trace(AZURE))
    summary = describe(workload)
    assert summary.num_requests == 8819
    assert summary.duration_s == pytest.approx(3436, abs=1)
    assert summary.num_recurring_blocks == 0
    second = workload.arrivals[1]
    assert second.arrived_s == pytest.approx(0.052)
    assert (second.num_prompt_tokens, second.num_output_tokens) == (3180, 8)


def test_workload_mooncake_blocks_are_runs_and_the_last_one_is_partial(tmp_path: Path) -> None:
    rows: list[Row] = [
        (2000, 1500, 7, [10, 11, 12]),
        (2500, 1024, 1, [10, 11]),
        (2500, 513, 1, [10, 2**63]),
    ]
    first, second, third = read_trace(write_mooncake(tmp_path / "t", rows)).arrivals
    assert [count for _, count in first.runs] == [512, 512, 476]
    assert second.runs == first.runs[:2]
    assert third.runs == (first.runs[0], (3, 1))
    assert [a.arrived_s for a in (first, second, third)] == [0.0, 0.5, 0.5]
    assert (first.num_output_tokens, second.num_output_tokens) == (7, 1)


def test_workload_mooncake_ids_may_stand_for_other_blocks(tmp_path: Path) -> None:
    path = write_mooncake(tmp_path / "t", [(0, 33, 1, [0, 1, 2])])
    workload = read_trace(path, block_size=16)
    assert workload.block_size == 16
    assert [count for _, count in workload.arrivals[0].runs] == [16, 16, 1]


def test_workload_answers_have_tokens_of_their_own(tmp_path: Path) -> None:
    path = write_mooncake(tmp_path / "t", [(i, 512, 1, [10**18 + i]) for i in range(5)])
    arrivals = read_trace(path).arrivals
    assert max(token for a in arrivals for token, _ in a.runs) < FIRST_ANSWER_TOKEN
    assert [a.answer_token - FIRST_ANSWER_TOKEN for a in arrivals] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("2023-11-16 18:17:03.9799600", "2023-11-16 18:17:04.4799600"),
        ("2024-05-10 00:00:00.009930+00:00", "2024-05-10 00:00:00.509930+00:00"),
        ("2024-05-10 00:00:00+00:00", "2024-05-10T00:00:00.5Z"),
        ("2024-05-10 02:00:00+02:00", "2024-05-10 00:00:00.5"),
        ("0", "0.5"),
        ("1700000000.25", "1700000000.75"),
    ],
)
def test_workload_azure_times_of_every_release(tmp_path: Path, first: str, second: str) -> None:
    path = write_lines(tmp_path / "t", HEADER, f"{first},5,1", f"{second},6,2")
    assert [a.arrived_s for a in read_trace(path).arrivals] == pytest.approx([0.0, 0.5], abs=1e-6)


def test_workload_azure_columns_come_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(
        b'\xef\xbb\xbf"GeneratedTokens", ContextTokens,Model,TIMESTAMP\r\n'
        b'7, 300,"a, b",1.5\r\n\r\n9,400,c,1.5\r\n'
    )
    first, second = read_trace(path).arrivals
    assert (first.num_output_tokens, first.num_prompt_tokens) == (7, 300)
    assert (second.arrived_s, second.num_output_tokens) == (0.0, 9)
    assert first.runs[0][0] != second.runs[0][0]


rows = st.lists(
    st.tuples(
        st.integers(0, 10**6),
        st.integers(1, 3000),
        st.integers(1, 10_000),
        st.lists(st.integers(0, 2**64), min_size=6, max_size=6),
    ),
    min_size=1,
    max_size=8,
)


@given(rows)
def test_workload_mooncake_file_says_what_was_written(drawn: list[Row]) -> None:
    written: list[Row] = [
        (time, length, answer, ids[: -(-length // 512)])
        for (time, length, answer, ids) in sorted(drawn)
    ]
    with tempfile.TemporaryDirectory() as folder:
        arrivals = read_trace(write_mooncake(Path(folder) / "t", written)).arrivals
    tokens: dict[int, int] = {}
    for arrival, (time, length, answer, ids) in zip(arrivals, written, strict=True):
        assert arrival.arrived_s * 1000 == pytest.approx(time - written[0][0])
        assert arrival.num_prompt_tokens == length
        assert arrival.num_output_tokens == answer
        for block_id, (token, _) in zip(ids, arrival.runs, strict=True):
            assert tokens.setdefault(block_id, token) == token
    assert len(set(tokens.values())) == len(tokens)


BAD_LINES = [
    ('{"timestamp": 0, "input', "", "line 2: is no JSON"),
    ("[" * 100_000, "", "line 2: is no JSON"),
    ("[1, 2]", "", "is list, each line is a JSON object"),
    ('{"timestamp": 0, "input_length": 5}', "output_length", "output_length, hash_ids missing"),
    (mooncake_line(-1, 600, 5, [0, 1]), "timestamp", "timestamp=-1, it is milliseconds"),
    (mooncake_line(float("nan"), 600, 5, [0, 1]), "timestamp", "timestamp=nan"),
    (mooncake_line(float("inf"), 600, 5, [0, 1]), "timestamp", "timestamp=inf"),
    (mooncake_line(True, 600, 5, [0, 1]), "timestamp", "timestamp=True"),
    (mooncake_line("0", 600, 5, [0, 1]), "timestamp", "timestamp='0'"),
    (mooncake_line(None, 600, 5, [0, 1]), "timestamp", "timestamp=None"),
    (mooncake_line(10**400, 600, 5, [0, 1]), "timestamp", "timestamp=1000000"),
    (mooncake_line(10**12, 600, 5, [0, 1]), "timestamp", "1000000000 s after the first row"),
    (mooncake_line(0, 0, 5, []), "input_length", "input_length=0, it is .* from 1 to 10000000"),
    (mooncake_line(0, -5, 5, []), "input_length", "input_length=-5"),
    (mooncake_line(0, 6.5, 5, [0]), "input_length", "input_length=6.5"),
    (mooncake_line(0, 10**9, 5, [0]), "input_length", "input_length=1000000000"),
    (mooncake_line(0, 600, 0, [0, 1]), "output_length", "output_length=0"),
    (mooncake_line(0, 600, True, [0, 1]), "output_length", "output_length=True"),
    (mooncake_line(0, 600, 5, 7), "hash_ids", "hash_ids=7, it is a list"),
    (mooncake_line(0, 600, 5, [0, -1]), "hash_ids", r"hash_ids=\[0, -1\]"),
    (mooncake_line(0, 600, 5, [0, "x"]), "hash_ids", "hash_ids="),
    (mooncake_line(0, 600, 5, [0]), "hash_ids", "hash_ids has 1 ids, .* has 2 blocks of 512"),
    (mooncake_line(0, 600, 5, [0, 1, 2]), "hash_ids", "hash_ids has 3 ids"),
]


@pytest.mark.parametrize(("line", "field", "message"), BAD_LINES)
def test_workload_mooncake_bad_line_is_named(
    tmp_path: Path, line: str, field: str, message: str
) -> None:
    path = write_lines(tmp_path / "trace.jsonl", GOOD, line, GOOD)
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path} line 2: ")
    assert caught.value.field == field
    assert len(str(caught.value)) < 400
    workload = read_trace(path, skip_invalid=True)
    assert (len(workload.arrivals), workload.num_skipped) == (2, 1)


BAD_ROWS = [
    ("0,5", "", "has 2 values, the header has 3"),
    ("0,5,1,1", "", "has 4 values"),
    ('0,"5,1', "", "is no CSV"),
    ("-1,5,1", "TIMESTAMP", "TIMESTAMP='-1'"),
    ("nan,5,1", "TIMESTAMP", "TIMESTAMP='nan'"),
    ("1e300,5,1", "TIMESTAMP", "TIMESTAMP='1e300'"),
    ("99999999999,5,1", "TIMESTAMP", "seconds from 0 to 1e\\+10"),
    ("1969-12-31 00:00:00,5,1", "TIMESTAMP", "TIMESTAMP='1969-12-31"),
    ("yesterday,5,1", "TIMESTAMP", "TIMESTAMP='yesterday', it is a date and time"),
    (",5,1", "TIMESTAMP", "TIMESTAMP='',"),
    ("0,0,1", "ContextTokens", "ContextTokens=0, it is a whole number of tokens"),
    ("0,-3,1", "ContextTokens", "ContextTokens=-3"),
    ("0,5.5,1", "ContextTokens", "ContextTokens='5.5'"),
    ("0,1_0,1", "ContextTokens", "ContextTokens='1_0'"),
    ("0,5,0", "GeneratedTokens", "GeneratedTokens=0"),
    ("0,5,", "GeneratedTokens", "GeneratedTokens='',"),
    ("0,5," + "9" * 5000, "GeneratedTokens", "GeneratedTokens='999"),
]


@pytest.mark.parametrize(("line", "field", "message"), BAD_ROWS)
def test_workload_azure_bad_row_is_named(
    tmp_path: Path, line: str, field: str, message: str
) -> None:
    path = write_lines(tmp_path / "trace.csv", HEADER, "0,5,1", line, "2,5,1")
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path} line 3: ")
    assert caught.value.field == field
    assert len(str(caught.value)) < 400
    workload = read_trace(path, skip_invalid=True)
    assert (len(workload.arrivals), workload.num_skipped) == (2, 1)


def test_workload_trace_that_goes_back_in_time_is_refused(tmp_path: Path) -> None:
    rows: list[Row] = [(5, 1, 1, [0]), (5, 1, 1, [1]), (4, 1, 1, [2]), (6, 1, 1, [3])]
    path = write_mooncake(tmp_path / "t", rows)
    with pytest.raises(InvalidArgumentError, match=r"line 3: time 0.004 s is before .*sort"):
        read_trace(path)
    assert read_trace(path, skip_invalid=True).num_skipped == 1


BAD_FILES = [
    (b"", "is empty"),
    (b"\n \n", "is empty"),
    (b"\x1f\x8b\x08\x00\xff\xfe", "is no UTF-8 text: unpack it"),
    (b"\x00\x01\x02\x03", "is neither format: give JSON lines with .*, or CSV with"),
    (b"time,in,out\n0,1,2\n", "line 1 begins 'time,in,out', which is neither format"),
    (b"[1, 2]\n", "neither format"),
    (b"TIMESTAMP,ContextTokens\n0,5\n", "line 1 has no column GeneratedTokens"),
    (b"{" + b" " * 2**20 + b"}", "line 1 has more than 1048576 characters"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES)
def test_workload_file_that_is_no_trace_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_trace(path, skip_invalid=True)
    assert str(caught.value).startswith(str(path))


def test_workload_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_trace(tmp_path / "missing")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_trace(tmp_path)


def test_workload_trace_without_a_valid_row_is_refused(tmp_path: Path) -> None:
    for lines in ([HEADER], [HEADER, "0,0,0", "0,5,0"]):
        path = write_lines(tmp_path / "t", *lines)
        with pytest.raises(InvalidArgumentError, match=f"{len(lines) - 1} rows are invalid"):
            read_trace(path, skip_invalid=True)


def test_workload_trace_is_read_no_further_than_asked(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t", HEADER, "0,5,1", "1,5,1", "broken")
    assert len(read_trace(path, max_num_requests=2).arrivals) == 2
    for arguments in ({"max_num_requests": 0}, {"block_size": 0}):
        with pytest.raises(InvalidArgumentError, match="=0, it is 1 or more"):
            read_trace(path, **arguments)


def test_workload_trace_with_too_many_requests_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "MAX_NUM_REQUESTS", 2)
    monkeypatch.setattr("cluster.simulator.workload.MAX_NUM_REQUESTS", 2)
    path = write_lines(tmp_path / "t", HEADER, *(f"{i},5,1" for i in range(4)))
    with pytest.raises(InvalidArgumentError, match="3 requests, a workload has 1 to 2"):
        read_trace(path)
