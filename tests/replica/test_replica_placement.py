from __future__ import annotations

import pytest

from cluster.config import load_config
from cluster.errors import ConfigError
from cluster.replica.placement import check_devices


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["parallel.tp=2"],
        ["model.device=cuda", "parallel.num_gpus_per_worker=1"],
        ["model.device=cuda", "parallel.num_gpus_per_worker=0.5"],
        ["model.device=cuda", "parallel.num_gpus_per_worker=1", "parallel.tp=2", "parallel.pp=2"],
    ],
)
def test_workers_on_what_they_reserve_are_served(overrides: list[str]) -> None:
    check_devices(load_config(None, overrides))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.num_gpus_per_worker=1"], "or model.device=cuda"),
        (["model.device=cuda"], "hides every GPU"),
        (["model.device=cuda", "parallel.num_gpus_per_worker=2"], "raise parallel.tp"),
        (
            ["model.device=cuda", "parallel.num_gpus_per_worker=0.5", "parallel.pp=2"],
            "a GPU for each rank",
        ),
    ],
)
def test_what_is_reserved_in_vain_is_named(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        check_devices(load_config(None, overrides))
    assert caught.value.field == "parallel.num_gpus_per_worker"
