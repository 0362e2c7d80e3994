"""Keeps an embedding table in its file: pages that were looked at leave the process again.

The kernel maps 16 pages around each row that is read, so that some thousand tokens bring a whole
table into the process: 270 MB of a 0.5B model, beside the packed head of the same weights. Given
back every few hundred rows, they stay in the page cache and cost a microsecond to map again.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import Any

from torch import Tensor, nn

TRIM_ROWS = 256
"""Rows that are looked up between two trims: at most 16 MB with pages of 4 KiB."""


def keep_in_file(embedding: nn.Embedding) -> bool:
    """Let `embedding` give back the pages of its table; return whether it is a mapped file's.

    A table that lies elsewhere is left alone.
    """
    table = embedding.weight
    first = -(-table.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (table.data_ptr() + table.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if table.device.type != "cpu" or end <= first or not _is_mapped_file(first, end):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    num_rows = 0

    def trim(_module: nn.Module, inputs: tuple[Any, ...], _output: Tensor) -> None:
        nonlocal num_rows
        num_rows += inputs[0].numel()
        if num_rows >= TRIM_ROWS:
            num_rows = 0
            # Clean pages of a file: they are dropped, and read from it when they are used again.
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)

    embedding.register_forward_hook(trim)
    return True


def _is_mapped_file(first: int, end: int) -> bool:
    """Return whether [first, end) is of one mapped file; anonymous memory would be lost."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        begin, _, stop = fields[0].partition("-")
        if int(begin, 16) <= first < int(stop, 16):
            return end <= int(stop, 16) and len(fields) == 6 and fields[5].startswith("/")
    return False
