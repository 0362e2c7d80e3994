"""Journals as bytes: what was noted is read back, what is damaged is refused."""

from __future__ import annotations

import zlib
from dataclasses import fields, replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from journal_fakes import header, ids, tokens

from cluster.gateway.journal_entry import MAX_EVENTS, EntryKind, JournalError, seal, unseal
from cluster.gateway.journal_fields import SamplingFields
from cluster.gateway.journal_progress import MAX_DRAFT_BYTES, ProgressWriter
from cluster.gateway.journal_record import JournalHeader, JournalState, encode_header, read_state
from cluster.types import (
    SLO,
    FinishReason,
    SampledToken,
    SamplingParams,
    ServiceClass,
    TokenLogprob,
)

SAMPLING = SamplingParams(
    max_tokens=64,
    min_tokens=2,
    temperature=0.0,
    top_k=5,
    top_p=0.5,
    min_p=0.25,
    repetition_penalty=1.5,
    presence_penalty=-2.0,
    frequency_penalty=2.0,
    seed=2**64 - 1,
    stop=("ä", "\n\n"),
    stop_token_ids=(7, 0),
    ignore_eos=True,
    num_logprobs=0,
)
HEADER = JournalHeader(
    "r1",
    "alice",
    (0, 5, 2**32 - 1),
    SAMPLING,
    SLO(ttft_s=0.5, tpot_s=None),
    ServiceClass.BATCH,
    "chat-7",
    1.7e9,
)
_WORDS = st.integers(0, 2**32 - 1)
_FLOATS = st.floats(width=32, allow_nan=False)
_TOPS = st.lists(st.builds(TokenLogprob, _WORDS, _FLOATS), max_size=3).map(tuple)
_TOKENS = st.one_of(
    st.builds(SampledToken, _WORDS), st.builds(SampledToken, _WORDS, _FLOATS, _TOPS)
)


def test_header_survives_the_store() -> None:
    assert read_state([encode_header(HEADER)]) == JournalState(HEADER)
    plain = JournalHeader("r2", "", (1,), SamplingParams())
    assert read_state([encode_header(plain)]).header == plain


def test_every_field_of_sampling_is_journalled() -> None:
    """A field that is missing in the journal would be lost when another gateway goes on."""
    assert list(SamplingFields.model_fields) == [field.name for field in fields(SamplingParams)]
    default = SamplingParams()
    for field in fields(SamplingParams):
        assert getattr(SAMPLING, field.name) != getattr(default, field.name), "not tested"


class Journal:
    """Entries, and what should be read from them."""

    def __init__(self) -> None:
        self.writer = ProgressWriter(num_entries=1, last_seq=-1)
        self.entries = [encode_header(HEADER)]
        self.tokens: list[SampledToken] = []
        self.marks: list[tuple[int, int]] = []

    @property
    def next_seq(self) -> int:
        return self.marks[-1][0] + 1 if self.marks else 0

    def note(self, new: list[SampledToken], seq: int | None = None) -> None:
        seq = self.next_seq if seq is None else seq
        self.writer.note(seq, new, "", 0)
        self.tokens += new
        self.marks.append((seq, len(self.tokens)))

    def flush(self) -> None:
        self.entries += self.writer.take()

    def check(self) -> JournalState:
        self.flush()
        state = read_state(self.entries)
        assert state.tokens == tuple(self.tokens)
        assert state.marks == tuple(self.marks)
        assert state.last_seq == self.next_seq - 1
        assert state.num_entries == len(self.entries)
        return state


@given(st.lists(st.one_of(st.none(), st.lists(_TOKENS, max_size=4)), max_size=30))
def test_notes_read_back_whenever_they_are_flushed(steps: list[list[SampledToken] | None]) -> None:
    journal = Journal()
    for new in steps:
        if new is None:
            journal.flush()
        else:
            journal.note(new)
    journal.check()


@given(st.data())
def test_client_that_goes_back_is_followed(data: st.DataObject) -> None:
    """Calls take over from each other, each with a client that has lost some of the events."""
    journal = Journal()
    for _ in range(data.draw(st.integers(1, 4), "calls")):
        for _ in range(data.draw(st.integers(0, 6), "events")):
            journal.note(data.draw(st.lists(_TOKENS, max_size=3)))
            if data.draw(st.booleans(), "flush"):
                journal.flush()
        state = journal.check()
        journal.writer = ProgressWriter(state.num_entries, state.last_seq)
        num_left = data.draw(st.integers(0, len(state.marks)), "events that the client has")
        if num_left < len(state.marks):
            del journal.marks[num_left:]
            journal.note(data.draw(st.lists(_TOKENS, max_size=3)))  # beside all that it had lost
    journal.check()


