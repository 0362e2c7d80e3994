"""What the service Cache is asked for, checked and tokenized."""

from __future__ import annotations

import re
import time

from cluster.errors import InvalidArgumentError
from cluster.gateway import validation
from cluster.gateway.identity import Caller
from cluster.gateway.intake import limits_of
from cluster.gateway.parts import GatewayParts
from cluster.gateway.prefix_record import NAME_PATTERN, PrefixRecord
from cluster.gateway.validation import Limits
from cluster.rpc.sluice.v1 import cache_pb2

_HasPrompt = cache_pb2.RegisterPrefixRequest | cache_pb2.InspectCacheRequest


async def read_prefix(
    parts: GatewayParts, request: cache_pb2.RegisterPrefixRequest, caller: Caller
) -> PrefixRecord:
    """Return what is to be registered, for the caller's tenant.

    Raises:
        InvalidArgumentError: The name or the prompt is out of bounds.
        NotFoundError: The model is not served.
    """
    if not re.fullmatch(NAME_PATTERN, request.name):
        raise InvalidArgumentError(
            f"name has {len(request.name)} characters, it is 1 to 128 letters, digits, dots, "
            "dashes and underscores: choose another",
            field="name",
        )
    limits = limits_of(parts)
    token_ids = await _read_prompt(parts, request, limits)
    limit = limits.gateway.max_prefix_tokens
    _check_length(request, token_ids, limit, f"gateway.max_prefix_tokens={limit}")
    context = limits.max_model_len
    reason = f"limit={context - 1} (max_model_len={context} less one token after it)"
    _check_length(request, token_ids, context - 1, reason)
    return PrefixRecord.of(caller.tenant, request.name, limits.model, token_ids, time.time())


async def read_inspected(
    parts: GatewayParts, request: cache_pb2.InspectCacheRequest, caller: Caller
) -> tuple[int, ...]:
    """Return the tokens of prefix and prompt together; one of the two may be left out.

    Raises:
        InvalidArgumentError: The prompt is out of bounds, or there is nothing to look for.
        NotFoundError: The model is not served, or the caller has no such prefix.
        UnavailableError: The prefix is not known here, and the store cannot be asked.
    """
    limits = limits_of(parts)
    validation.check_model(request.model, limits)
    prefix: tuple[int, ...] = ()
    if request.prefix:
        prefix = await parts.prefixes.tokens_of(caller, request.prefix, limits.model)
        if request.WhichOneof("prompt") is None:
            return prefix
    token_ids = prefix + await _read_prompt(parts, request, limits, continues=bool(prefix))
    limit = limits.max_model_len
    _check_length(request, token_ids, limit, f"limit={limit} (max_model_len)")
    return token_ids


async def _read_prompt(
    parts: GatewayParts, request: _HasPrompt, limits: Limits, *, continues: bool = False
) -> tuple[int, ...]:
    validation.check_model(request.model, limits)
    validation.check_prompt_given(request)
    if request.WhichOneof("prompt") == "text":
        return await parts.tokenizer.encode(request.text, continues=continues)
    token_ids = tuple(request.token_ids.ids)
    validation.check_token_ids(token_ids, limits, field="token_ids.ids")
    return token_ids


def _check_length(request: _HasPrompt, token_ids: tuple[int, ...], limit: int, reason: str) -> None:
    if len(token_ids) > limit:
        raise InvalidArgumentError(
            f"the prompt has {len(token_ids)} tokens, {reason}: shorten it",
            field=request.WhichOneof("prompt") or "prompt",
        )
