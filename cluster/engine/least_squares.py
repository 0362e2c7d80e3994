"""Least squares with coefficients that may not be negative."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def solve_non_negative(gram_FF: Array, moment_F: Array) -> Array:
    """Return the x >= 0 that makes x'Gx - 2m'x smallest.

    Source: Bro and De Jong, "A fast non-negativity-constrained least squares algorithm", 1997.

    Args:
        gram_FF: G = A'A, symmetric and positive definite, [features, features].
        moment_F: m = A'b, [features].
    """
    num_features = len(moment_F)
    # Features differ by orders of magnitude: solved in units in which G has ones on its diagonal.
    unit_F = np.sqrt(np.diag(gram_FF))
    gram_FF = gram_FF / unit_F / unit_F[:, None]
    moment_F = moment_F / unit_F
    tolerance = 1e-10 * max(1.0, float(np.abs(moment_F).max()))
    x_F = np.zeros(num_features)
    is_free = np.zeros(num_features, dtype=bool)  # the others are held at zero
    for _ in range(3 * num_features):  # it ends much earlier; rounding must not make it endless
        gradient_F = np.where(is_free, -np.inf, moment_F - gram_FF @ x_F)
        steepest = int(gradient_F.argmax())
        if gradient_F[steepest] <= tolerance:
            break
        is_free[steepest] = True
        x_F = _solve_free(gram_FF, moment_F, x_F, is_free)
    return np.asarray(x_F / unit_F)


def _solve_free(gram_FF: Array, moment_F: Array, x_F: Array, is_free: NDArray[np.bool_]) -> Array:
    """Return the solution in the free coefficients; those that hit zero on the way are held."""
    while is_free.any():
        free = np.flatnonzero(is_free)
        trial_F = np.zeros_like(x_F)
        trial_F[free] = np.linalg.solve(gram_FF[np.ix_(free, free)], moment_F[free])
        falling = free[trial_F[free] <= 0]
        if not falling.size:
            return trial_F
        shares = x_F[falling] / (x_F[falling] - trial_F[falling] + 1e-300)
        x_F = x_F + shares.min() * (trial_F - x_F)
        is_free[falling[shares == shares.min()]] = False
        x_F[~is_free] = 0.0
    return np.zeros_like(x_F)
