"""What is random in a mix of clients: who speaks, when, how long, and how often again.

Few clients send most requests. Each has lengths, bursts and a system prompt of its own.

Source: ServeGen: Workload Characterization and Generation of Large Language Model Serving in
Production (2025): skewed rates of clients, gamma gaps, lognormal bodies with Pareto tails of
inputs, exponential outputs, turns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cluster.errors import InvalidArgumentError
from cluster.simulator.streams import Floats, SyntheticSpec

MAX_NUM_TURNS = 24
"""Of a conversation."""

_MAX_NUM_REQUESTS = 150_000  # some 2 KB each while the numbers are drawn
_SYSTEM = 1 / 12  # tokens of a system prompt over those of a whole prompt, mean
_FOLLOW_UP = 0.15  # tokens of a later turn's text over those of a first one's, mean
_TAIL = 0.08  # share of texts in the Pareto tail
_TAIL_INDEX = 2.0  # of that tail: finite mean, infinite variance
_ANSWER_TOKEN_S = 0.05  # an answer is read as it comes: the next turn waits for it

Ints = NDArray[np.int64]


class MixSpec(SyntheticSpec):
    """What a mix is like."""

    rate_per_s: float = Field(3.4, gt=0, le=1e4, description="requests, mean")
    duration_s: float = Field(3600.0, gt=0, le=1e6, description="of the arrivals")
    clients: int = Field(32, ge=1, le=128, description="that send requests")
    skew: float = Field(1.2, ge=0, le=4, description="Zipf exponent of the clients' rates")
    burstiness: float = Field(
        2.0, ge=0.1, le=5, description="coefficient of variation of a client's gaps, mean"
    )
    input_tokens: float = Field(12_000.0, ge=16, le=1e6, description="of a prompt, mean")
    output_tokens: float = Field(340.0, ge=1, le=1e5, description="of an answer, mean")
    max_input_tokens: int = Field(
        128_000, ge=16, le=10_000_000, description="of a prompt; a conversation ends there"
    )
    recurring: float = Field(
        0.64, ge=0, le=1, description="share of prefix blocks that recur with an infinite cache"
    )
    think_s: float = Field(60.0, ge=0, le=1e5, description="from an answer to the next turn, mean")
    block_size: int = Field(512, ge=1, le=4096, description="tokens per block of `recurring`")


@dataclass(frozen=True, slots=True)
class MixDraws:
    """All that is random, drawn once: a search that draws anew would search in noise.

    Axes: S conversations, those of one client together and in order; T turns.
    """

    shares_S: Floats  # of all conversations, that this one's client has
    gap_sums_S: Floats  # from the client's first conversation on, in its mean gaps
    lengths_S: Floats  # uniform in (0, 1]: how far it gets
    texts_ST: Floats  # what the user says in a turn, relative to a first turn's mean
    answers_ST: Ints  # tokens
    gaps_ST: Floats  # seconds from its first turn to this one
    clients_S: Ints  # index
    systems_S: Ints  # tokens of the client's system prompt


def draw(spec: MixSpec, rng: np.random.Generator) -> MixDraws:
    """Draw a mix.

    Raises:
        InvalidArgumentError: It has too many requests.
    """
    shares = np.arange(1, spec.clients + 1, dtype=float) ** -spec.skew
    shares /= shares.sum()

    def of_client(mean: float, sigma: float) -> Floats:
        """Return a lognormal number per client, with this mean over all requests."""
        values = rng.lognormal(0.0, sigma, spec.clients)
        scaled: Floats = values * (mean / (values * shares).sum())
        return scaled

    variations = of_client(spec.burstiness, 0.3)
    counts = _num_conversations(spec, shares, variations)
    gap_sums = [
        np.cumsum(rng.gamma(1 / cv**2, cv**2, count))
        for cv, count in zip(variations, counts, strict=True)
    ]
    clients_S = np.repeat(np.arange(spec.clients), counts)
    shape = (len(clients_S), MAX_NUM_TURNS)
    sigmas = rng.uniform(0.9, 1.3, spec.clients)[clients_S, None]
    texts_ST = np.exp(sigmas * rng.standard_normal(shape) - sigmas**2 / 2)
    is_tail = rng.random(shape) < _TAIL
    texts_ST = np.where(is_tail, 1 + rng.pareto(_TAIL_INDEX, shape), texts_ST)
    texts_ST[:, 1:] *= _FOLLOW_UP
    texts_ST *= of_client(1.0, 0.5)[clients_S, None]
    means = of_client(spec.output_tokens, 0.4)[clients_S, None]
    answers_ST = np.maximum(1, np.rint(means * rng.standard_exponential(shape))).astype(np.int64)
    waits_ST = _ANSWER_TOKEN_S * answers_ST + spec.think_s * rng.standard_exponential(shape)
    systems = np.rint(of_client(_SYSTEM * spec.input_tokens, 0.8)).astype(np.int64)
    return MixDraws(
        shares[clients_S],
        np.concatenate(gap_sums),
        1 - rng.random(len(clients_S)),
        texts_ST,
        answers_ST,
        np.cumsum(waits_ST, axis=1) - waits_ST,
        clients_S,
        np.minimum(systems, spec.max_input_tokens // 2)[clients_S],
    )


def _num_conversations(spec: MixSpec, shares: Floats, variations: Floats) -> Ints:
    """Return how many each client needs at the most: enough if all have one turn, and in bursts.

    The sum of m gaps of mean 1 and deviation c is below m - 4 c sqrt(m) once in 30,000 times, and
    this m is where that is the n that are expected.
    """
    num_expected = spec.rate_per_s * (spec.duration_s + lead_s(spec))
    if num_expected > _MAX_NUM_REQUESTS:
        raise InvalidArgumentError(
            f"rate_per_s={spec.rate_per_s:g} over duration_s={spec.duration_s:g} and 5 think_s are "
            f"{num_expected:.0f} requests, limit={_MAX_NUM_REQUESTS}: lower one of them",
            field="rate_per_s",
        )
    roots = 2 * variations + np.sqrt(4 * variations**2 + num_expected * shares)
    return np.ceil(roots**2).astype(np.int64) + 1


def lead_s(spec: MixSpec) -> float:
    """Return for how long conversations begin before the first request, so that some are old."""
    return 5 * spec.think_s
