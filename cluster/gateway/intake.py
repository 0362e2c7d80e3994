"""A request as it comes in: checked, admitted, tokenized; then it is generated."""

from __future__ import annotations

from cluster.gateway import validation
from cluster.gateway.generation import ClientCall, GatewayParts, Generation
from cluster.gateway.identity import Caller
from cluster.gateway.objective import read_slo
from cluster.rpc.sluice.v1 import inference_pb2
from cluster.types import EngineRequest


def limits_of(parts: GatewayParts) -> validation.Limits:
    """Return what requests are held against now."""
    replicas = parts.fleet.table.snapshots()
    return validation.Limits(
        model=parts.config.model.served_name,
        max_model_len=min(
            [parts.tokenizer.max_model_len, *(r.info.max_model_len for r in replicas)]
        ),
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
    sampling = validation.read_sampling(message.sampling, limits, seed=parts.rng.getrandbits(64))
    slo = read_slo(message, parts.config.engine)
    with parts.admission.admit(call.request_id):
        token_ids, field = await _read_prompt(parts, message, limits)
        prefix: tuple[int, ...] = ()
        if message.prefix:
            prefix = await parts.prefixes.tokens_of(caller, message.prefix, limits.model)
        sampling = validation.fit_context(
            sampling,
            len(prefix) + len(token_ids),
            limits,
            prompt_field=field,
            num_prefix_tokens=len(prefix),
        )
        request = EngineRequest(
            call.request_id, prefix + token_ids, sampling, salt=caller.salt, slo=slo
        )
        await Generation(parts, call, request).run()


async def _read_prompt(
    parts: GatewayParts, message: inference_pb2.GenerateRequest, limits: validation.Limits
) -> tuple[tuple[int, ...], str]:
    """Return the tokens of the request's own part of the prompt, and the field that has them."""
    if message.WhichOneof("prompt") == "token_ids":
        token_ids = tuple(message.token_ids.ids)
        validation.check_token_ids(token_ids, limits, field="token_ids.ids")
        return token_ids, "token_ids"
    return await parts.tokenizer.encode(message.text, continues=bool(message.prefix)), "text"
