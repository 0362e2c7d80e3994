from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from cluster.config import load_config
from cluster.replica.step_time_file import StepTimeFile, identity_of

STEPS = [(8.0, 8.0, 4000.0, 0.0, 0.05), (264.0, 9.0, 4000.0, 32768.0, 0.6)]


def identity(*overrides: str, fingerprint: bytes = b"model") -> dict[str, object]:
    return identity_of(load_config(None, list(overrides)), fingerprint=fingerprint)


def test_saved_steps_are_loaded_again(tmp_path: Path) -> None:
    folder = tmp_path / "not there yet"
    assert list(StepTimeFile(identity(), folder).load()) == []
    StepTimeFile(identity(), folder).save(STEPS)
    assert list(StepTimeFile(identity(), folder).load()) == STEPS
    assert [file.suffix for file in folder.iterdir()] == [".json"], "nothing is left behind"


@pytest.mark.parametrize(
    "other",
    [
        identity(fingerprint=b"other"),
        identity("model.dtype=float32"),
        identity("model.quantization=int8"),
        identity("cache.dtype=int8"),
        identity("parallel.tp=2"),
        identity("parallel.pp=2"),
        identity("parallel.threads_per_worker=7"),
        {**identity(), "machine": "another CPU"},
    ],
)
def test_steps_of_another_model_layout_or_machine_are_not_found(
    tmp_path: Path, other: dict[str, object]
) -> None:
    StepTimeFile(other, tmp_path).save(STEPS)
    assert list(StepTimeFile(identity(), tmp_path).load()) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        json.dumps({"identity": {**identity(), "machine": "x"}, "steps": STEPS}).encode(),
        json.dumps({"identity": identity(), "steps": [[1, 2, 3]]}).encode(),
        json.dumps({"identity": identity(), "steps": [[1, 1, 1, 1, 0]]}).encode(),
        json.dumps({"identity": identity(), "steps": [[1, 1, -1, 1, 1]]}).encode(),
        json.dumps({"identity": identity(), "steps": [[1, 1, float("nan"), 1, 1]]}).encode(),
        json.dumps({"identity": identity(), "steps": [["x"] * 5]}).encode(),
        json.dumps({"identity": identity(), "steps": 5}).encode(),
        b" " * (4 * 2**20 + 1),
    ],
    ids=lambda content: repr(content[-20:]),
)
def test_corrupt_or_foreign_file_is_ignored_with_a_word(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file = StepTimeFile(identity(), tmp_path)
    file.path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert list(file.load()) == []
    assert str(file.path) in caplog.text


def test_folder_that_cannot_be_written_is_no_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    StepTimeFile(identity(), tmp_path / "file").save(STEPS)
    assert "not saved" in caplog.text


def test_folder_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_CACHE_DIR", str(tmp_path))
    assert StepTimeFile(identity()).path.parent == tmp_path / "step_time"
    monkeypatch.delenv("SLUICE_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert StepTimeFile(identity()).path.is_relative_to(tmp_path / "home" / ".cache" / "sluice")
