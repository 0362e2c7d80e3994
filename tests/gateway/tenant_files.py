"""Tenants files, keys and signed tokens that tests make for themselves."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import jwt
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from cluster.config import AuthConfig

KEYS = {name: f"sk-{name}-0123456789abcdef" for name in ("alice", "bob", "carol", "root")}


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def bearer(credential: str) -> list[tuple[str, str | bytes]]:
    """Return the metadata of a call with an API key or a token."""
    return [("authorization", f"Bearer {credential}")]


def write_tenants(folder: Path, tenants: list[dict[str, Any]] | None = None) -> Path:
    """Write a file of tenants; of four by default, where alice and bob share."""
    if tenants is None:
        tenants = [
            {"name": name, "key_sha256": [sha256(KEYS[name])], "certificate": [f"{name}.example"]}
            for name in KEYS
        ]
        tenants[0]["group"] = tenants[1]["group"] = "research"
        tenants[3]["admin"] = True
    path = folder / "tenants.yaml"
    path.write_text(yaml.safe_dump({"tenants": tenants}))
    return path


def auth_config(folder: Path, **fields: Any) -> AuthConfig:
    """Return a configuration with the tenants of `write_tenants`."""
    return AuthConfig(tenants_file=str(write_tenants(folder)), **fields)


def make_key(algorithm: str) -> tuple[Any, bytes]:
    """Return a key to sign with, and what a gateway gets of it."""
    if algorithm == "HS256":
        secret = b"a shared secret of more than 64 bytes, which is long enough for SHA-512 too"
        return secret, secret + b"\n"
    key: Any
    if algorithm == "RS256":
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    elif algorithm == "ES256":
        key = ec.generate_private_key(ec.SECP256R1())
    else:
        key = ed25519.Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return key, public


def sign(key: Any, algorithm: str, *, expires_in_s: float | None = 60.0, **claims: Any) -> str:
    """Return a token."""
    if expires_in_s is not None:
        claims["exp"] = int(time.time() + expires_in_s)
    return jwt.encode(claims, key, algorithm=algorithm)
