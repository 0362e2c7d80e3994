"""The requests of `sluice bench chaos` and how its clients behave: drawn from a seed, pure.

Few requests, asked again and again: what each must answer is found once, in quiet. Among so few
tokens it is also unlikely that two candidates are as good as equal, so that roundings decide.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cluster.types import SamplingParams

MIN_ANSWER_TOKENS, MAX_ANSWER_TOKENS = 16, 96
MAX_PROMPT_TOKENS = 300
MAX_AWAY_S = 2.0
_PREFIX_TOKENS = (16, 40, 64, 100, 160, 224)
_TAIL_TOKENS = (4, 76)
_STOP_STRINGS = ("\n\n", "):\n", "self.", "return ", "    #", "import ")
_BY_HAND_SHARE, _DETACHED_SHARE = 0.15, 0.15


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    name: str  # of its kind of sampling
    prompt: tuple[int, ...]
    sampling: SamplingParams


class Manner(StrEnum):
    """What a client does with its stream."""

    STAYS = "stays"  # to the end; the library goes on by itself where something breaks
    LEAVES = "leaves"  # in the middle, and comes back as another client: the request ended
    DETACHES = "detaches"  # likewise, but the request goes on meanwhile


@dataclass(frozen=True, slots=True)
class Visit:
    """One use of a request."""

    ask: int  # in the catalogue
    manner: Manner = Manner.STAYS
    num_tokens: int = 0  # received before it goes away
    away_s: float = 0.0
    has_memory: bool = True  # it says what it has received; else it gets all of it again


def _greedy(randomness: random.Random) -> dict[str, Any]:
    return {"temperature": 0.0}


def _top_p(randomness: random.Random) -> dict[str, Any]:
    return {"temperature": 0.8, "top_p": 0.9, "seed": randomness.getrandbits(32)}


def _penalty(randomness: random.Random) -> dict[str, Any]:
    return _top_p(randomness) | {"repetition_penalty": 1.3, "presence_penalty": 0.2}


def _stop(randomness: random.Random) -> dict[str, Any]:
    stop = tuple(randomness.sample(_STOP_STRINGS, 2))
    return _top_p(randomness) | {"stop": stop, "ignore_eos": False}


def _logprobs(randomness: random.Random) -> dict[str, Any]:
    return {"temperature": 0.0, "num_logprobs": 3}


def _min_tokens(randomness: random.Random) -> dict[str, Any]:
    return _stop(randomness) | {"min_tokens": randomness.randrange(8, MIN_ANSWER_TOKENS)}


def _all_at_once(randomness: random.Random) -> dict[str, Any]:
    found = _penalty(randomness) | _min_tokens(randomness) | _logprobs(randomness)
    return found | {"temperature": 0.8}


_KINDS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "greedy": _greedy,
    "top-p": _top_p,
    "penalty": _penalty,
    "stop": _stop,
    "logprobs": _logprobs,
    "min-tokens": _min_tokens,
    "all": _all_at_once,
}


def catalogue(num_asks: int, *, seed: int, vocab_size: int) -> list[Ask]:
    """Return the requests: all kinds of sampling in turn, prompts of 20 to 300 tokens.

    Args:
        num_asks: How many.
        seed: Of prompts and parameters.
        vocab_size: Of the model.
    """

    def tokens(name: str, num_tokens: int) -> tuple[int, ...]:
        randomness = random.Random(f"{name} {seed}")
        return tuple(randomness.randrange(vocab_size) for _ in range(num_tokens))

    prefixes = [tokens(f"prefix {n}", n) for n in _PREFIX_TOKENS]
    asks = []
    for index in range(num_asks):
        randomness = random.Random(f"ask {index} {seed}")
        name = list(_KINDS)[index % len(_KINDS)]
        tail = tokens(f"tail {index}", randomness.randint(*_TAIL_TOKENS))
        max_tokens = randomness.randint(MIN_ANSWER_TOKENS, MAX_ANSWER_TOKENS)
        drawn = {"max_tokens": max_tokens, "ignore_eos": True} | _KINDS[name](randomness)
        prompt = randomness.choice(prefixes) + tail
        asks.append(Ask(name, prompt, SamplingParams(**drawn)))
    return asks


def visits(num_asks: int, *, seed: int, stream: int) -> Iterator[Visit]:
    """Yield what one of the streams does, one after the other, without end.

    Args:
        num_asks: In the catalogue.
        seed: Of the run.
        stream: Which one of those at once.
    """
    randomness = random.Random(f"visits {stream} {seed}")
    while True:
        ask, draw = randomness.randrange(num_asks), randomness.random()
        num_tokens = randomness.randrange(1, MIN_ANSWER_TOKENS)
        away_s = randomness.uniform(0.0, MAX_AWAY_S)
        has_memory = randomness.random() < 0.7
        if draw >= _BY_HAND_SHARE + _DETACHED_SHARE:
            yield Visit(ask)
            continue
        manner = Manner.LEAVES if draw < _BY_HAND_SHARE else Manner.DETACHES
        yield Visit(ask, manner, num_tokens, away_s, has_memory)
