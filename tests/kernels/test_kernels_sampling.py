from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.kernels import native
from cluster.kernels.sampling import Draw, argmax, is_native, sample_native
from cluster.model.sampler import _keep_likeliest
from cluster.step import SampleSpec

TOLERANCE = 1e-6  # of a row's mass: odds are float32 in the kernels, float64 in the oracle
LAST = 1 - 2**-53  # the largest number that is drawn
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    if native.load():
        pytest.skip(native.load())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Filter(NamedTuple):
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def shares_of(logits_V: Tensor, wanted: Filter) -> Tensor:
    """Return the probabilities of what is kept, by plain torch in float64."""
    temperature, top_k, top_p, min_p = wanted
    scores_1V = logits_V.float()[None] / torch.tensor(temperature)
    spec = SampleSpec(0, 0, temperature, top_k, top_p, min_p, 1.0, 0.0, 0.0, -1)
    if top_k > 0 or top_p < 1:
        scores_1V = _keep_likeliest(scores_1V, [spec])
    odds_V = (scores_1V[0] - scores_1V.max()).double().exp()
    odds_V = odds_V.masked_fill(odds_V < min_p, 0)
    return odds_V / odds_V.sum()


def is_drawn(shares_V: Tensor, token_ids: list[int], uniforms: list[float]) -> bool:
    """Return whether each number lies in its token's part of the CDF, and each token is kept."""
    token_ids_n = torch.tensor(token_ids)
    ends_n = shares_V.cumsum(0)[token_ids_n]
    starts_n = ends_n - shares_V[token_ids_n]
    u_n = torch.tensor(uniforms, dtype=torch.float64)
    is_inside_n = (starts_n - TOLERANCE <= u_n) & (u_n <= ends_n + TOLERANCE)
    return bool((is_inside_n & (shares_V[token_ids_n] > 0)).all())


def check(logits_V: Tensor, wanted: Filter, extra_uniforms: tuple[float, ...] = ()) -> None:
    """Draw at the middle of each token's share, and at the ends of the range.

    A token that the kernels keep and the oracle does not, or the reverse, shifts every share beside
    it. Where it is nearer to top-p or min-p than rounding, either answer is right.
    """
    shares_V = shares_of(logits_V, wanted)
    middles = (shares_V.cumsum(0) - shares_V / 2).clamp(max=LAST).unique().tolist()
    uniforms = [0.0, LAST, *middles, *extra_uniforms]
    draws = [Draw(0, *wanted, uniform=u) for u in uniforms]
    token_ids = sample_native(logits_V[None], draws).tolist()
    at_borders = (
        wanted._replace(top_p=wanted.top_p * (1 + for_p), min_p=wanted.min_p * (1 + for_min))
        for for_p in (0, -TOLERANCE, TOLERANCE)
        for for_min in (0, -TOLERANCE, TOLERANCE)
    )
    assert any(is_drawn(shares_of(logits_V, at), token_ids, uniforms) for at in at_borders), wanted


