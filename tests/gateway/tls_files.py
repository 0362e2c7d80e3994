"""Certificates that tests make for themselves."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def make_certificate(
    folder: Path, name: str, *, subject: str = "IP:127.0.0.1", password: str = ""
) -> tuple[str, str]:
    """Write a self-signed certificate for a subject; return its file and the key's."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: apt-get install openssl")
    cert, key = str(folder / f"{name}.pem"), str(folder / f"{name}.key")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-days", "1"),
            *("-subj", f"/CN={name}", "-addext", f"subjectAltName={subject}"),
            *(("-passout", f"pass:{password}") if password else ("-nodes",)),
            *("-keyout", key, "-out", cert),
        ],
        check=True,
        capture_output=True,
    )
    return cert, key
