"""The tenants file: who may call, with which credentials, and who shares cached blocks with whom.

    tenants:
      - name: team-a
        key_sha256: [<64 hex digits>]       # of each API key; the keys themselves are nowhere
        certificate: [agent.team-a.example] # common names, or DNS and URI names, of certificates
        group: research                     # tenants of one group share; empty: with nobody
        admin: true                         # may flush caches and see the whole store
        weight: 2.0                         # of its fair share of what is computed; 1 by default
        requests_per_minute: 600            # of all gateways together; 0, the default: no limit
        tokens_per_minute: 1000000          # likewise, of prompts and answers
        max_streams: 50                     # likewise, requests that have not ended

What the file holds is not repeated in errors: it may be a key by mistake.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import ConfigError
from cluster.gateway.rate_limit import RateLimits

FIELD = "auth.tenants_file"
_NAME = r"^[a-zA-Z0-9_.@-]{1,128}$"
_SALT_BYTES = 16
_MAX_LIMIT = 10**12  # sums of counters stay whole numbers in every store
_MAX_TENANTS = 10_000  # a gateway reads the file on the loop that streams run on
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, if it was built


class Tenant(BaseModel):
    """One entry of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str = Field(pattern=_NAME)
    key_sha256: tuple[Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")], ...] = ()
    certificate: tuple[Annotated[str, Field(min_length=1, max_length=512)], ...] = ()
    group: str = Field("", pattern=f"^$|{_NAME}")
    admin: bool = False
    weight: float = Field(1.0, ge=1e-6, le=1e6, strict=True)
    requests_per_minute: int = Field(0, ge=0, le=_MAX_LIMIT, strict=True)
    tokens_per_minute: int = Field(0, ge=0, le=_MAX_LIMIT, strict=True)
    max_streams: int = Field(0, ge=0, le=_MAX_LIMIT, strict=True)

    @property
    def limits(self) -> RateLimits:
        """What it may ask for in a time."""
        return RateLimits(self.requests_per_minute, self.tokens_per_minute, self.max_streams)

    @property
    def salt(self) -> bytes:
        """Seed of this tenant's block hashes, 16 bytes: equal for those who share, else distinct.

        A group and a tenant of the same name are different persons to the hash.
        """
        shared, person = (self.group, b"sluice:group") if self.group else (self.name, b"sluice:one")
        return hashlib.blake2b(shared.encode(), digest_size=_SALT_BYTES, person=person).digest()


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    tenants: tuple[Tenant, ...] = Field(min_length=1, max_length=_MAX_TENANTS)


class Tenants:
    """The tenants of one version of the file, found by what a caller can show.

    Args:
        tenants: Names, keys and certificates' names are each unique.

    Raises:
        ConfigError: They are not.
    """

    def __init__(self, tenants: Iterable[Tenant]) -> None:
        # A lookup compares keyed hashes, under a key that nobody knows: how long it takes says
        # nothing about the keys of others.
        self._lookup_key = secrets.token_bytes(32)
        self._by_name: dict[str, Tenant] = {}
        self._by_key: dict[bytes, Tenant] = {}
        self._by_certificate: dict[str, Tenant] = {}
        for tenant in tenants:
            if self._by_name.setdefault(tenant.name, tenant) is not tenant:
                raise _error(f"the name {tenant.name!r} is there twice", "give each tenant its own")
            for key in tenant.key_sha256:
                digest = self._keyed(bytes.fromhex(key))
                if digest in self._by_key:
                    raise _error(f"a key of {tenant.name!r} is there twice", "give it to one only")
                self._by_key[digest] = tenant
            for name in tenant.certificate:
                if name in self._by_certificate:
                    reason = f"a certificate's name of {tenant.name!r} is there twice"
                    raise _error(reason, "give it to one only")
                self._by_certificate[name] = tenant

    def named(self, name: str) -> Tenant | None:
        """Return the tenant of a name."""
        return self._by_name.get(name)

    def with_key(self, key: str) -> Tenant | None:
        """Return the tenant of an API key."""
        return self._by_key.get(self._keyed(hashlib.sha256(key.encode()).digest()))

    def with_certificate(self, name: str) -> Tenant | None:
        """Return the tenant that a verified certificate's name belongs to."""
        return self._by_certificate.get(name)

    def _keyed(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._lookup_key).digest()


def read_tenants(path: Path) -> Tenants:
    """Return the tenants of a file.

    Raises:
        ConfigError: It cannot be read, or says what it must not; without a word of its content.
    """
    try:
        tree = yaml.load(path.read_bytes(), Loader=_LOADER)
        tenants = _File.model_validate(tree).tenants
    except OSError as error:
        raise _error(str(error.strerror), "give a file that this process may read") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(_shown, first["loc"])) or "the top"
        raise _error(f"{where}: {first['msg']}", "docs/store.md shows the format") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a snippet may show a key
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else "the file"
        raise _error(f"{where}: no YAML", "docs/store.md shows the format") from None
    return Tenants(tenants)


def _shown(part: int | str) -> str:
    """Return a part of a place: the name of a field that is not ours may be a key by mistake."""
    is_ours = isinstance(part, int) or part in _File.model_fields or part in Tenant.model_fields
    return str(part) if is_ours else "(a name that is no field)"


def _error(reason: str, remedy: str) -> ConfigError:
    return ConfigError(f"{FIELD}: {reason}: {remedy}", field=FIELD)
