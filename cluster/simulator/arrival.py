"""One simulated request: when it comes, what it asks for, and how long its answer will be."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.types import NO_SLO, SLO, ServiceClass

Run = tuple[int, int]
"""A token id and how many times it stands in a row: prompts of a trace are runs of equal tokens."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request as a workload makes it.

    Two prompts share a prefix exactly where their runs say the same tokens. The simulated model
    answers every position with the token `answer_token`, so a later turn of a session that repeats
    the answer as the run `(answer_token, num_output_tokens)` finds its blocks in the cache.
    """

    request_id: str  # unique in the workload
    arrived_s: float  # from the workload's begin; of one that follows another: after its last token
    runs: tuple[Run, ...]  # the prompt: at least one token; ids are unsigned 32-bit numbers
    num_output_tokens: int  # of the answer, >= 1: known to the simulated model, not to the policy
    answer_token: int  # unsigned 32-bit number, unique to the request unless a later one repeats it
    slo: SLO = NO_SLO
    service_class: ServiceClass = ServiceClass.STANDARD
    tenant: str = ""
    tenant_weight: float = 1.0  # of its fair share, > 0
    session: str = ""  # hint to the router
    follows: str = ""  # id of the request whose end begins its time; empty: none
    deadline_s: float | None = None  # the client gives up after so long; None: never

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return sum(count for _, count in self.runs)

    def prompt(self) -> tuple[int, ...]:
        """Return the token ids of the prompt; large, so nobody keeps them longer than needed."""
        token_ids: list[int] = []
        for token, count in self.runs:
            token_ids += [token] * count
        return tuple(token_ids)
