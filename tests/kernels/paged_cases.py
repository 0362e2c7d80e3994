"""Steps on a poisoned paged cache, for kernels that are called directly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from attention_cases import Shape, filled, make_spans, strided_queries
from torch import Tensor

from cluster.kernels.kv_cache import LayerCache
from cluster.kernels.ops import PagedBatch, SequenceSpan, plan_batch
from cluster.kernels.reference import paged_attention_reference

MIXED = [(1, 0), (5, 0), (1, 30), (9, 7), (1, 3), (16, 0), (1, 12), (2, 33)]
DECODES = [(1, 0), (1, 40), (1, 3), (1, 17), (1, 18), (1, 150)]
LONG = [(1, 700), (3, 500), (40, 130)]  # several tiles of keys, and of rows
LONG_DECODES = [(1, 700), (1, 65), (1, 1100)]
"""(New tokens, tokens before) of each sequence."""


@dataclass(frozen=True)
class PagedCase:
    """One step's attention."""

    q_TNH: Tensor
    layer: LayerCache
    batch: PagedBatch
    spans: list[SequenceSpan]

    def expected(self, **options: Any) -> Tensor:
        """What the oracle says; options as in `ops.paged_attention`."""
        rows = [(span.num_new, span.num_computed, span.block_table) for span in self.spans]
        return paged_attention_reference(self.q_TNH, self.layer, rows, **options)


def make_case(lengths: list[tuple[int, int]], shape: Shape) -> PagedCase:
    """Return a step; one shape, one step."""
    torch.manual_seed(0)
    spans = make_spans(lengths, shape.block_size)
    layer = filled(shape, spans)
    q_TNH = strided_queries(shape, sum(new for new, _ in lengths))
    return PagedCase(q_TNH, layer, plan_batch(spans, shape.block_size, shape.device), spans)
