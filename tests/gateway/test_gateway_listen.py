"""What is known of port and TLS files before a gateway starts."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tls_files import make_certificate

from cluster.config import GatewayConfig
from cluster.errors import ConfigError
from cluster.gateway.listen import check_port_free, check_tls_files


def _has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return False
    return True


def test_listen_imports_nothing_heavy() -> None:
    code = (
        "import sys; import cluster.gateway.listen; "
        "print([name for name in ('torch', 'ray', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.integration
@pytest.mark.parametrize(
    ("host", "family", "bound"),
    [
        ("127.0.0.1", socket.AF_INET, "127.0.0.1"),
        ("0.0.0.0", socket.AF_INET, "127.0.0.1"),
        ("localhost", socket.AF_INET, "127.0.0.1"),
        ("[::1]", socket.AF_INET6, "::1"),
        ("::", socket.AF_INET6, "::1"),
    ],
)
def test_taken_port_is_found(host: str, family: socket.AddressFamily, bound: str) -> None:
    if family is socket.AF_INET6 and not _has_ipv6():
        pytest.skip("this machine has no IPv6")
    with socket.socket(family) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as another cluster has
        other.bind((bound, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"gateway.port={port}: in use") as caught:
            check_port_free(GatewayConfig(host=host, port=port))
    assert caught.value.field == "gateway.port"
    check_port_free(GatewayConfig(host=host, port=port))


def test_address_of_another_machine_is_found() -> None:
    with pytest.raises(ConfigError, match=r"not ours .* on 192\.0\.2\.77"):
        check_port_free(GatewayConfig(host="192.0.2.77", port=0))


def _field_of(**files: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_tls_files(GatewayConfig(**files))
    return caught.value.field


def test_tls_files_that_fit_are_fine(tmp_path: Path) -> None:
    check_tls_files(GatewayConfig())
    cert, key = make_certificate(tmp_path, "gateway")
    check_tls_files(GatewayConfig(tls_cert=cert, tls_key=key, tls_client_ca=cert))


@pytest.mark.parametrize("name", ["tls_cert", "tls_key", "tls_client_ca"])
def test_tls_file_that_is_missing_or_no_pem_is_named(tmp_path: Path, name: str) -> None:
    cert, key = make_certificate(tmp_path, "gateway")
    files = {"tls_cert": cert, "tls_key": key, "tls_client_ca": cert}
    assert _field_of(**{**files, name: str(tmp_path / "nowhere.pem")}) == f"gateway.{name}"
    wrong = tmp_path / "wrong.pem"
    wrong.write_bytes(b"\x00\xff no PEM")
    assert _field_of(**{**files, name: str(wrong)}) == f"gateway.{name}"


def test_tls_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path, "gateway")
    _, other_key = make_certificate(tmp_path, "other")
    assert _field_of(tls_cert=cert, tls_key=other_key) == "gateway.tls_cert"
    assert _field_of(tls_cert=cert, tls_key=key, tls_client_ca=key) == "gateway.tls_client_ca"


def test_key_with_a_password_is_refused_without_asking(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path, "gateway", password="s3cret")
    assert _field_of(tls_cert=cert, tls_key=key) == "gateway.tls_cert"


def test_client_authority_without_tls_is_refused(tmp_path: Path) -> None:
    assert _field_of(tls_client_ca=str(tmp_path / "ca.pem")) == "gateway.tls_client_ca"
