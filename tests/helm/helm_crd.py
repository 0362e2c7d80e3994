"""Custom resources against their CRD as strictly as `kubectl apply --validate=strict` does.

An API server prunes a field that a CRD does not know, without a word. Here it is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

CRDS = Path(__file__).parents[3] / "shared" / "crds"


def crd_validator(file: str, version: str) -> jsonschema.Draft202012Validator:
    """Return a strict validator of one version of a CRD; skip where the CRDs are not at hand."""
    path = CRDS / file
    if not path.is_file():
        pytest.skip(f"{path} is missing: the CRD schemas are not part of this repository")
    definition = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (schema,) = (
        entry["schema"]["openAPIV3Schema"]
        for entry in definition["spec"]["versions"]
        if entry["name"] == version
    )
    strict = strict_schema(schema)
    # The API server validates the object's own metadata by itself; the CRD says nothing of it.
    strict["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(strict)


def strict_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a structural schema as JSON schema, closed wherever the API server would prune."""
    strict = dict(schema)
    if strict.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
        strict["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in schema:
        strict["properties"] = {
            name: strict_schema(child) for name, child in schema["properties"].items()
        }
    if isinstance(schema.get("additionalProperties"), dict):
        strict["additionalProperties"] = strict_schema(schema["additionalProperties"])
    elif schema.get("type") == "object" and "additionalProperties" not in schema:
        keeps = schema.get("x-kubernetes-preserve-unknown-fields", False)
        strict["additionalProperties"] = bool(keeps)
    if "items" in schema:
        strict["items"] = strict_schema(schema["items"])
    return strict
