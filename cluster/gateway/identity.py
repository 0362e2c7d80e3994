"""Who calls: decided by credentials alone, never by what a request says of itself."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from cluster.clock import Clock, WallClock
from cluster.config import AuthConfig
from cluster.errors import ConfigError, UnauthenticatedError
from cluster.gateway.rate_limit import NO_LIMITS, RateLimits
from cluster.gateway.tenants import Tenant, Tenants, read_tenants
from cluster.gateway.web_token import WebTokens

logger = logging.getLogger(__name__)

_LOOK_INTERVAL_S = 1.0  # between two looks whether the files have changed
_CERTIFICATE_NAMES = ("x509_common_name", "x509_subject_alternative_name")
_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom a call comes from; without authentication everybody is this one."""

    tenant: str = ""  # name; empty without authentication
    salt: bytes = field(default=b"", repr=False)  # of block hashes; who shares it shares blocks
    is_admin: bool = True  # may flush caches, and see what belongs to others
    weight: float = 1.0  # of its fair share, > 0
    limits: RateLimits = NO_LIMITS  # what it may ask for in a time


class Authenticator:
    """Turns credentials into callers; reads its files again when they change.

    Args:
        config: Which files; without `tenants_file` every caller is the same one.
        clock: When files are looked at; None is the wall's.

    Raises:
        ConfigError: A file cannot be used.
    """

    def __init__(self, config: AuthConfig, *, clock: Clock | None = None) -> None:
        self._config = config
        self._clock = clock or WallClock()
        if config.jwt_key_file and not config.tenants_file:
            raise ConfigError(
                "auth.jwt_key_file without auth.tenants_file: nobody would be asked for a token; "
                "name the tenants in a file",
                field="auth.jwt_key_file",
            )
        self._stamp: _Stamp = ()
        if config.tenants_file:
            self._stamp = self._look()
            self._tenants, self._web_tokens = self._read()
        self._looked_s = self._clock.now()

    def authenticate(
        self, metadata: Iterable[tuple[str, str | bytes]], auth_context: Mapping[str, Any]
    ) -> Caller:
        """Return whom credentials belong to.

        Args:
            metadata: Of the call; `authorization: Bearer <API key or web token>` is read.
            auth_context: gRPC's, of the connection: names of the certificate that it has verified.

        Raises:
            UnauthenticatedError: There are none, one of them is not known, or they disagree.
        """
        if not self._config.tenants_file:
            return Caller()
        self._reread()
        found = [self._of_bearer(value) for key, value in metadata if key == "authorization"]
        found += self._of_certificate(auth_context)
        if not found:
            raise UnauthenticatedError(
                "no credentials of a tenant: send `authorization: Bearer <API key>`, a token, or a "
                "client certificate that is registered"
            )
        first = found[0]
        if any(tenant is not first for tenant in found):
            raise UnauthenticatedError("the credentials name different tenants: send one's own")
        return Caller(first.name, first.salt, first.admin, first.weight, first.limits)

    def salt_of(self, tenant: str) -> bytes | None:
        """Return the salt of a tenant by name; None where there is no such tenant (any more)."""
        if not self._config.tenants_file:
            return None if tenant else b""
        self._reread()
        known = self._tenants.named(tenant)
        return None if known is None else known.salt

    def weight_of(self, tenant: str) -> float:
        """Return the weight of a tenant's fair share; 1 where there is no such tenant."""
        if not self._config.tenants_file:
            return 1.0
        self._reread()
        known = self._tenants.named(tenant)
        return 1.0 if known is None else known.weight

    def _of_bearer(self, value: str | bytes) -> Tenant:
        scheme, _, credential = value.partition(" ") if isinstance(value, str) else ("", "", "")
        if scheme.lower() != "bearer" or not credential.strip():
            raise UnauthenticatedError("authorization is not understood: send `Bearer <API key>`")
        credential = credential.strip()
        tenant = self._tenants.with_key(credential)
        if tenant is None and self._web_tokens is not None and credential.count(".") == 2:
            tenant = self._tenants.named(self._web_tokens.tenant_name(credential))
        if tenant is None:
            raise UnauthenticatedError("the bearer token is none that is known here")
        return tenant

    def _of_certificate(self, auth_context: Mapping[str, Any]) -> list[Tenant]:
        # gRPC asks for a certificate only to verify it (listen.py): what is here is proven. One
        # that names no tenant is no credential; its holder may still show a key.
        names = [name for key in _CERTIFICATE_NAMES for name in auth_context.get(key, ())]
        found = (self._tenants.with_certificate(name.decode(errors="replace")) for name in names)
        return [tenant for tenant in found if tenant is not None]

    def _reread(self) -> None:
        """Take a new version of the files; one that cannot be used is reported once."""
        now_s = self._clock.now()
        if now_s - self._looked_s < _LOOK_INTERVAL_S:
            return
        self._looked_s = now_s
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._tenants, self._web_tokens = self._read()
        except ConfigError as error:
            logger.error("%s; the version before it stays in force", error)
        else:
            logger.info("auth.tenants_file was read again")

    def _read(self) -> tuple[Tenants, WebTokens | None]:
        tenants = read_tenants(Path(self._config.tenants_file))
        if not self._config.jwt_key_file:
            return tenants, None
        try:
            key = Path(self._config.jwt_key_file).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"auth.jwt_key_file: {error.strerror}: give a file that this process may read",
                field="auth.jwt_key_file",
            ) from None
        return tenants, WebTokens(key, self._config)

    def _look(self) -> _Stamp:
        """Return what differs when a file was written or replaced."""
        return tuple(
            _stat(Path(path))
            for path in (self._config.tenants_file, self._config.jwt_key_file)
            if path
        )


def _stat(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0, 0)
    return status.st_mtime_ns, status.st_ino, status.st_size


def caller_of(authenticator: Authenticator, context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
    """Return whom a gRPC call comes from.

    Raises:
        UnauthenticatedError: Its credentials do not say.
    """
    return authenticator.authenticate(context.invocation_metadata() or (), context.auth_context())