def test_event_that_repeats_tokens_may_bring_new_ones() -> None:
    journal = Journal()
    for token in tokens(1, 2, 3):
        journal.note([token])
    state = journal.check()
    journal.writer = ProgressWriter(state.num_entries, state.last_seq)
    journal.writer.note(1, tokens(4), "", 0)
    state = read_state(journal.entries + journal.writer.take())
    assert ids(state) == [1, 2, 3, 4]
    assert state.marks == ((0, 1), (1, 4))


def test_tokens_that_only_the_client_has_are_journalled() -> None:
    journal = Journal()
    journal.note(tokens(1, 2))
    state = journal.check()
    journal.writer = ProgressWriter(state.num_entries, state.last_seq)
    journal.writer.note(8, tokens(3, 4), "", 0)
    journal.writer.note(9, tokens(5), "", 0)
    state = read_state(journal.entries + journal.writer.take())
    assert ids(state) == [1, 2, 3, 4, 5]
    assert state.marks == ((0, 2), (8, 4), (9, 5))


def test_numbers_of_events_are_kept_whatever_they_are() -> None:
    journal = Journal()
    for seq, token in ((0, 1), (5, 2), (6, 3), (3, 4)):
        journal.writer.note(seq, tokens(token), "", 0)
    journal.flush()
    state = read_state(journal.entries)
    assert ids(state) == [1, 2, 3, 4]
    assert state.marks == ((0, 1), (3, 4))
    journal.writer.note(9, (), "", 0)
    assert read_state(journal.entries + journal.writer.take()).marks[-2:] == ((3, 4), (9, 4))


def test_facts_and_end_are_read_back() -> None:
    journal = Journal()
    journal.writer.note(0, (), "aa", 3)
    journal.flush()
    journal.writer.note(1, tokens(1), "", 0)
    journal.writer.timings(0.25, 0.5)
    journal.flush()
    journal.entries.append(journal.writer.end(2, "stop", ""))
    state = read_state(journal.entries)
    assert (state.fingerprint, state.num_cached_tokens) == ("aa", 3)
    assert (state.queued_s, state.ttft_s) == (0.25, 0.5)
    assert (state.finish_reason, state.error, state.is_ended) == (FinishReason.STOP, "", True)
    assert (state.last_seq, state.marks[-1]) == (2, (2, 1))


def test_failure_is_read_back_and_is_no_event() -> None:
    journal = Journal()
    journal.note(tokens(1))
    journal.flush()
    assert not journal.check().is_ended
    journal.entries.append(journal.writer.end(-1, None, "INTERNAL: broken"))
    state = read_state(journal.entries)
    assert (state.finish_reason, state.error, state.is_ended) == (None, "INTERNAL: broken", True)
    assert state.last_seq == 0


def test_entries_that_were_written_twice_count_once() -> None:
    journal = Journal()
    for token in tokens(1, 2, 3):
        journal.note([token])
        journal.flush()
    head, *rest = journal.entries
    assert read_state([head, head, *rest[:2], *rest, *rest]) == read_state([head, *rest])


def test_progress_is_compact() -> None:
    assert len(encode_header(header())) < 80
    long = replace(HEADER, prompt_token_ids=(4095,) * 10_000)
    assert len(encode_header(long)) <= len(encode_header(HEADER)) + 4 * 10_000
    writer = ProgressWriter(num_entries=1, last_seq=-1)
    for seq in range(1000):
        writer.note(seq, tokens(4095), "", 0)
    (entry,) = writer.take()
    assert len(entry) <= 4 * 1000 + 32


def test_entry_is_cut_at_its_limits() -> None:
    journal = Journal()
    for _ in range(MAX_EVENTS + 1):
        journal.note([])
    many = tokens(1) * (MAX_DRAFT_BYTES // 4)
    for _ in range(2):
        journal.note(many)
    journal.check()
    assert len(journal.entries) == 1 + 3
    assert max(map(len, journal.entries)) < MAX_DRAFT_BYTES + 100


def _entries() -> list[bytes]:
    writer = ProgressWriter(num_entries=1, last_seq=-1)
    top = (TokenLogprob(3, -0.5), TokenLogprob(4, -1.5))
    writer.note(0, (), "aa", 0)
    writer.note(1, [SampledToken(3, -0.5, top), SampledToken(4)], "", 0)
    return [encode_header(HEADER), *writer.take(), writer.end(2, "stop", "")]


def _resealed(entry: bytes, place: int, value: Any) -> bytes:
    kind, number, values = unseal(entry)
    return seal(kind, number, *values[:place], value, *values[place + 1 :])


def _checked(body: bytes) -> bytes:
    return zlib.crc32(body).to_bytes(4, "little") + body


def test_what_is_damaged_below_is_whole_before() -> None:
    assert read_state(_entries()).is_ended


@pytest.mark.parametrize("index", range(3))
def test_every_truncated_or_changed_entry_is_refused(index: int) -> None:
    entries = _entries()
    whole = entries[index]
    for length in range(len(whole)):
        with pytest.raises(JournalError):
            read_state([*entries[:index], whole[:length], *entries[index + 1 :]])
    for place in range(len(whole)):
        changed = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        with pytest.raises(JournalError, match="checksum"):
            read_state([*entries[:index], changed, *entries[index + 1 :]])


@given(
    index=st.integers(0, 2),
    place=st.integers(0, 11),
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-3, 2**63) | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=2),
    ),
)
def test_wrong_fields_are_refused_or_fit(index: int, place: int, value: Any) -> None:
    """Whoever writes whatever with a right checksum: a state is read, or it is a JournalError."""
    entries = _entries()
    entries[index] = _resealed(entries[index], place, value)
    try:
        state = read_state(entries)
    except JournalError:
        return
    assert state.last_seq == (state.marks[-1][0] if state.marks else -1)
    assert all(0 <= num <= len(state.tokens) for _, num in state.marks)


