"""Chooses tokens from logits.

The random number of a token depends on its sequence's seed and its position alone, and what is done
to a row of logits on that row alone. So a sequence continues identically in another batch, after a
preemption and on another replica.

    logits -> penalties -> banned -> temperature -> top-k -> top-p -> min-p -> inverse CDF

The CDF runs in the order of the vocabulary, not of the probabilities: two tokens that swap ranks
for a difference in the last bit then do not move the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.kernels.sampling import Draw, argmax, is_native, sample_native
from cluster.step import SampleSpec
from cluster.types import SampledToken, TokenLogprob

NUM_TOP_P_CANDIDATES = 1024
"""Likeliest tokens that top-p looks at before it sorts the whole vocabulary."""

_MASK = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) of 53 random bits, the same one for the same arguments.

    Source: the SplitMix64 generator of Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators" (OOPSLA 2014), its finalizer applied to the seed, then to seed and counter.

    Args:
        seed: Unsigned 64 bit; wider ones are cut.
        position: Index of the token in its sequence.
    """
    state = (_mix(seed & _MASK) + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    return float(_mix(state) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def sample(logits_nV: Tensor, specs: Sequence[SampleSpec]) -> list[SampledToken]:
    """Return one token per row.

    Greedy rows (temperature 0) take the likeliest token, the one of lowest id on ties. Log
    probabilities are those of the model: before penalties, temperature and filters.

    Args:
        logits_nV: A row per spec, any float dtype; not changed.
        specs: How each row's token is chosen.
    """
    assert len(specs) == logits_nV.shape[0], (len(specs), logits_nV.shape)
    token_ids: dict[int, int] = {}
    unchanged = [i for i, spec in enumerate(specs) if not _changes_logits(spec)]
    if unchanged:
        chosen = _choose(logits_nV, unchanged, [specs[i] for i in unchanged])
        token_ids.update(zip(unchanged, chosen, strict=True))
    changed = [i for i, spec in enumerate(specs) if _changes_logits(spec)]
    if changed:
        scores_nV = logits_nV[torch.tensor(changed, device=logits_nV.device)].float()
        for scores_V, i in zip(scores_nV, changed, strict=True):
            _apply_penalties(scores_V, specs[i])
        chosen = _choose(scores_nV, range(len(changed)), [specs[i] for i in changed])
        token_ids.update(zip(changed, chosen, strict=True))
    return [
        SampledToken(token_ids[i])
        if spec.num_logprobs < 0
        else _with_logprobs(logits_nV[i], token_ids[i], spec.num_logprobs)
        for i, spec in enumerate(specs)
    ]


def _changes_logits(spec: SampleSpec) -> bool:
    return bool(
        spec.banned_token_ids
        or spec.repetition_penalty != 1.0
        or spec.presence_penalty != 0.0
        or spec.frequency_penalty != 0.0
    )


def _apply_penalties(scores_V: Tensor, spec: SampleSpec) -> None:
    """Change one row in place."""
    if spec.repetition_penalty != 1.0:
        seen = _ids({*spec.prompt_token_ids, *spec.output_token_ids}, scores_V)
        old = scores_V[seen]
        factor = spec.repetition_penalty
        scores_V[seen] = torch.where(old > 0, old / factor, old * factor)
    if spec.presence_penalty != 0.0 or spec.frequency_penalty != 0.0:
        counts = Counter(spec.output_token_ids)
        times = torch.tensor(list(counts.values()), dtype=torch.float32, device=scores_V.device)
        scores_V[_ids(counts, scores_V)] -= spec.presence_penalty + spec.frequency_penalty * times
    if spec.banned_token_ids:
        scores_V[_ids(spec.banned_token_ids, scores_V)] = -torch.inf


def _ids(token_ids: set[int] | Counter[int] | tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(list(token_ids), dtype=torch.int64, device=like.device)


def _choose(scores_nV: Tensor, rows: Sequence[int], specs: Sequence[SampleSpec]) -> list[int]:
    """Return a token from each of `rows`, for the spec in the same place."""
    if len(rows) == len(scores_nV) and all(spec.temperature == 0 for spec in specs):
        chosen_n = argmax(scores_nV)
    elif is_native(scores_nV):
        chosen_n = sample_native(
            scores_nV,
            [
                Draw(
                    row,
                    spec.temperature,
                    spec.top_k,
                    spec.top_p,
                    spec.min_p,
                    uniform(spec.seed, spec.position),
                )
                for row, spec in zip(rows, specs, strict=True)
            ],
        )
    else:
        rows_n = torch.tensor(rows, device=scores_nV.device)
        chosen_n = _choose_in_torch(scores_nV[rows_n].float(), specs)
    token_ids: list[int] = chosen_n.tolist()
    return token_ids


def _choose_in_torch(scores_nV: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """Return what the kernels do, but for rounding: where they do not serve, and their oracle."""
    chosen_n = scores_nV.argmax(dim=-1)
    drawn = [i for i, spec in enumerate(specs) if spec.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn, device=scores_nV.device)
        drawn_n = _draw(scores_nV[rows], [specs[i] for i in drawn])
        # Without odds (NaN, infinities) the search ends behind the vocabulary.
        chosen_n[rows] = torch.where(drawn_n < scores_nV.shape[1], drawn_n, chosen_n[rows])
    return chosen_n


def _draw(scores_nV: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """Return one token id per row, drawn; temperatures are above 0."""
    scores_nV = scores_nV / _column([spec.temperature for spec in specs], scores_nV)
    cut = [i for i, spec in enumerate(specs) if spec.top_k > 0 or spec.top_p < 1]
    if cut:
        rows = torch.tensor(cut, device=scores_nV.device)
        scores_nV[rows] = _keep_likeliest(scores_nV[rows], [specs[i] for i in cut])
    likeliest_n1 = scores_nV.amax(dim=-1, keepdim=True)
    odds_nV = (scores_nV - likeliest_n1).double().exp_()  # relative to the likeliest token's
    if any(spec.min_p > 0 for spec in specs):
        min_p_n1 = _column([spec.min_p for spec in specs], odds_nV)
        odds_nV = odds_nV.masked_fill_(odds_nV < min_p_n1, 0)
    cdf_nV = odds_nV.cumsum_(dim=-1)
    total_n1 = cdf_nV[:, -1:]
    at_n1 = _column([uniform(spec.seed, spec.position) for spec in specs], cdf_nV) * total_n1
    # Rounding may reach the total, behind which there is no token.
    at_n1 = torch.minimum(at_n1, torch.nextafter(total_n1, torch.zeros_like(total_n1)))
    return torch.searchsorted(cdf_nV, at_n1, right=True).squeeze(-1)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _keep_likeliest(scores_nV: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """Return the scores with those that top-k and top-p remove at minus infinity."""
    vocab_size = scores_nV.shape[1]
    top_k = [spec.top_k if 0 < spec.top_k < vocab_size else vocab_size for spec in specs]
    width = max(k if k < vocab_size else NUM_TOP_P_CANDIDATES for k in top_k)
    num_kept_n1, is_enough = _num_kept(scores_nV, top_k, specs, min(width, vocab_size))
    if not is_enough:
        num_kept_n1, _ = _num_kept(scores_nV, top_k, specs, vocab_size)
    width = int(num_kept_n1.max())
    least_n1 = scores_nV.topk(width, dim=-1).values.gather(1, num_kept_n1 - 1)
    # Of those as likely as the last that is kept, the lowest ids stay.
    is_tied_nV = scores_nV == least_n1
    is_above_nV = scores_nV > least_n1
    num_ties_n1 = num_kept_n1 - is_above_nV.sum(dim=-1, keepdim=True)
    is_kept_nV = is_above_nV | (is_tied_nV & (is_tied_nV.cumsum(dim=-1) <= num_ties_n1))
    return scores_nV.masked_fill(~is_kept_nV, -torch.inf)


def _num_kept(
    scores_nV: Tensor, top_k: Sequence[int], specs: Sequence[SampleSpec], width: int
) -> tuple[Tensor, bool]:
    """Return how many tokens each row keeps, by its `width` likeliest; whether that is sure."""
    vocab_size = scores_nV.shape[1]
    best_nC = scores_nV.topk(width, dim=-1).values
    odds_nC = (best_nC - best_nC[:, :1]).double().exp_()
    cdf_nC = odds_nC.cumsum(dim=-1)
    k_n1 = torch.tensor(top_k, device=scores_nV.device)[:, None]
    all_n1 = (scores_nV - best_nC[:, :1]).double().exp_().sum(dim=-1, keepdim=True)
    of_k_n1 = cdf_nC.gather(1, k_n1.clamp(max=width) - 1)
    total_n1 = torch.where(k_n1 == vocab_size, all_n1, of_k_n1)
    top_p_n1 = _column([spec.top_p for spec in specs], cdf_nC)
    rank_C = torch.arange(width, device=scores_nV.device)
    # A token stays if those before it do not have the probability yet: the smallest such set.
    is_kept_nC = (cdf_nC - odds_nC < top_p_n1 * total_n1) & (rank_C < k_n1)
    num_kept_n1 = is_kept_nC.sum(dim=-1, keepdim=True).clamp(min=1)
    is_sure_n1 = (num_kept_n1 < width) | (k_n1 <= width)
    return num_kept_n1, width == vocab_size or bool(is_sure_n1.all())


def _with_logprobs(logits_V: Tensor, token_id: int, num_top: int) -> SampledToken:
    logprobs_V = logits_V.float().log_softmax(dim=-1)
    best = logprobs_V.topk(min(num_top, logprobs_V.shape[0]))
    top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return SampledToken(
        token_id,
        float(logprobs_V[token_id]),
        tuple(TokenLogprob(other, logprob) for other, logprob in top),
    )
