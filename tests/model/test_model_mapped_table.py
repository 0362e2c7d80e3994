from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from cluster.model.mapped_table import TRIM_ROWS, keep_in_file

ROWS, SIZE = 40_000, 256  # 20 MB


def _resident_bytes(path: Path) -> int:
    """Return what of a file is mapped into this process and resident."""
    total, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            is_ours = line.endswith(str(path))
        elif is_ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_a_mapped_table_is_read_rightly_and_leaves_the_process(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    table = torch.randn(ROWS, SIZE).bfloat16()
    save_file({"table": table}, path)
    with safe_open(path, framework="pt") as file:
        mapped = file.get_slice("table")[:]
    embedding = nn.Embedding.from_pretrained(mapped)
    ids = torch.randint(0, ROWS, (TRIM_ROWS - 1,))
    embedding(ids)
    assert _resident_bytes(path) > 2**20
    assert keep_in_file(embedding)
    for _ in range(3):
        ids = torch.randint(0, ROWS, (TRIM_ROWS,))
        assert torch.equal(embedding(ids), table[ids])
        assert _resident_bytes(path) < 2**17


def test_a_table_in_memory_is_left_alone() -> None:
    embedding = nn.Embedding.from_pretrained(torch.randn(ROWS, SIZE))
    before = embedding.weight.clone()
    assert not keep_in_file(embedding)
    for _ in range(3):
        embedding(torch.arange(TRIM_ROWS))
    assert torch.equal(embedding.weight, before)
