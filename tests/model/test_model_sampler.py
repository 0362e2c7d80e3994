from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from model_fakes import spec
from torch import Tensor

from cluster.kernels import native
from cluster.model import sampler
from cluster.model.sampler import sample, uniform
from cluster.step import SampleSpec

VOCAB_SIZE = 12
NUM_DRAWS = 6000
CHI_SQUARE_LIMIT = 38.0  # 11 degrees of freedom: exceeded once in 10,000 seeds


@pytest.fixture(autouse=True, params=["native", "torch"])
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample by the kernels, and by the plain torch that serves where there are none."""
    torch.set_num_threads(1)
    if request.param == "torch":
        monkeypatch.setattr(native, "load", lambda: "a test asks for plain torch")
    elif native.load():
        pytest.skip(native.load())


def logits(seed: int = 0, size: int = VOCAB_SIZE) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 1.5


def draw(logits_V: Tensor, num: int = NUM_DRAWS, **fields: Any) -> Counter[int]:
    specs = [spec(seed=seed, position=seed % 7, **fields) for seed in range(num)]
    return Counter(token.token_id for token in sample(logits_V.expand(num, -1), specs))


def filtered(logits_V: Tensor, **fields: Any) -> list[float]:
    """Return the distribution by definition: sort, cut, cut, cut, normalise."""
    limits = spec(**fields)
    probs = (logits_V.double() / limits.temperature).softmax(0).tolist()
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    kept = order[: limits.top_k or len(order)]
    total, before, in_top_p = sum(probs[i] for i in kept), 0.0, []
    for i in kept:
        if before < limits.top_p * total:
            in_top_p.append(i)
        before += probs[i]
    final = [i for i in in_top_p if probs[i] >= limits.min_p * probs[order[0]]]
    norm = sum(probs[i] for i in final)
    return [probs[i] / norm if i in final else 0.0 for i in range(len(probs))]


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": 400},
    {"top_p": 0.05},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 1.4, "top_k": 7, "top_p": 0.8, "min_p": 0.1},
]


@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_draws_follow_the_filtered_distribution(fields: dict[str, Any]) -> None:
    expected = filtered(logits(), **fields)
    counts = draw(logits(), **fields)
    assert {i for i in counts if expected[i] == 0} == set()
    chi_square = sum(
        (counts[i] - NUM_DRAWS * p) ** 2 / (NUM_DRAWS * p) for i, p in enumerate(expected) if p > 0
    )
    assert chi_square < CHI_SQUARE_LIMIT


def test_uniform_is_even_over_seeds_and_over_positions() -> None:
    for numbers in (
        [uniform(seed, 3) for seed in range(NUM_DRAWS)],
        [uniform(3, position) for position in range(NUM_DRAWS)],
    ):
        assert all(0 <= x < 1 for x in numbers)
        tenths = Counter(int(10 * x) for x in numbers)
        assert sum((tenths[i] - NUM_DRAWS / 10) ** 2 / (NUM_DRAWS / 10) for i in range(10)) < 35
        pairs = Counter(a < b for a, b in pairwise(numbers))
        assert abs(pairs[True] / NUM_DRAWS - 0.5) < 0.03


def test_uniform_is_fixed_for_ever() -> None:
    """A journal written today must continue identically on a later version."""
    assert uniform(0, 0) == uniform(2**64, 0)
    assert [uniform(0, 0), uniform(1, 0), uniform(0, 1), uniform(2**64 - 1, 4095)] == PINNED


PINNED = [0.8833108082136426, 0.7497482413580301, 0.43152799704850997, 0.8811123988031333]


def test_a_token_depends_on_its_seed_and_position_only() -> None:
    rows = torch.stack([logits(seed, 300) for seed in range(16)])
    specs = [
        spec(seed=i, position=3 * i, temperature=0.4 * (i % 4), **FILTERS[i % len(FILTERS)])
        if "temperature" not in FILTERS[i % len(FILTERS)]
        else spec(seed=i, position=3 * i, **FILTERS[i % len(FILTERS)])
        for i in range(16)
    ]
    together = sample(rows, specs)
    alone = [sample(row[None], [one])[0] for row, one in zip(rows, specs, strict=True)]
    order = random.Random(0).sample(range(16), 16)
    shuffled = sample(rows[order], [specs[i] for i in order])
    assert together == alone
    assert [together[i] for i in order] == shuffled


def test_another_seed_or_position_gives_other_tokens() -> None:
    flat = torch.zeros(1, 1000)
    by_seed = {sample(flat, [spec(seed=seed)])[0].token_id for seed in range(20)}
    by_position = {sample(flat, [spec(position=p)])[0].token_id for p in range(20)}
    assert min(len(by_seed), len(by_position)) > 15


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    tied = torch.tensor([[0.0, 5.0, 1.0, 5.0], [2.0, 2.0, 2.0, 2.0]])
    tokens = sample(tied, [spec(temperature=0.0)] * 2)
    assert [token.token_id for token in tokens] == [1, 0]
    assert tokens[0].logprob is None
    assert tokens[0].top == ()


def test_top_k_keeps_no_more_than_k_of_equally_likely_tokens() -> None:
    tied = torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0, 3.0])
    assert set(draw(tied, 300, top_k=2)) == {1, 3}
    assert set(draw(tied, 300, top_k=4)) == {0, 1, 3, 5}


def test_top_p_beyond_its_candidates_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = logits(4, 200).expand(50, -1)
    specs = [spec(seed=seed, top_p=0.98) for seed in range(50)]
    expected = sample(rows, specs)
    monkeypatch.setattr(sampler, "NUM_TOP_P_CANDIDATES", 3)
    assert sample(rows, specs) == expected


def scores_of(logits_V: Tensor, one: SampleSpec) -> list[float]:
    """Return the logits after penalties, read off as greedy choices between pairs would be."""
    scores = logits_V.clone()
    sampler._apply_penalties(scores, one)
    return scores.tolist()


def test_penalties_follow_their_definitions() -> None:
    start = torch.tensor([2.0, -2.0, 3.0, -3.0, 1.0, 0.5])
    seen: dict[str, Any] = {"prompt_token_ids": (0, 1), "output_token_ids": (2, 3, 3, 2, 2)}
    repetition = scores_of(start, spec(repetition_penalty=2.0, **seen))
    assert repetition == [1.0, -4.0, 1.5, -6.0, 1.0, 0.5]
    presence = scores_of(start, spec(presence_penalty=0.5, **seen))
    assert presence == [2.0, -2.0, 2.5, -3.5, 1.0, 0.5]
    frequency = scores_of(start, spec(frequency_penalty=0.5, **seen))
    assert frequency == [2.0, -2.0, 1.5, -4.0, 1.0, 0.5]


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1e6, "prompt_token_ids": (3,)},
        {"presence_penalty": 2.0, "output_token_ids": (3,)},
        {"frequency_penalty": 2.0, "output_token_ids": (3,)},
        {"banned_token_ids": (3,)},
    ],
    ids=str,
)
def test_what_is_penalised_is_chosen_no_more(fields: dict[str, Any]) -> None:
    rows = torch.tensor([[0.0, 1.0, 0.5, 1.5]]).expand(2, -1)
    tokens = sample(rows, [spec(temperature=0.0), spec(temperature=0.0, **fields)])
    assert [token.token_id for token in tokens] == [3, 1]


def test_banned_tokens_are_never_drawn_and_the_logits_stay() -> None:
    rows = logits().expand(500, -1).clone()
    before = rows.clone()
    banned = (int(rows[0].argmax()), 0)
    specs = [spec(seed=seed, banned_token_ids=banned) for seed in range(500)]
    assert not {token.token_id for token in sample(rows, specs)} & set(banned)
    assert torch.equal(rows, before)


def test_logprobs_are_those_of_the_model() -> None:
    rows = logits(1).expand(3, -1)
    expected = rows[0].log_softmax(0)
    best = expected.argsort(descending=True).tolist()
    bare, chosen, top = sample(
        rows,
        [
            spec(temperature=0.0, num_logprobs=-1),
            spec(temperature=0.3, top_k=2, num_logprobs=0),
            spec(temperature=0.0, num_logprobs=3, banned_token_ids=(best[0],)),
        ],
    )
    assert bare.logprob is None
    assert chosen.logprob == pytest.approx(float(expected[chosen.token_id]), abs=1e-6)
    assert chosen.top == ()
    assert top.token_id == best[1]
    assert [entry.token_id for entry in top.top] == best[:3]
    assert [entry.logprob for entry in top.top] == pytest.approx(expected[best[:3]].tolist())


def test_bfloat16_logits_are_sampled_as_float32() -> None:
    rows = logits(2, 500).bfloat16().expand(20, -1)
    specs = [spec(seed=seed, top_p=0.9) for seed in range(20)]
    assert sample(rows, specs) == sample(rows.float(), specs)


def test_rows_with_penalties_and_rows_without_share_a_batch() -> None:
    rows = torch.stack([logits(seed, 300) for seed in range(9)]).bfloat16()
    changes: list[dict[str, Any]] = [
        {},
        {"banned_token_ids": (4, 7)},
        {"repetition_penalty": 1.5, "prompt_token_ids": (1, 2), "output_token_ids": (5,)},
    ]
    specs = [spec(seed=i, **changes[i % 3], **FILTERS[i]) for i in range(9)]
    together = sample(rows, specs)
    alone = [sample(row[None], [one])[0] for row, one in zip(rows, specs, strict=True)]
    assert together == alone


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_without_odds_gives_its_likeliest_token(bad: float) -> None:
    """A model that overflows must not take the engine down with a token that there is not."""
    rows = logits().repeat(2, 1)
    rows[0, 5] = bad
    for fields in FILTERS:
        broken, whole = sample(rows, [spec(**fields)] * 2)
        assert broken.token_id == 5
        assert 0 <= whole.token_id < VOCAB_SIZE


def test_logits_stay_in_their_dtype_where_no_row_needs_another() -> None:
    if native.load():
        pytest.skip("plain torch draws in float32")
    rows = torch.zeros(4, 50_000, dtype=torch.bfloat16)
    specs = [spec(seed=seed, **FILTERS[seed]) for seed in range(4)]
    with torch.profiler.profile(profile_memory=True) as profile:
        sample(rows, specs)
    assert sum(max(0, event.cpu_memory_usage) for event in profile.events()) < 1000


def test_nothing_to_sample_is_fine() -> None:
    assert sample(torch.empty(0, 5), []) == []
