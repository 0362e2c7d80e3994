"""Eight 4-bit codes in a word of 32 bits, the first lowest."""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.model.quantization.stored import CODES_PER_WORD


def pack_words(codes: Tensor) -> Tensor:
    """Return codes packed along the last dim, the end filled up with zeros.

    Args:
        codes: uint8 in [0, 15], [..., N].

    Returns:
        int32 [..., ceil(N / 8)].
    """
    if rest := -codes.shape[-1] % CODES_PER_WORD:
        codes = torch.nn.functional.pad(codes, (0, rest))
    # The lowest byte of a word comes first in memory on every machine that torch runs on.
    packed = codes[..., ::2] | (codes[..., 1::2] << 4)
    return packed.clone(memory_format=torch.contiguous_format).view(torch.int32)


def unpack_words(words: Tensor) -> Tensor:
    """Return what `pack_words` packed, with the fill.

    Args:
        words: int32 [..., W].

    Returns:
        uint8 in [0, 15], [..., 8 * W].
    """
    packed = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
