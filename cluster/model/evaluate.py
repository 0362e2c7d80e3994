"""How well a model predicts a text, by the runner that serves: chunks of it on the paged cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.config import CacheConfig, ModelConfig, ParallelConfig
from cluster.errors import ConfigError
from cluster.model.checkpoint import check_quantization, inspect_checkpoint
from cluster.model.collective import NoCollective
from cluster.model.runner import ModelRunner, ShardSpec
from cluster.step import SampleSpec, SequenceStep, StepPlan

CHUNK_TOKENS = 256  # of a window in one step: bounds the logits in memory


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a text."""

    nats: float  # the sum over all predicted tokens
    choices_T: Tensor  # the likeliest token at each position, int64
    continuations: list[list[int]]  # greedy, one for each prompt

    @property
    def num_tokens(self) -> int:
        """Tokens that were predicted."""
        return len(self.choices_T)

    @property
    def nats_per_token(self) -> float:
        """Mean cross entropy."""
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(self.nats_per_token)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How one model compares with another on the same text."""

    perplexity_ratio: float  # ours / theirs
    choices: float  # share of positions with the same likeliest token
    continuations: float  # share of greedy continuations that are equal to the last token
    continued_tokens: float  # share of their tokens before the first difference


def evaluate(
    model: ModelConfig,
    cache: CacheConfig,
    windows: Sequence[Sequence[int]],
    *,
    prompt_tokens: int,
    num_prompts: int,
    num_continued: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Load a model in this process, score a text and continue some of it.

    Args:
        model: Which, and in what precision.
        cache: Block size and dtype.
        windows: Token ids; each but the first of a window is predicted from those before it.
        prompt_tokens: Of each prompt, a piece of a window.
        num_prompts: At the most, spread over the windows.
        num_continued: Tokens of each continuation.
        on_progress: Called with predicted tokens done and in total.

    Raises:
        ConfigError: The model cannot be loaded so, or a text gives a probability that is no number.
    """
    info = inspect_checkpoint(model.folder)
    check_quantization(info, model, ParallelConfig())
    prompts = cut_prompts(windows, prompt_tokens, num_prompts)
    block_size = cache.block_size
    longest = max(len(window) for window in windows)
    per_prompt = -(-(prompt_tokens + num_continued) // block_size)
    runner = ModelRunner(
        model,
        cache,
        ShardSpec(tp_rank=0, tp=1, pp_rank=0, pp=1),
        NoCollective(),
        max_model_len=info.max_model_len,
        num_blocks=max(-(-longest // block_size), per_prompt * len(prompts)),
    )
    nats, choices = _score(runner, block_size, windows, on_progress)
    return Evaluation(nats, choices, _continue(runner, prompts, num_continued, per_prompt))


def cut_prompts(
    windows: Sequence[Sequence[int]], num_tokens: int, num_prompts: int
) -> list[tuple[int, ...]]:
    """Return up to `num_prompts` pieces of `num_tokens` each, spread over the windows."""
    pieces = [
        tuple(window[at : at + num_tokens])
        for window in windows
        for at in range(0, len(window) - num_tokens + 1, num_tokens)
    ]
    stride = max(1, len(pieces) // max(1, num_prompts))
    return pieces[::stride][:num_prompts]


def compare(ours: Evaluation, theirs: Evaluation) -> Agreement:
    """Return how `ours` compares with `theirs`; both are of the same windows."""
    pairs = list(zip(ours.continuations, theirs.continuations, strict=True))
    num_same = sum(_common(a, b) for a, b in pairs)
    num_continued = sum(len(b) for _, b in pairs)
    return Agreement(
        perplexity_ratio=ours.perplexity / theirs.perplexity,
        choices=float((ours.choices_T == theirs.choices_T).double().mean()),
        continuations=sum(a == b for a, b in pairs) / len(pairs) if pairs else math.nan,
        continued_tokens=num_same / num_continued if num_continued else math.nan,
    )


def _common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    equal = [a == b for a, b in zip(ours, theirs, strict=True)]
    return equal.index(False) if False in equal else len(equal)


def _score(
    runner: ModelRunner,
    block_size: int,
    windows: Sequence[Sequence[int]],
    on_progress: Callable[[int, int], None] | None,
) -> tuple[float, Tensor]:
    """Return the sum of all cross entropies, nats, and the likeliest token of each position."""
    total = sum(len(window) - 1 for window in windows)
    nats, choices = 0.0, []
    num_done = 0
    for window in windows:
        for at in range(0, len(window) - 1, CHUNK_TOKENS):
            chunk = tuple(window[at : min(at + CHUNK_TOKENS, len(window) - 1)])
            table = tuple(range(-(-(at + len(chunk)) // block_size)))
            plan = StepPlan(0, (SequenceStep(0, chunk, at, table, None),))
            logits_TV = runner.logits(plan).float().cpu()
            targets_T = torch.tensor(window[at + 1 : at + 1 + len(chunk)])
            nats += float(F.cross_entropy(logits_TV, targets_T, reduction="sum").double())
            choices.append(logits_TV.argmax(-1))
            num_done += len(chunk)
            if on_progress:
                on_progress(num_done, total)
    if not math.isfinite(nats):
        raise ConfigError(
            "model.path: its probabilities are no numbers: the weights are damaged, get them again",
            field="model.path",
        )
    return nats, torch.cat(choices)


def _continue(
    runner: ModelRunner, prompts: Sequence[Sequence[int]], num_tokens: int, num_blocks: int
) -> list[list[int]]:
    """Return the greedy continuation of each prompt, all in one batch."""
    tables = [tuple(range(i * num_blocks, (i + 1) * num_blocks)) for i in range(len(prompts))]
    new = [tuple(prompt) for prompt in prompts]
    done: list[list[int]] = [[] for _ in prompts]
    for step in range(num_tokens):
        sequences = []
        for i, prompt in enumerate(prompts):
            num_computed = len(prompt) + step - 1 if step else 0
            spec = _greedy(len(prompt) + step)
            sequences.append(SequenceStep(i, new[i], num_computed, tables[i], spec))
        tokens = runner.execute(StepPlan(step, tuple(sequences)), None)
        assert isinstance(tokens, dict)
        for i in range(len(prompts)):
            done[i].append(tokens[i].token_id)
            new[i] = (tokens[i].token_id,)
    return done


def _greedy(position: int) -> SampleSpec:
    return SampleSpec(
        seed=0,
        position=position,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        num_logprobs=-1,
    )
