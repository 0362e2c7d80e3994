"""Which files in shared memory `sluice bench chaos` takes for its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.bench.chaos_shared import SharedFiles


class Mapped:
    """What the processes of a run map; counts how often it is asked."""

    def __init__(self) -> None:
        self.paths: set[str] = set()
        self.num_asked = 0

    def __call__(self) -> set[str]:
        self.num_asked += 1
        return self.paths


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


@pytest.mark.parametrize(
    "name", ["deepspeed_allreduce_buffer_0", "psm_1", "sem.mp-2", "sluice-3", "torch_4"]
)
def test_a_file_is_told_by_its_name_unless_it_was_there_before(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "psm_older", "other")
    shared = SharedFiles(Mapped(), tmp_path)
    assert shared.names() == ()
    touch(tmp_path, name, "psm_older", "stranger")
    assert shared.names() == (name,)
    (tmp_path / name).unlink()
    assert shared.names() == ()


def test_a_file_that_a_process_has_mapped_is_known_when_the_process_has_ended(
    tmp_path: Path,
) -> None:
    touch(tmp_path, "older")
    mapped = Mapped()
    shared = SharedFiles(mapped, tmp_path)
    touch(tmp_path, "plasma", "foreign")
    mapped.paths = {f"{tmp_path}/{name}" for name in ("plasma", "older", "gone")}
    shared.note()
    mapped.paths = set()
    shared.note()
    assert shared.names() == ("plasma",)
    (tmp_path / "plasma").unlink()
    assert shared.names() == ()


def test_processes_are_asked_only_where_a_name_says_nothing(tmp_path: Path) -> None:
    touch(tmp_path, "older")
    mapped = Mapped()
    shared = SharedFiles(mapped, tmp_path)
    touch(tmp_path, "psm_1")
    shared.note()
    assert mapped.num_asked == 0
    touch(tmp_path, "plasma")
    mapped.paths = {f"{tmp_path}/plasma"}
    shared.note()
    assert mapped.num_asked == 1
    shared.note()
    assert mapped.num_asked == 1
