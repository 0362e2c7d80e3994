"""Products that oneDNN packs for: few numbers of rows, and the padding is not seen."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.model.linear import PackedLinear, padded_rows, why_not_packed

LONGEST = 8192  # tokens of a step


@given(st.integers(1, LONGEST))
def test_padding_is_at_most_an_eighth(num_rows: int) -> None:
    padded = padded_rows(num_rows)
    assert num_rows <= padded <= num_rows * 9 / 8
    assert padded_rows(padded) == padded


def test_few_numbers_of_rows_are_left() -> None:
    ladder = sorted({padded_rows(num_rows) for num_rows in range(1, LONGEST + 1)})
    assert ladder[:18] == [*range(1, 17), 18, 20]
    assert len(ladder) == 16 + 8 * 9
    assert not {2**i for i in range(14)} - set(ladder), "usual budgets are not padded"


@pytest.mark.parametrize("num_rows", [1, 16, 17, 31, 100, 257])
@pytest.mark.parametrize("joins_gate_up", [False, True])
def test_padding_is_not_seen(num_rows: int, joins_gate_up: bool) -> None:
    torch.manual_seed(num_rows)
    linear = PackedLinear(torch.randn(64, 24), torch.randn(64), joins_gate_up=joins_gate_up)
    x, residual = torch.randn(1, num_rows, 24), torch.randn(1, num_rows, linear.out_features)
    out = linear(x, residual.clone())
    one_by_one = [linear(x[:, i : i + 1], residual[:, i : i + 1].clone()) for i in range(num_rows)]
    torch.testing.assert_close(out, torch.cat(one_by_one, dim=1))
    assert out.is_contiguous()


COUNTS_COMPILED = """
import torch
from cluster.model.linear import PackedLinear
linear = PackedLinear(torch.randn(64, 32), None)
for num_rows in range(1, 301):
    linear(torch.randn(num_rows, 32))
"""


@pytest.mark.skipif(
    bool(why_not_packed(torch.float32, torch.device("cpu"))), reason="nothing is packed here"
)
def test_onednn_compiles_for_each_rung_once() -> None:
    """Each costs 0.5 MiB for good: without the ladder 300, and a server grows for minutes."""
    done = subprocess.run(
        [sys.executable, "-c", COUNTS_COMPILED],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "ONEDNN_VERBOSE": "2"},
    )
    compiled = [
        line
        for line in done.stdout.splitlines()
        if "create:cache_miss" in line and "reorder" not in line
    ]
    assert len(compiled) == len({padded_rows(num_rows) for num_rows in range(1, 301)})
