"""Where a gateway listens: address, port, TLS files; what can be wrong with them."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import grpc

from cluster.config import GatewayConfig
from cluster.errors import ConfigError


def bind(server: grpc.aio.Server, config: GatewayConfig) -> int:
    """Let a server listen; return its port.

    Raises:
        ConfigError: The port or the TLS files cannot be used.
    """
    if config.num_replicas == 1:
        check_port_free(config)
    check_tls_files(config)
    address = f"{config.host}:{config.port}"
    try:
        if not config.tls_cert:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, _credentials(config))
    except RuntimeError as error:
        raise _port_error(config, "cannot be bound, or the TLS files do not fit") from error


def check_port_free(config: GatewayConfig) -> None:
    """Raise if somebody listens: with SO_REUSEPORT two servers would share clients in silence.

    Raises:
        ConfigError: The port is taken, or the address is not of this machine.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host.strip("[]"), config.port))
        except OSError as error:
            reason = f"in use or not ours ({error.strerror})"
            raise _port_error(config, reason) from error


def check_tls_files(config: GatewayConfig) -> None:
    """Raise if a TLS file is missing, no PEM, or certificate and key do not belong together.

    Raises:
        ConfigError: Naming the file's knob.
    """
    if not config.tls_cert:
        if config.tls_client_ca:
            raise ConfigError(
                f"gateway.tls_client_ca={config.tls_client_ca} without gateway.tls_cert: plain "
                "text asks for no certificates; set gateway.tls_cert and gateway.tls_key too",
                field="gateway.tls_client_ca",
            )
        return
    for name in ("tls_cert", "tls_key", "tls_client_ca"):
        path = getattr(config, name)
        if path and b"-----BEGIN" not in _read(path, name):
            raise _tls_error(name, path, "no PEM file")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # an empty password: a key that has one is refused here instead of asking the terminal
        context.load_cert_chain(config.tls_cert, config.tls_key, password="")
    except (ssl.SSLError, ValueError) as error:
        raise _tls_error(
            "tls_cert", config.tls_cert, f"does not go with its key: {error}"
        ) from None
    if config.tls_client_ca:
        try:
            context.load_verify_locations(config.tls_client_ca)
        except ssl.SSLError as error:
            reason = f"holds no certificate: {error}"
            raise _tls_error("tls_client_ca", config.tls_client_ca, reason) from None


def _credentials(config: GatewayConfig) -> grpc.ServerCredentials:
    key, cert = _read(config.tls_key, "tls_key"), _read(config.tls_cert, "tls_cert")
    client_ca = _read(config.tls_client_ca, "tls_client_ca") if config.tls_client_ca else None
    return grpc.ssl_server_credentials(
        [(key, cert)], root_certificates=client_ca, require_client_auth=client_ca is not None
    )


def _read(path: str, name: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _tls_error(name, path, str(error.strerror)) from error


def _tls_error(name: str, path: str, reason: str) -> ConfigError:
    field = f"gateway.{name}"
    return ConfigError(f"{field}={path}: {reason}: give a PEM file", field=field)


def _port_error(config: GatewayConfig, reason: str) -> ConfigError:
    return ConfigError(
        f"gateway.port={config.port}: {reason} on {config.host}: "
        "choose another, or stop who listens there",
        field="gateway.port",
    )
