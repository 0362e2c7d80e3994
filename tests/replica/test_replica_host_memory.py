from __future__ import annotations

import contextlib
import gc
import mmap
import os

import pytest
import torch

from cluster.errors import ConfigError
from cluster.replica.host_memory import HostMemory


def rss_bytes() -> int:
    with open("/proc/self/statm") as file:  # noqa: PTH123 - not a file that Path would close sooner
        return int(file.read().split()[1]) * mmap.PAGESIZE


def test_slots_are_zeros_and_shared_by_descriptor() -> None:
    memory = HostMemory(3, 100)
    assert memory.slots.shape == (3, 100) and memory.slots.dtype == torch.uint8
    assert not memory.slots.any()
    other = mmap.mmap(memory.fd, 0)
    memory.slots[2].fill_(7)
    assert other[200:300] == b"\7" * 100 and other[100:200] == bytes(100)
    other[0:4] = b"abcd"
    assert bytes(memory.view()[:4]) == b"abcd" == memory.slots[0, :4].numpy().tobytes()
    memory.close()


def test_file_has_no_name() -> None:
    memory = HostMemory(1, 10)
    assert os.fstat(memory.fd).st_nlink == 0
    memory.close()


def test_memory_is_taken_by_use_and_free_after_close() -> None:
    before = rss_bytes()
    memory = HostMemory(64, 2**20)
    assert rss_bytes() - before < 8 * 2**20
    memory.slots[:32].fill_(1)
    assert rss_bytes() - before > 24 * 2**20
    fd, file_id = memory.fd, os.fstat(memory.fd).st_ino
    memory.close()
    memory.close()  # again is fine
    del memory
    gc.collect()
    assert rss_bytes() - before < 8 * 2**20
    with contextlib.suppress(OSError):  # the number may be another file's by now
        assert os.fstat(fd).st_ino != file_id


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lower cache\.host_memory_bytes") as caught:
        HostMemory(2**20, 2**42)
    assert caught.value.field == "cache.host_memory_bytes"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_page_locked_memory_is_known_to_the_device() -> None:
    memory = HostMemory(4, 2**20, page_locked=True)
    memory.slots[1].fill_(5)
    assert bool((memory.slots[1].to("cuda", non_blocking=True) == 5).all())
    memory.close()
