"""Requests whose state a resumption has to carry over, and what stops them.

greedy               position alone
top_p                ... and the seed: temperature 0.8, top-p 0.9
repetition_penalty   ... and all tokens so far
stop_string          ... and text that is held back: see `stops_of`
logprobs             ... and the three likeliest tokens of each position
min_tokens           ... and how many tokens there were: a stop token that may not come early
everything           all of it at once
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from cluster.bench.resumption_stream import Answer
from cluster.errors import InvalidArgumentError
from cluster.types import SamplingParams

PROMPT = '''"""Read and write rows of numbers, one file after the other."""

import csv
import os
from pathlib import Path


class Table:
    """Rows with names; the first row of a file has them."""

    def __init__(self, path, encoding="utf-8"):
'''
CASES = (
    "greedy",
    "top_p",
    "repetition_penalty",
    "stop_string",
    "logprobs",
    "min_tokens",
    "everything",
)
_MORE_TOKENS = 16  # that a request with a stop could have had beyond it
_MIN_TOKENS = 32
_NUM_NEAR_MISSES = 15  # with the stop string itself as many as a gateway takes
_NEAR_MISS_CHARACTERS = 20
_MAX_STOP_CHARACTERS = 200
_NEVER = "\N{SNOWMAN}"  # in no answer of the demo model

Ask = Callable[[SamplingParams], Awaitable[Answer]]


def plain(name: str, num_tokens: int) -> SamplingParams:
    """Return a case's parameters as far as they do not depend on what the model says."""
    greedy = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    seeded = replace(greedy, temperature=0.8, top_p=0.9, seed=20)
    everything = replace(seeded, repetition_penalty=1.3, num_logprobs=3)
    of_case = {
        "greedy": greedy,
        "repetition_penalty": replace(greedy, repetition_penalty=1.3),
        "logprobs": replace(seeded, num_logprobs=3),
        "min_tokens": greedy,
        "everything": everything,
    }
    return of_case.get(name, seeded)


async def sampling_of(name: str, num_tokens: int, ask: Ask) -> SamplingParams:
    """Return a case's parameters.

    Args:
        name: One of `CASES`.
        num_tokens: Of its answer, about; some end before.
        ask: Has a request answered, undisturbed: stops are chosen from what the model says.
    """
    sampling = plain(name, num_tokens)
    if name in ("min_tokens", "everything"):
        token_ids = (await ask(sampling)).token_ids
        sampling = replace(
            sampling,
            min_tokens=min(_MIN_TOKENS, num_tokens // 2),
            stop_token_ids=(early_token(token_ids[: num_tokens // 2]),),
        )
    if name in ("stop_string", "everything"):
        text = (await ask(sampling)).text
        # Longer than what is wanted: it is the string that has to end it.
        sampling = replace(sampling, stop=stops_of(text), max_tokens=num_tokens + _MORE_TOKENS)
    return sampling


def early_token(token_ids: Sequence[int]) -> int:
    """Return the rarest of some tokens, the first of these: the answer goes on well without it."""
    counts = Counter(token_ids)
    return min(counts, key=lambda token_id: counts[token_id])


def stops_of(text: str) -> tuple[str, ...]:
    """Return stop strings of which the first ends a text with its last but one character.

    The others are begun all over the text and never completed, so that nearly every cut finds text
    that is held back. The first one spans several tokens, begins and ends within one.

    Args:
        text: What the model says without them.

    Raises:
        InvalidArgumentError: It repeats itself: no short end of it is the first of its kind.
    """
    end = len(text) - 1
    for start in range(end - 2 * _NEAR_MISS_CHARACTERS, max(0, end - _MAX_STOP_CHARACTERS), -1):
        if text.find(text[start:end]) == start:
            break
    else:
        raise InvalidArgumentError(
            f"an answer of {len(text)} characters has no end of its own: take a longer one",
            field="tokens",
        )
    places = [end * number // _NUM_NEAR_MISSES for number in range(_NUM_NEAR_MISSES)]
    misses = (text[place : place + _NEAR_MISS_CHARACTERS] + _NEVER for place in places)
    return (text[start:end], *misses)