def make_logits(shape: str, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal_V = torch.randn(size, generator=generator)
    match shape:
        case "flat":
            return normal_V * 0.01 + 5
        case "peaked":
            return normal_V * 20
        case "tied":
            return normal_V.round() * 0.5
        case "equal":
            return torch.full((size,), -3.25)
        case "masked":
            is_masked_V = torch.rand(size, generator=generator) < 0.5
            is_masked_V[seed % size] = False
            return normal_V.masked_fill(is_masked_V, -torch.inf)
        case "outlier":
            normal_V[seed % size] = -1e9
            return normal_V * 1e-3
        case _:
            return normal_V


SHAPES = ["normal", "flat", "peaked", "tied", "equal", "masked", "outlier"]
FILTERS = [
    Filter(),
    Filter(temperature=0.3),
    Filter(top_k=1),
    Filter(top_k=3),
    Filter(top_k=40),
    Filter(top_k=700),
    Filter(top_p=0.01),
    Filter(top_p=0.9),
    Filter(top_p=0.9999),
    Filter(min_p=0.1),
    Filter(min_p=1.0),
    Filter(1.3, 3, 0.8),
    Filter(0.7, 600, 0.95, 0.02),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wanted", FILTERS, ids=str)
def test_sample_equals_plain_torch(dtype: torch.dtype, shape: str, wanted: Filter) -> None:
    for size in (1, 17, 512, 1700):
        check(make_logits(shape, size, seed=size).to(dtype), wanted)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SHAPES),
    st.integers(1, 1600),
    st.integers(0, 2**16),
    st.sampled_from(DTYPES),
    st.builds(
        Filter,
        st.floats(0.05, 5),
        st.integers(0, 1700) | st.integers(0, 5),
        st.floats(0.001, 1),
        st.floats(0, 1) | st.just(0.0),
    ),
    st.floats(0, LAST),
)
def test_sample_equals_plain_torch_for_any_filter(
    shape: str, size: int, seed: int, dtype: torch.dtype, wanted: Filter, uniform: float
) -> None:
    check(make_logits(shape, size, seed).to(dtype), wanted, (uniform,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wanted", [Filter(top_p=0.9), Filter(top_k=50_000), Filter(0.8, 50, 0.9)])
def test_sample_of_a_whole_vocabulary_equals_plain_torch(
    dtype: torch.dtype, wanted: Filter
) -> None:
    logits_V = make_logits("normal", 151_936, seed=1).to(dtype)
    shares_V = shares_of(logits_V, wanted)
    uniforms = [i / 64 for i in range(64)]
    tokens_n = sample_native(logits_V[None], [Draw(0, *wanted, uniform=u) for u in uniforms])
    assert is_drawn(shares_V, tokens_n.tolist(), uniforms)


def test_scores_that_differ_by_one_bit_are_told_apart() -> None:
    """Narrowing ends only when what is left is equal; the range here spans 40 decades."""
    tiny = [float(torch.tensor(i, dtype=torch.int32).view(torch.float32)) for i in range(1, 30)]
    logits_V = torch.tensor([-80.0, *tiny, -1e-30, -1e-10, -1.0] * 20)
    for top_k in (1, 7, 20, 21, 400, 600):
        check(logits_V, Filter(top_k=top_k))


def test_top_p_at_the_very_mass_of_a_set_keeps_that_set() -> None:
    logits_V = make_logits("normal", 2000, seed=0)
    masses = logits_V.double().softmax(0).sort(descending=True).values.cumsum(0)
    for mass in masses[::100].tolist():
        check(logits_V, Filter(top_p=mass))


def test_ties_at_the_border_keep_the_lowest_ids() -> None:
    logits_V = torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0, 3.0])
    evenly = [i / 40 for i in range(40)]
    for wanted, kept in [
        (Filter(top_k=2), {1, 3}),
        (Filter(top_k=4), {0, 1, 3, 5}),
        (Filter(top_p=0.4), {1, 3}),
        (Filter(top_k=3, top_p=0.5), {1, 3}),
    ]:
        draws = [Draw(0, *wanted, uniform=u) for u in evenly]
        assert set(sample_native(logits_V[None], draws).tolist()) == kept


def test_frequencies_follow_the_distribution() -> None:
    logits_V = make_logits("normal", 12, seed=3)
    generator = torch.Generator().manual_seed(5)
    uniforms = torch.rand(6000, generator=generator, dtype=torch.float64).tolist()
    tokens_n = sample_native(logits_V[None], [Draw(0, 0.8, 0, 1.0, 0.0, u) for u in uniforms])
    counts = Counter(tokens_n.tolist())
    expected = ((logits_V / 0.8).softmax(0) * 6000).tolist()
    chi_square = sum((counts[i] - e) ** 2 / e for i, e in enumerate(expected))
    assert chi_square < 38.0  # 11 degrees of freedom: exceeded once in 10,000 seeds


