"""A request as it comes in: checked, admitted, tokenized; then it is generated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from cluster.errors import (
    RESUME_ELSEWHERE,
    InvalidArgumentError,
    NotFoundError,
    SupersededError,
    UnavailableError,
)
from cluster.gateway import validation
from cluster.gateway.generation import Generation
from cluster.gateway.identity import Caller
from cluster.gateway.objective import read_slo
from cluster.gateway.parts import ClientCall, GatewayParts
from cluster.gateway.routing import session_key
from cluster.rpc.sluice.v1 import inference_pb2
from cluster.types import NO_SLO, SLO, EngineRequest


def limits_of(parts: GatewayParts) -> validation.Limits:
    """Return what requests are held against now."""
    lengths = parts.fleet.table.column("max_model_len")
    return validation.Limits(
        model=parts.config.model.served_name,
        max_model_len=int(lengths.min(initial=parts.tokenizer.max_model_len)),
        vocab_size=parts.tokenizer.vocab_size,
        gateway=parts.config.gateway,
    )


async def serve_request(
    parts: GatewayParts, message: inference_pb2.GenerateRequest, call: ClientCall, caller: Caller
) -> None:
    """Serve one request; returns after its event `finished`.

    Args:
        parts: Of the gateway.
        message: Of the client.
        call: Gets the events.
        caller: Authenticated; its salt is all that ties the request to cached blocks.

    Raises:
        SluiceError: The request was refused or has failed.
    """
    limits = limits_of(parts)
    validation.check_request_id(call.request_id)
    validation.check_model(message.model, limits)
    validation.check_prompt_given(message)
    slo, service_class = read_slo(message, parts.config.engine)
    draft = EngineRequest(
        call.request_id,
        (),
        validation.read_sampling(message.sampling, limits, seed=parts.rng.getrandbits(64)),
        salt=caller.salt,
        slo=slo,
        service_class=service_class,
        tenant=caller.tenant,
        tenant_weight=caller.weight,
    )
    session = session_key(message.session, caller.tenant)
    with _goodput(parts, slo) as verdict, parts.admission.admit(call.request_id):
        request = await _complete(parts, message, draft, limits, caller)
        generation = Generation(parts, call, request, session=session)
        async with parts.rate_limiter.admit(
            caller,
            len(request.prompt_token_ids),
            request.sampling.max_tokens,
            lambda: generation.num_output_tokens,
        ):
            verdict.is_kept = await generation.run()


@dataclass(slots=True)
class _Verdict:
    is_kept: bool = False  # the objective


@contextmanager
def _goodput(parts: GatewayParts, slo: SLO) -> Iterator[_Verdict]:
    """Count a request with an objective when it has ended, once at the most.

    One that was wrong is not counted, nor one that has not ended but goes on in another call.
    """
    verdict, is_counted = _Verdict(), slo != NO_SLO
    try:
        yield verdict
    except (InvalidArgumentError, NotFoundError, SupersededError):
        is_counted = False
        raise
    except UnavailableError as error:
        is_counted &= error.reason != RESUME_ELSEWHERE
        raise
    finally:
        if is_counted:
            parts.metrics.goodput.labels(str(verdict.is_kept).lower()).inc()


async def _complete(
    parts: GatewayParts,
    message: inference_pb2.GenerateRequest,
    draft: EngineRequest,
    limits: validation.Limits,
    caller: Caller,
) -> EngineRequest:
    """Return the request with its prompt, if prompt and answer fit the model's context."""
    token_ids, field = await _read_prompt(parts, message, limits)
    prefix: tuple[int, ...] = ()
    if message.prefix:
        prefix = await parts.prefixes.tokens_of(caller, message.prefix, limits.model)
    sampling = validation.fit_context(
        draft.sampling,
        len(prefix) + len(token_ids),
        limits,
        prompt_field=field,
        num_prefix_tokens=len(prefix),
    )
    return replace(draft, prompt_token_ids=prefix + token_ids, sampling=sampling)


async def _read_prompt(
    parts: GatewayParts, message: inference_pb2.GenerateRequest, limits: validation.Limits
) -> tuple[tuple[int, ...], str]:
    """Return the tokens of the request's own part of the prompt, and the field that has them."""
    if message.WhichOneof("prompt") == "token_ids":
        token_ids = tuple(message.token_ids.ids)
        validation.check_token_ids(token_ids, limits, field="token_ids.ids")
        return token_ids, "token_ids"
    return await parts.tokenizer.encode(message.text, continues=bool(message.prefix)), "text"
