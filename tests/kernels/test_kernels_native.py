from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.kernels import native

AVX2 = {"avx2", "fma", "f16c", "bmi2"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
BF16 = AVX512 | {"avx512_vnni", "avx512_bf16"}
HERE = Path(__file__).parent


@pytest.fixture
def fresh() -> Iterator[None]:
    """Let `native` choose and build again, and forget it afterwards."""
    native._load.cache_clear()
    yield
    native._load.cache_clear()


@pytest.mark.parametrize(
    ("forced", "features", "chosen"),
    [
        ("", BF16, "avx512_bf16"),
        ("", AVX512, "avx512"),
        ("", AVX2, "avx2"),
        ("avx2", BF16, "avx2"),
        ("", {"sse2"}, ""),
        ("", set(), ""),
        ("torch", BF16, ""),
    ],
)
def test_isa_is_the_best_that_the_cpu_has_or_the_forced_one(
    forced: str, features: set[str], chosen: str
) -> None:
    isa, reason = native.choose_isa(forced, features)
    assert isa == chosen
    assert bool(reason) == (not chosen)


@pytest.mark.parametrize("forced", ["avx512_bf16", "sse9"])
def test_isa_that_the_cpu_lacks_is_refused(forced: str) -> None:
    with pytest.raises(ConfigError, match=f"{forced}: this CPU offers avx2, torch"):
        native.choose_isa(forced, AVX2)


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler_plain_torch_serves_and_the_log_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLUICE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.delenv("SLUICE_KERNELS", raising=False)
    monkeypatch.setattr(native, "cpu_features", lambda: AVX2)
    assert "there is no C++ compiler" in native.load()
    assert "there is no C++ compiler" in native.load()
    assert native.isa() == ""
    assert [record.message for record in caplog.records] == [
        f"CPU kernels: plain torch, slower, because {native.load()}"
    ]


@pytest.mark.usefixtures("fresh")
def test_what_the_compiler_says_is_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.cpp").write_text("int f( {")
    monkeypatch.setattr(native, "SOURCES", tmp_path)
    monkeypatch.setenv("SLUICE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SLUICE_KERNELS", raising=False)
    monkeypatch.setattr(native, "cpu_features", lambda: AVX2)
    assert "broken.cpp" in native.load()
    leftovers = [p.name for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert leftovers == ["lock"]  # nothing half-built that a later start could load


def test_key_changes_with_sources_and_instruction_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no compiler")
    monkeypatch.setattr(native, "SOURCES", tmp_path)
    (tmp_path / "a.cpp").write_text("int a;")
    first = native._key("avx2")
    assert first == native._key("avx2") != native._key("avx512")
    (tmp_path / "a.h").write_text("int b;")
    assert native._key("avx2") != first


@pytest.mark.integration
@pytest.mark.parametrize("kernels", [*native.ISA_FLAGS, "torch"])
def test_all_kernels_equal_the_oracle_on_each_instruction_set(kernels: str) -> None:
    """The tests of this folder again, in a process that loads that variant."""
    try:
        native.choose_isa(kernels, native.cpu_features())
    except ConfigError as error:
        pytest.skip(str(error))
    run = (
        "import sys, pytest; from cluster.kernels import native; "
        "assert (native.isa() or 'torch') == sys.argv[1], native.load(); "
        "sys.exit(pytest.main(sys.argv[2:]))"
    )
    options = ["-q", "-m", "not integration and not gpu", "-p", "no:cacheprovider", str(HERE)]
    done = subprocess.run(
        [sys.executable, "-c", run, kernels, *options],
        env={**os.environ, "SLUICE_KERNELS": kernels},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
