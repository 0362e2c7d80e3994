"""A request as it comes in: checked, admitted, tokenized; then it is generated."""

from __future__ import annotations

from cluster.gateway import validation
from cluster.gateway.generation import ClientCall, GatewayParts, Generation
from cluster.gateway.objective import read_slo
from cluster.rpc.sluice.v1 import inference_pb2
from cluster.types import EngineRequest

_NO_SALT = b""  # until requests carry an authenticated tenant, all share their cached blocks


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
    parts: GatewayParts, message: inference_pb2.GenerateRequest, call: ClientCall
) -> None:
    """Serve one request; returns after its event `finished`.

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
        if message.WhichOneof("prompt") == "token_ids":
            token_ids, field = tuple(message.token_ids.ids), "token_ids"
            validation.check_token_ids(token_ids, limits)
        else:
            token_ids, field = await parts.tokenizer.encode(message.text), "text"
        sampling = validation.fit_context(sampling, len(token_ids), limits, prompt_field=field)
        request = EngineRequest(call.request_id, token_ids, sampling, salt=_NO_SALT, slo=slo)
        await Generation(parts, call, request).run()
