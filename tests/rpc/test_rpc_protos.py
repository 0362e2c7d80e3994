"""The generated code is in step with protos/, and the protos are clean."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUF = "@bufbuild/buf@1.50.0"


def test_generated_code_is_in_step_with_the_protos(tmp_path: Path) -> None:
    subprocess.run(
        [ROOT / "scripts" / "protos", tmp_path],
        check=True,
        env=os.environ | {"PYTHON": sys.executable},
    )
    generated = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.py*"))
    committed = ROOT / "cluster" / "rpc" / "sluice"
    assert generated == sorted(
        p.relative_to(committed.parent)
        for p in committed.rglob("*.py*")
        if p.suffix in (".py", ".pyi")
    )
    for path in generated:
        expected = (committed.parent / path).read_text()
        assert (tmp_path / path).read_text() == expected, f"run scripts/protos: {path} is old"


@pytest.mark.integration
def test_protos_pass_buf_lint() -> None:
    npx = shutil.which("npx")
    if npx is None:
        pytest.skip("npx is missing: buf lint was not run")
    fetched = subprocess.run(
        [npx, "--yes", BUF, "--version"], capture_output=True, text=True, timeout=240
    )
    if fetched.returncode:
        pytest.skip(f"{BUF} cannot be fetched: buf lint was not run")
    result = subprocess.run(
        [npx, "--yes", BUF, "lint", "protos"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
