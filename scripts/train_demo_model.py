#!/usr/bin/env python
"""Train the demo model that ships with Sluice, from Python's standard library, on a CPU.

Everything is drawn from the seed: the tokenizer, the held-out files, the weights and the batches of
each step. A run that is killed goes on from its last checkpoint; a finished run writes a model in
transformers' format together with its card, so that every figure in the card was measured here.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import shutil
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 4096
EVAL_TOKENS = 1024  # context in which held-out files are scored
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
PROMPTS = (
    "import os\nimport sys\n\ndef main(",
    "class Stack:\n    def __init__(self",
    'def read_lines(path):\n    """',
)


@dataclass(frozen=True)
class Recipe:
    """What decides the weights; a checkpoint of another recipe is refused."""

    steps: int  # optimizer steps of the first part
    seed: int  # of tokenizer, split, weights and batches
    extension_steps: int = 240  # after them, with a rate high enough to learn a long context
    batch_tokens: int = 4096  # tokens per step
    seq_tokens: int = 512  # context of most steps, tokens
    long_seq_tokens: int = 2048  # context of the last steps, the one that is served
    long_fraction: float = 0.1  # share of the steps with the long context
    peak_lr: float = 2.5e-3  # of AdamW, after the warm-up
    warmup_steps: int = 100  # linear, from zero
    extension_lr: float = 6e-4  # of the second part, a cosine down to zero
    weight_decay: float = 0.1  # on matrices only

    @property
    def total_steps(self) -> int:
        """Optimizer steps of both parts."""
        return self.steps + self.extension_steps

    def lr(self, step: int) -> float:
        """Return the learning rate of `step`: linear warm-up, a cosine to zero, and another."""
        if step >= self.steps:
            done = (step - self.steps) / self.extension_steps
            return self.extension_lr * 0.5 * (1 + math.cos(math.pi * done))
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * done))

    def batch(self, stream: NDArray[np.int64], step: int) -> torch.Tensor:
        """Draw the windows of `step`, int64 [sequences, context + 1], from the token stream."""
        is_long = step >= self.steps * (1 - self.long_fraction)
        if step >= self.steps:
            is_long = step % 2 == 0  # long and short in turns: neither is forgotten
        length = self.long_seq_tokens if is_long else self.seq_tokens
        rng = np.random.default_rng((self.seed, step))
        starts = rng.integers(0, len(stream) - length, size=self.batch_tokens // length)
        return torch.from_numpy(np.stack([stream[at : at + length + 1] for at in starts]))


@dataclass(frozen=True)
class Score:
    """How well the model predicts the held-out files."""

    loss: float  # nats per token
    perplexity: float  # exp(loss)
    bits_per_byte: float  # independent of the tokenizer
    tokens: int  # predicted
    files: int  # held out


def read_sources(seed: int) -> tuple[list[str], list[str]]:
    """Read the standard library in seeded order; return its training and its held-out files.

    Tests, help texts and code page tables are left out, and so is the build's own configuration,
    which holds paths of the machine that built Python.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    keyed: list[tuple[str, Path]] = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata"):
            keyed.append((hashlib.sha256(f"{seed}:{name.as_posix()}".encode()).hexdigest(), path))
    train: list[str] = []
    held_out: list[str] = []
    for key, path in sorted(keyed):
        text = path.read_bytes().decode("utf-8", errors="replace")
        (held_out if int(key[-8:], 16) % 50 == 0 else train).append(text)
    return train, held_out


def train_tokenizer(texts: list[str]) -> Any:
    """Return a lossless byte-level BPE tokenizer of `VOCAB_SIZE` tokens, learnt from `texts`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def encode_stream(tokenizer: Any, texts: list[str]) -> NDArray[np.int64]:
    """Return the tokens of all texts, int64 [tokens], each text led by the end-of-text token."""
    parts = [[tokenizer.eos_token_id, *tokenizer.encode(text, verbose=False)] for text in texts]
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])


