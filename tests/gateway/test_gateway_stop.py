from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.stop import StopMatcher

_text = st.text(alphabet="abc", max_size=24)
_stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=4)


def _run(pieces: list[str], stops: list[str], num_unarmed: int = 0) -> str:
    matcher, out = StopMatcher(stops), ""
    for index, piece in enumerate(pieces):
        free, is_match = matcher.feed(piece, is_armed=index >= num_unarmed)
        out += free
        if is_match:
            return out
    return out + matcher.flush()


def _whole_answer(text: str, stops: list[str], first_end: int = 0) -> str:
    """The definition: of all matches that end after `first_end`, the one that ends first."""
    for end in range(first_end + 1, len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            return text[: end - max(map(len, matching))]
    return text


def _split(text: str, cuts: list[int]) -> list[str]:
    marks = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(marks)]


@given(_text, _stops, st.lists(st.integers(0, 24), max_size=10))
def test_any_split_gives_the_whole_strings_answer(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    assert _run(_split(text, cuts), stops) == _whole_answer(text, stops)


@given(_text, _stops, st.lists(st.integers(0, 24), max_size=10), st.integers(0, 5))
def test_nothing_matches_before_it_is_armed(
    text: str, stops: list[str], cuts: list[int], num_unarmed: int
) -> None:
    pieces = _split(text, cuts)
    first_end = sum(map(len, pieces[:num_unarmed]))
    assert _run(pieces, stops, num_unarmed) == _whole_answer(text, stops, first_end)


def test_only_what_may_become_a_stop_is_held_back() -> None:
    matcher = StopMatcher(["END", "\n\n"])
    assert matcher.feed("xE") == ("x", False)
    assert matcher.feed("N") == ("", False)
    assert matcher.feed("x\n") == ("ENx", False)
    assert matcher.feed("y") == ("\ny", False)
    assert matcher.flush() == ""


def test_match_within_unarmed_text_stays_unseen() -> None:
    matcher = StopMatcher(["aab", "a"])
    assert matcher.feed("aa", is_armed=False) == ("", False)
    assert matcher.feed("c") == ("aac", False)


def test_match_that_ends_first_wins() -> None:
    assert _run(["abcd"], ["abcd", "bc"]) == "a"
    assert _run(["abc"], ["c", "abc", "bc"]) == ""
