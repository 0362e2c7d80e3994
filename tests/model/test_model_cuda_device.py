from __future__ import annotations

import pytest
import torch

from cluster.errors import ConfigError
from cluster.model.cuda_device import RESERVE_BYTES, check_gpu_memory, open_device

GPU = torch.device("cuda", 0)


def test_cpu_is_opened_as_it_is() -> None:
    assert open_device("cpu") == torch.device("cpu")


def test_missing_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"no CUDA device.*use model\.device=cpu") as caught:
        open_device("cuda")
    assert caught.value.field == "model.device"


def test_share_that_does_not_fit_is_refused_with_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    free = RESERVE_BYTES + 1000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (free, 2 * free))
    check_gpu_memory(GPU, weight_bytes=600, cache_bytes=400)
    with pytest.raises(ConfigError, match=r"takes 401 bytes, limit=400 .*600 of weights") as caught:
        check_gpu_memory(GPU, weight_bytes=600, cache_bytes=401)
    assert caught.value.field == "cache.num_blocks"
    with pytest.raises(ConfigError, match=r"take 1001 bytes.*parallel\.tp") as caught:
        check_gpu_memory(GPU, weight_bytes=1001, cache_bytes=1)
    assert caught.value.field == "model.path"


def test_memory_of_a_cpu_is_not_asked_of_a_gpu() -> None:
    check_gpu_memory(torch.device("cpu"), weight_bytes=2**60, cache_bytes=2**60)