def build_model(seed: int) -> Any:
    """Return the untrained model: a Llama of about 8 million parameters, fp32."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=320,
            num_hidden_layers=6,
            num_attention_heads=10,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=864,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def token_losses(model: Any, tokens: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Return the cross entropy, nats, of each next token in `tokens` [sequences, context + 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(
        logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction=reduction
    )


@torch.inference_mode()
def score(model: Any, tokenizer: Any, texts: list[str]) -> Score:
    """Score `texts` in windows of `EVAL_TOKENS` that do not overlap, each text on its own."""
    nats, count = 0.0, 0
    for text in texts:
        tokens = torch.from_numpy(encode_stream(tokenizer, [text]))[None]
        for at in range(0, tokens.shape[1] - 1, EVAL_TOKENS):
            window = tokens[:, at : at + EVAL_TOKENS + 1]
            nats += float(token_losses(model, window, "sum"))
            count += window.shape[1] - 1
    num_bytes = sum(len(text.encode()) for text in texts)
    loss = nats / count
    return Score(loss, math.exp(loss), nats / math.log(2) / num_bytes, count, len(texts))


@torch.inference_mode()
def complete(model: Any, tokenizer: Any, prompt: str, *, temperature: float) -> str:
    """Return `prompt` continued by up to 96 tokens; temperature 0 is greedy."""
    torch.manual_seed(0)
    ids = tokenizer(prompt, return_tensors="pt")
    how = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    out = model.generate(**ids, **how, max_new_tokens=96, repetition_penalty=1.0)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def card(model: Any, tokenizer: Any, recipe: Recipe, facts: dict[str, Any], result: Score) -> str:
    """Return the model card; every figure in it comes from this run."""
    samples = "\n\n".join(
        f"Temperature {temperature}:\n\n```python\n"
        f"{complete(model, tokenizer, prompt, temperature=temperature).replace('```', '')}\n```"
        for prompt in PROMPTS
        for temperature in (0.0, 0.7)
    )
    num_parameters = sum(p.numel() for p in model.parameters())
    stage = "" if facts["step"] == recipe.total_steps else f" (interim, of {recipe.total_steps})"
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [llama, code, demo]
---

# Sluice demo model

A Llama of {num_parameters:,} parameters that writes text which looks like Python. It exists so
that `sluice` can be tried and tested without a download: it knows nothing, and its code is not to
be run.

| | |
|---|---|
| Parameters | {num_parameters:,}, bfloat16, embeddings tied |
| Context | {recipe.long_seq_tokens} tokens |
| Tokenizer | byte-level BPE, {VOCAB_SIZE} tokens, lossless |
| Steps | {facts["step"]}{stage} |
| Tokens seen | {facts["step"] * recipe.batch_tokens:,} ({facts["epochs"]:.2f} epochs) |
| Training time | {facts["seconds"] / 60:.0f} minutes wall, on 2 shared CPU cores |
| Trained with | PyTorch {facts["torch"]} |
| Held-out loss | {result.loss:.4f} nats per token |
| Held-out perplexity | {result.perplexity:.2f} |
| Held-out bits per byte | {result.bits_per_byte:.3f} |

## Data

The Python sources of CPython {facts["python"]}'s standard library: {facts["files"]} files,
{facts["bytes"]:,} bytes, {facts["tokens"]:,} tokens. Left out: tests, `encodings`, `pydoc_data`,
and the build's configuration. Another {result.files} files ({result.tokens:,} tokens), chosen by a
hash of their path, were held out; they were scored in windows of {EVAL_TOKENS} tokens with the
bfloat16 weights.

The sources are under the PSF License Agreement, Copyright (c) Python Software Foundation. The
weights are under Apache-2.0, as Sluice is. The model can repeat short passages of its sources.

## Intended use

Demonstrations, tests and benchmarks of the serving path. Not for writing code, nor for anything
else.

## Made by

```
python scripts/train_demo_model.py --steps {recipe.steps} --seed {recipe.seed}
```

AdamW, {recipe.batch_tokens} tokens per step, context {recipe.seq_tokens}, in the last
{recipe.long_fraction:.0%} of {recipe.steps} steps {recipe.long_seq_tokens}; learning rate
{recipe.peak_lr} after {recipe.warmup_steps} steps of warm-up, then a cosine down to zero. Then
{recipe.extension_steps} steps of both contexts in turns, from {recipe.extension_lr} down to zero:
the end of the first cosine is too low to learn positions that were not seen before.

## Samples

Prompts and completions of up to 96 tokens, as the model gave them.

{samples}
"""