@given(st.binary(max_size=64))
def test_foreign_bytes_are_refused(body: bytes) -> None:
    for entry in (body, _checked(body)):
        with pytest.raises(JournalError):
            read_state([entry])


@pytest.mark.parametrize(
    ("index", "place", "value"),
    [
        (0, 0, ""),  # no request id
        (0, 0, 7),
        (0, 2, b""),  # no prompt
        (0, 2, b"\1\0\0"),
        (0, 3, {"max_tokens": 0}),
        (0, 3, {"max_tokens": "1"}),
        (0, 3, {"max_tokens": True}),
        (0, 3, {"temperature": float("nan")}),
        (0, 3, {"unknown": 1}),
        (0, 4, (-1.0, None)),
        (0, 4, (None,)),
        (0, 5, "royal"),
        (0, 7, float("inf")),
        (0, 8, "one too many"),
        (1, 0, -1),
        (1, 1, (1, 0, 1)),  # no pairs
        (1, 1, (0, 1)),
        (1, 1, (1, -1)),
        (1, 1, (1, 3)),
        (1, 1, (2**62, 0)),  # would take all memory
        (1, 2, b"\1\0\0"),
        (1, 2, b"\1\0\0\0"),
        (1, 3, (1, 2, 1, -2)),
        (1, 3, (1, 2**62)),
        (1, 3, (2**62, -1)),
        (1, 3, ()),
        (1, 4, b""),
        (1, 5, b"\3\0\0\0"),
        (2, 0, -2),
        (2, 0, -1),  # a good end has an event
        (2, 1, "bored"),
        (2, 1, None),
        (2, 2, "INTERNAL: both"),
    ],
)
def test_wrong_field_is_refused(index: int, place: int, value: Any) -> None:
    entries = _entries()
    entries[index] = _resealed(entries[index], place, value)
    with pytest.raises(JournalError):
        read_state(entries)


def test_missing_or_misplaced_entry_is_refused() -> None:
    head, progress, end = _entries()
    more = seal(EntryKind.PROGRESS, 3, 3, ())
    second_head = seal(EntryKind.HEADER, 1, *unseal(head)[2])
    unknown = _checked(msgpack.packb((1, 7, 1)))
    for entries in (
        [],
        [progress],
        [progress, head],
        [end],
        [second_head],
        [head, progress, end, more],
        [head, second_head],
        [head, unknown],
    ):
        with pytest.raises(JournalError):
            read_state(entries)


def test_what_stands_behind_a_missing_entry_is_passed_over() -> None:
    """A store that failed over has lost what it had confirmed, and took what came afterwards."""
    head, progress, end = _entries()
    assert read_state([head, end]) == read_state([head])
    first = read_state([head, progress])
    behind = seal(EntryKind.END, 3, *unseal(end)[2])
    assert read_state([head, progress, behind]) == first and not first.is_ended
    # who goes on from there counts from the gap, and the lost number comes again
    assert read_state([head, progress, behind, end]) == read_state([head, progress, end])
    assert read_state([head, progress, behind, end]).is_ended


def test_other_version_is_refused() -> None:
    version, *values = msgpack.unpackb(encode_header(HEADER)[4:])
    with pytest.raises(JournalError, match="version 2, known is 1"):
        read_state([_checked(msgpack.packb((version + 1, *values)))])


def test_refusal_tells_nothing_of_the_request() -> None:
    secret = {"stop": ("hush",), "max_tokens": "hush"}
    with pytest.raises(JournalError) as caught:
        read_state([_resealed(encode_header(HEADER), 3, secret)])
    assert "max_tokens" in str(caught.value)
    assert "hush" not in str(caught.value)
    assert caught.value.__cause__ is None