def test_a_draw_does_not_depend_on_the_rows_beside_it() -> None:
    logits_nV = torch.stack([make_logits(shape, 3000, seed=9) for shape in SHAPES * 2])
    draws = [
        Draw(row, *FILTERS[(3 * row) % len(FILTERS)], uniform=(row + 0.5) / len(logits_nV))
        for row in range(len(logits_nV))
    ]
    torch.set_num_threads(2)
    together = sample_native(logits_nV, draws)
    torch.set_num_threads(1)
    alone = [sample_native(logits_nV, [one])[0] for one in draws]
    padded_nV = torch.cat([torch.ones(len(logits_nV), 1), logits_nV], dim=1)  # another alignment
    moved = sample_native(padded_nV[:, 1:], draws)
    backwards = sample_native(logits_nV, draws[::-1]).flip(0)
    assert together.tolist() == alone == moved.tolist() == backwards.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_argmax_and_temperature_0_take_the_first_of_the_likeliest(dtype: torch.dtype) -> None:
    logits_nV = torch.stack([make_logits(shape, 1030, seed=2) for shape in SHAPES]).to(dtype)
    logits_nV = torch.cat([logits_nV, torch.full((1, 1030), -torch.inf, dtype=dtype)])
    expected = logits_nV.float().argmax(-1).tolist()
    assert argmax(logits_nV).tolist() == expected
    greedy = [Draw(row, 0.0, 5, 0.5, 0.5, 0.9) for row in range(len(logits_nV))]
    assert sample_native(logits_nV, greedy).tolist() == expected


@pytest.mark.parametrize("at", [0, 511, 512, 1029])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("wanted", FILTERS, ids=str)
def test_rows_without_odds_give_what_argmax_gives(at: int, bad: float, wanted: Filter) -> None:
    logits_nV = make_logits("normal", 1030, seed=2).repeat(2, 1)
    logits_nV[0, at] = bad
    tokens_n = sample_native(logits_nV, [Draw(row, *wanted, uniform=0.5) for row in (0, 1)])
    assert tokens_n[0] == at == argmax(logits_nV)[0]
    assert is_drawn(shares_of(logits_nV[1], wanted), [int(tokens_n[1])], [0.5])
    nothing = torch.full((1, 700), -torch.inf)
    assert sample_native(nothing, [Draw(0, *wanted, uniform=0.5)]).tolist() == [0]


def test_numbers_that_no_request_has_stay_within_the_vocabulary() -> None:
    logits_1V = make_logits("masked", 600, seed=1)[None]
    odd = [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-300, 1e300, 2.0]
    draws = [
        Draw(0, temperature, top_k, value, other, uniform)
        for temperature in (math.nan, math.inf, 1e-300, 1.0, 1e300)
        for top_k in (-1, 5, 2**62)
        for value in odd
        for other in odd
        for uniform in (math.nan, -1.0, 0.5, 1.0, math.inf)
    ]
    tokens_n = sample_native(logits_1V, draws)
    assert int(tokens_n.min()) >= 0
    assert int(tokens_n.max()) < 600


def test_what_the_kernels_do_not_take_is_refused() -> None:
    rows = torch.zeros(2, 8)
    with pytest.raises(RuntimeError, match="row 2 of 2"):
        sample_native(rows, [Draw(2, 1.0, 0, 1.0, 0.0, 0.5)])
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        sample_native(rows.double(), [Draw(0, 1.0, 0, 1.0, 0.0, 0.5)])
    assert not is_native(rows.half())
    assert argmax(rows.half()).tolist() == [0, 0]
    assert sample_native(rows, []).tolist() == []
    strided = torch.stack([rows, torch.eye(2, 8)], dim=-1)[:, :, 1]
    assert argmax(strided).tolist() == [0, 1]
