"""What every store does with journals: embedded, behind a Ray actor, each kind of Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvstore_kinds import Kind

from cluster.kvstore.store import Journal, JournalOutcome, JournalWrite, JournalWrites, Store

WRITTEN, LOST, GONE = JournalOutcome.WRITTEN, JournalOutcome.LOST, JournalOutcome.GONE
FOREIGN, FULL = JournalOutcome.FOREIGN, JournalOutcome.FULL

TTL_S = 0.8  # two sleeps of 0.6 of it pass it, one leaves a busy machine 0.3 s
BUDGET_BYTES = 2**16  # the least that may be configured
QUARTER = bytes(15_000)  # four journals with such an entry fit, a fifth does not


def begin(key: str, *entries: bytes, owner: str = "A", scope: str = "team") -> JournalWrite:
    return JournalWrite(key, scope, owner, entries, begins=True)


def append(key: str, *entries: bytes, owner: str = "A", scope: str = "team") -> JournalWrite:
    return JournalWrite(key, scope, owner, entries)


def end(key: str, *entries: bytes, owner: str = "A", scope: str = "team") -> JournalWrite:
    return JournalWrite(key, scope, owner, entries, ends=True)


async def outcomes(store: Store, *writes: JournalWrite) -> list[JournalOutcome]:
    return (await store.write_journals(writes)).outcomes


async def there(store: Store, keys: str) -> str:
    return "".join([key for key in keys if await store.read_journal(key) is not None])


async def test_journal_begins_grows_and_ends(kind: Kind) -> None:
    store = await kind.open()
    assert await store.read_journal("r") is None
    assert await outcomes(store, begin("r", b"one", b"")) == [WRITTEN]
    assert await outcomes(store, append("r", b"\x00\xff" * 9000), append("r")) == [WRITTEN] * 2
    entries = [b"one", b"", b"\x00\xff" * 9000]
    assert await store.read_journal("r") == Journal("team", "A", entries, is_ended=False)
    assert await outcomes(store, end("r", b"last")) == [WRITTEN]
    assert await store.read_journal("r") == Journal("team", "A", [*entries, b"last"], is_ended=True)
    assert await outcomes(store, append("r", b"later")) == [WRITTEN]
    assert await store.read_journal("r") == Journal(
        "team", "A", [*entries, b"last", b"later"], is_ended=True
    )


async def test_journal_has_no_entries_or_thousands(kind: Kind) -> None:
    store = await kind.open()
    many = [b"%d" % number for number in range(2500)]
    assert (
        await outcomes(store, begin("none"), begin("many", *many), append("many", *many))
        == [WRITTEN] * 3
    )
    assert await store.read_journal("none") == Journal("team", "A", [], is_ended=False)
    assert await store.read_journal("many") == Journal("team", "A", many * 2, is_ended=False)


async def test_journal_begun_again_is_a_new_one(kind: Kind) -> None:
    store = await kind.open()
    await outcomes(store, begin("r", b"old"), end("r"))
    assert await outcomes(store, begin("r", b"new", owner="B")) == [WRITTEN]
    assert await store.read_journal("r") == Journal("team", "B", [b"new"], is_ended=False)
    assert await outcomes(store, append("r", b"late")) == [LOST]
    both = JournalWrite("r", "team", "C", (b"all",), begins=True, ends=True)
    assert await outcomes(store, both) == [WRITTEN]
    assert await store.read_journal("r") == Journal("team", "C", [b"all"], is_ended=True)


async def test_journal_whose_begin_is_repeated_is_not_made_anew(kind: Kind) -> None:
    store = await kind.open()
    first = begin("r", b"header")
    assert await outcomes(store, first, append("r", b"one"), first) == [WRITTEN] * 3
    entries = [b"header", b"one", b"header"]
    assert await store.read_journal("r") == Journal("team", "A", entries, is_ended=False)
    await store.claim_journal("r", "team", "B")
    assert await outcomes(store, first) == [LOST]
    assert await store.read_journal("r") == Journal("team", "B", entries, is_ended=False)


async def test_journal_of_nobody_is_gone(kind: Kind) -> None:
    store = await kind.open()
    assert await outcomes(store, append("r", b"entry"), end("r")) == [GONE, GONE]
    assert await store.read_journal("r") is None
    assert await store.claim_journal("r", "team", "B") is None
    assert await store.read_journal("r") is None
    assert await store.write_journals([]) == JournalWrites([])


async def test_journal_that_was_claimed_is_lost_to_its_old_owner(kind: Kind) -> None:
    store = await kind.open()
    await outcomes(store, begin("r", b"one"))
    assert await store.claim_journal("r", "team", "B") == Journal("team", "B", [b"one"], False)
    refused = (append("r", b"late"), end("r", b"late"))
    assert await outcomes(store, *refused, append("r", b"two", owner="B")) == [LOST, LOST, WRITTEN]
    assert await store.read_journal("r") == Journal("team", "B", [b"one", b"two"], is_ended=False)
    assert await store.claim_journal("r", "team", "A") == Journal(
        "team", "A", [b"one", b"two"], False
    )
    assert await outcomes(store, end("r", owner="B"), end("r")) == [LOST, WRITTEN]
    ended = Journal("team", "C", [b"one", b"two"], is_ended=True)
    assert await store.claim_journal("r", "team", "C") == ended
    assert await store.read_journal("r") == ended


async def test_journal_of_another_scope_is_neither_changed_nor_claimed(kind: Kind) -> None:
    store = await kind.open()
    await outcomes(store, begin("r", b"mine"))
    mine = Journal("team", "A", [b"mine"], is_ended=False)
    for scope in ("other", "", "team:2"):
        theirs = [write("r", b"theirs", scope=scope) for write in (begin, append, end)]
        assert await outcomes(store, *theirs) == [FOREIGN] * 3
        assert await store.claim_journal("r", scope, "B") == mine
        assert await store.read_journal("r") == mine
    assert await outcomes(store, append("r", b"more")) == [WRITTEN]


async def test_journal_of_any_names_is_kept_apart(kind: Kind) -> None:
    store = await kind.open()
    names = ["order", "books", "a:b", "a", "{x}y", "größe", "x" * 200, "a\nb c"]
    writes = [begin(name, name.encode(), owner=f"{name}!", scope=name) for name in names]
    writes.append(begin("nameless", b"", owner="", scope=""))
    assert await outcomes(store, *writes) == [WRITTEN] * len(writes)
    for name in names:
        expected = Journal(name, f"{name}!", [name.encode()], is_ended=False)
        assert await store.read_journal(name) == expected
    assert await store.read_journal("nameless") == Journal("", "", [b""], is_ended=False)
    assert await outcomes(store, append("nameless", owner="", scope="")) == [WRITTEN]


async def test_journal_writes_of_one_call_happen_in_order(kind: Kind) -> None:
    store = await kind.open()
    writes = [begin(f"{number}", b"head") for number in range(150)]
    writes += [append(f"{number}", b"%d" % index) for index in range(2) for number in range(150)]
    writes += [append("none"), begin("0", b"again", owner="B"), append("0"), end("149")]
    expected = [WRITTEN] * 450 + [GONE, WRITTEN, LOST, WRITTEN]
    assert await store.write_journals(writes) == JournalWrites(expected)
    assert await store.read_journal("0") == Journal("team", "B", [b"again"], is_ended=False)
    for number in range(1, 150):
        expected_entries = [b"head", b"0", b"1"]
        assert await store.read_journal(f"{number}") == Journal(
            "team", "A", expected_entries, is_ended=number == 149
        )


async def test_journal_expires_a_ttl_after_its_last_write_or_claim(kind: Kind) -> None:
    store = await kind.open(journal_ttl_s=TTL_S, journal_bytes=BUDGET_BYTES)
    await outcomes(store, *(begin(key, b"x") for key in ("silent", "lost", "foreign", "full")))
    await outcomes(store, *(begin(key, b"x") for key in ("written", "claimed")))
    await kind.elapse(0.6 * TTL_S)
    too_much = append("full", bytes(BUDGET_BYTES))
    refused = [append("lost", owner="B"), append("foreign", scope="other"), too_much]
    assert await outcomes(store, *refused) == [LOST, FOREIGN, FULL]
    await store.claim_journal("foreign", "other", "B")
    await store.read_journal("silent")
    await outcomes(store, append("written", b"y"))
    await store.claim_journal("claimed", "team", "B")
    await kind.elapse(0.6 * TTL_S)
    for key in ("silent", "lost", "foreign", "full"):
        assert await store.read_journal(key) is None
        assert await store.claim_journal(key, "team", "B") is None
    assert await outcomes(store, append("silent"), begin("lost", b"new", scope="other")) == [
        GONE,
        WRITTEN,
    ]
    assert await store.read_journal("written") == Journal("team", "A", [b"x", b"y"], False)
    assert await store.read_journal("claimed") == Journal("team", "B", [b"x"], False)
    await kind.elapse(1.2 * TTL_S)
    assert await outcomes(store, append("written"), append("claimed", owner="B")) == [GONE, GONE]


async def test_journal_that_ended_longest_ago_makes_room_first(kind: Kind) -> None:
    store = await kind.open(journal_bytes=BUDGET_BYTES)
    await outcomes(store, *(begin(key, QUARTER) for key in "abcd"))
    await outcomes(store, end("c"), append("a"), end("b"))
    assert await store.write_journals([begin("e", QUARTER)]) == JournalWrites([WRITTEN], 1, 0)
    assert await there(store, "abcde") == "abde"
    assert await store.write_journals([begin("f", QUARTER)]) == JournalWrites([WRITTEN], 1, 0)
    assert await there(store, "abcdef") == "adef"


async def test_journal_touched_longest_ago_makes_room_when_none_has_ended(kind: Kind) -> None:
    store = await kind.open(journal_bytes=BUDGET_BYTES)
    await outcomes(store, *(begin(key, QUARTER) for key in "abcd"))
    await outcomes(store, append("a"), append("b", owner="B"))  # the second one is refused
    await store.claim_journal("d", "team", "B")
    assert await store.write_journals([begin("e", QUARTER)]) == JournalWrites([WRITTEN], 0, 1)
    assert await there(store, "abcde") == "acde"
    assert await outcomes(store, append("b")) == [GONE]
    half = begin("f", QUARTER, QUARTER)
    assert await store.write_journals([half]) == JournalWrites([WRITTEN], 0, 2)
    assert await there(store, "abcdef") == "def"
    assert await store.write_journals([end("e"), begin("g", QUARTER, QUARTER)]) == JournalWrites(
        [WRITTEN, WRITTEN], 1, 1
    )
    assert await there(store, "abcdefg") == "fg"


async def test_journal_never_makes_room_for_itself(kind: Kind) -> None:
    store = await kind.open(journal_bytes=BUDGET_BYTES)
    await outcomes(store, *(begin(key, QUARTER) for key in "abcd"))
    await outcomes(store, end("a"))
    # The only one that has ended is the one that is written to.
    assert await store.write_journals([append("a", QUARTER)]) == JournalWrites([WRITTEN], 0, 1)
    assert await there(store, "abcd") == "acd"
    three = begin("a", QUARTER[1:], QUARTER, QUARTER)
    assert await store.write_journals([three]) == JournalWrites([WRITTEN], 0, 1)
    assert await there(store, "abcd") == "ad"
    assert await store.write_journals([append("a", QUARTER)]) == JournalWrites([WRITTEN], 0, 1)
    assert await store.read_journal("a") == Journal(
        "team", "A", [QUARTER[1:], *[QUARTER] * 3], is_ended=False
    )


async def test_journal_beyond_the_whole_budget_changes_nothing(kind: Kind) -> None:
    store = await kind.open(journal_bytes=BUDGET_BYTES)
    await outcomes(store, begin("a", QUARTER), begin("b", QUARTER))
    largest = BUDGET_BYTES - 640 - 32
    too_much = [
        append("a", bytes(largest - len(QUARTER) - 31)),
        begin("a", bytes(largest + 1)),
        begin("new", bytes(largest + 1)),
        end("b", *[b""] * 2048),
    ]
    assert await store.write_journals(too_much) == JournalWrites([FULL] * 4, 0, 0)
    for key in "ab":
        assert await store.read_journal(key) == Journal("team", "A", [QUARTER], is_ended=False)
    assert await store.read_journal("new") is None
    exactly = append("a", bytes(largest - len(QUARTER) - 32))
    assert await store.write_journals([exactly]) == JournalWrites([WRITTEN], 0, 1)
    assert await store.write_journals([begin("c", bytes(largest))]) == JournalWrites(
        [WRITTEN], 0, 1
    )
    assert await there(store, "abc") == "c"


async def test_journals_that_expired_free_their_bytes_and_are_not_dropped(kind: Kind) -> None:
    store = await kind.open(journal_bytes=BUDGET_BYTES, journal_ttl_s=TTL_S)
    await outcomes(store, *(begin(key, QUARTER) for key in "abcd"), end("b"))
    await kind.elapse(1.2 * TTL_S)
    # Also under the very name of one of them.
    writes = [begin(key, QUARTER) for key in "aefg"]
    assert await store.write_journals(writes) == JournalWrites([WRITTEN] * 4, 0, 0)
    assert await there(store, "abcdefg") == "aefg"


async def test_journals_of_many_writers_are_whole_and_within_the_budget(kind: Kind) -> None:
    store = await kind.open()
    await outcomes(store, begin("r"))

    async def write(number: int) -> JournalOutcome:
        entry = b"%d" % number
        return (await outcomes(store, append("r", entry, entry)))[0]

    written, claimed, rest = await asyncio.gather(
        asyncio.gather(*(write(number) for number in range(30))),
        store.claim_journal("r", "team", "B"),
        asyncio.gather(*(write(number) for number in range(30, 60))),
    )
    assert claimed is not None
    by_outcome = [outcome is WRITTEN for outcome in (*written, *rest)]
    assert set(written) | set(rest) <= {WRITTEN, LOST}
    expected = {b"%d" % number for number in range(60) if by_outcome[number]}
    journal = await store.read_journal("r")
    # Nothing was written between the entries of one write, and nothing after the claim.
    assert journal == Journal("team", "B", claimed.entries, is_ended=False)
    assert journal.entries[::2] == journal.entries[1::2]
    assert len(journal.entries) == 2 * len(expected)
    assert set(journal.entries) == expected


async def test_journal_that_many_begin_belongs_to_one_scope(kind: Kind) -> None:
    store = await kind.open()

    async def race(key: str, scope: str) -> Sequence[JournalOutcome]:
        return await outcomes(store, begin(key, scope.encode(), scope=scope, owner=scope))

    for key in ("a", "b", "c"):
        ended = await asyncio.gather(*(race(key, f"team-{number}") for number in range(12)))
        assert sorted(ended) == sorted([[WRITTEN], *[[FOREIGN]] * 11])
        winner = f"team-{ended.index([WRITTEN])}"
        expected = Journal(winner, winner, [winner.encode()], is_ended=False)
        assert await store.read_journal(key) == expected


async def test_journals_of_namespaces_do_not_see_each_other(kind: Kind) -> None:
    left, right = [await kind.open(journal_bytes=BUDGET_BYTES) for _ in range(2)]
    for store in (left, right):
        writes = [begin(key, QUARTER, owner=str(id(store))) for key in "abcd"]
        assert await store.write_journals(writes) == JournalWrites([WRITTEN] * 4, 0, 0)
    assert await outcomes(left, append("a", owner=str(id(left)))) == [WRITTEN]
