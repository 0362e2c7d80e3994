from __future__ import annotations

from itertools import chain, combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine.least_squares import solve_non_negative


def loss(gram: np.ndarray, moment: np.ndarray, x: np.ndarray) -> float:
    return float(x @ gram @ x - 2 * moment @ x)


def best_by_trying(gram: np.ndarray, moment: np.ndarray) -> float:
    """The smallest loss over all choices of coefficients that are not zero."""
    indices = range(len(moment))
    best = 0.0  # of no coefficient at all
    for free in chain.from_iterable(combinations(indices, n) for n in range(1, len(moment) + 1)):
        x = np.zeros(len(moment))
        x[list(free)] = np.linalg.solve(gram[np.ix_(free, free)], moment[list(free)])
        if (x >= 0).all():
            best = min(best, loss(gram, moment, x))
    return best


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.floats(1e-4, 1e4))
def test_solution_is_the_best_one_that_is_not_negative(
    seed: int, num_features: int, unit: float
) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(20, num_features)) + 3 * rng.normal(size=(20, 1))  # alike
    rows *= np.geomspace(1, unit, num_features)
    gram = rows.T @ rows + 1e-6 * np.diag(np.diag(rows.T @ rows))
    moment = rows.T @ rng.normal(size=20)
    x = solve_non_negative(gram, moment)
    assert (x >= 0).all()
    best = best_by_trying(gram, moment)
    assert loss(gram, moment, x) <= best + 1e-6 * abs(best)


def test_coefficient_that_was_chosen_first_can_end_at_zero() -> None:
    one, two, three = np.eye(3)
    both = one + two + 0.5 * three  # looks best at first
    rows = np.stack([both, one, two], axis=1)
    target = one + two - 0.1 * three
    x = solve_non_negative(rows.T @ rows, rows.T @ target)
    assert np.allclose(x, [0.0, 1.0, 1.0])