class Trainer:
    """The training run: its model, its optimizer, and how far it has come.

    Args:
        recipe: What to train.
        out: Folder that receives the exported model.
        checkpoint_dir: Folder of the checkpoint; one of the same recipe is continued.
        console: Where to report.
    """

    def __init__(self, recipe: Recipe, out: Path, checkpoint_dir: Path, console: Console) -> None:
        self.recipe, self.out, self.console = recipe, out, console
        self.checkpoint = checkpoint_dir / "checkpoint.pt"
        self.texts, self.held_out = read_sources(recipe.seed)
        self.tokenizer = train_tokenizer(self.texts)
        self.stream = encode_stream(self.tokenizer, self.texts)
        self.model = build_model(recipe.seed)
        groups: list[dict[str, Any]] = [
            {
                "params": [p for p in self.model.parameters() if p.ndim >= 2],
                "weight_decay": recipe.weight_decay,
            },
            {"params": [p for p in self.model.parameters() if p.ndim < 2]},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=True,
        )
        self.step = 0
        self.seconds = 0.0  # of training, over all runs
        checkpoint_dir.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise typer.BadParameter(
                f"{self.checkpoint} is of {state['recipe']}: choose another --checkpoint-dir"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        """Write the checkpoint; a reader sees the old one or the new one, never half of one."""
        state = {
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def train_step(self) -> float:
        """Take one optimizer step; return its loss, nats per token."""
        began = time.monotonic()
        loss = token_losses(self.model, self.recipe.batch(self.stream, self.step))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.seconds += time.monotonic() - began
        return loss.item()

    def export(self) -> Score:
        """Write model, tokenizer and card to `out`, each file at once; return the score."""
        with tempfile.TemporaryDirectory() as scratch:
            # The card describes the weights that ship, so they are rounded before they are scored.
            model = build_model(self.recipe.seed)
            model.load_state_dict(self.model.state_dict())
            model.to(torch.bfloat16).eval()
            result = score(model, self.tokenizer, self.held_out)
            facts = {
                "step": self.step,
                "seconds": self.seconds,
                "epochs": self.step * self.recipe.batch_tokens / len(self.stream),
                "files": len(self.texts),
                "bytes": sum(len(text.encode()) for text in self.texts),
                "tokens": len(self.stream),
                "python": platform.python_version(),
                "torch": torch.__version__.split("+")[0],
            }
            text = card(model, self.tokenizer, self.recipe, facts, result)
            (Path(scratch) / "README.md").write_text(text, encoding="utf-8")
            model.save_pretrained(scratch)
            self.tokenizer.save_pretrained(scratch)
            self.out.mkdir(parents=True, exist_ok=True)
            for file in sorted(Path(scratch).iterdir()):
                partial = self.out / f".{file.name}.partial"
                shutil.copyfile(file, partial)
                partial.replace(self.out / file.name)
        return result

    def run(self, save_every_s: float, interim_s: float) -> Score:
        """Train to the end; export at the start, once after `interim_s`, and the final model."""
        if self.step == 0:
            self.export()
        saved_at, mean = self.seconds, 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task("training", total=self.recipe.total_steps, completed=self.step)
            while self.step < self.recipe.total_steps:
                before_s = self.seconds
                loss = self.train_step()
                mean = loss if not mean else 0.95 * mean + 0.05 * loss
                progress.update(task, advance=1, description=f"loss {mean:.3f}")
                if self.step % 50 == 0:
                    self.console.print(f"step {self.step} loss {mean:.4f} {self.seconds:.0f} s")
                if self.seconds - saved_at > save_every_s:
                    self.save()
                    saved_at = self.seconds
                if before_s < interim_s <= self.seconds:
                    self.console.print(f"interim: {self.export()}")
        self.save()
        return self.export()


def main(
    steps: Annotated[int, typer.Option(help="Steps of 4096 tokens before the extension.")] = 1700,
    out: Annotated[Path, typer.Option(help="Folder for the model.")] = Path("cluster/model/demo"),
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    checkpoint_dir: Annotated[
        Path, typer.Option(help="Folder of the checkpoint; an unfinished run goes on from it.")
    ] = Path("build/train_demo_model"),
    save_every_s: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 120.0,
    interim_s: Annotated[float, typer.Option(help="Seconds until an interim export.")] = 300.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train the demo model on Python's standard library and write it with its card."""
    torch.set_num_threads(2)
    console = Console(stderr=True)
    trainer = Trainer(Recipe(steps, seed), out, checkpoint_dir, console)
    console.print(f"{len(trainer.stream):,} tokens, {len(trainer.held_out)} files held out")
    result = trainer.run(save_every_s, interim_s)
    facts = {**asdict(result), "steps": trainer.step, "seconds": trainer.seconds}
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        console.print(facts)


if __name__ == "__main__":
    typer.run(main)
