"""llama.cpp's library on batches of sequences: what its server does in a step, without HTTP."""

from __future__ import annotations

import ctypes

import llama_cpp  # type: ignore[import-not-found]
import numpy as np

from .measurement import Arguments, Generate, main

CONTEXT_UNIT_TOKENS = 256
"""llama.cpp rounds each sequence's context up to a multiple of it."""


class Batches:
    """A loaded model whose context holds the whole batch."""

    def __init__(self, arguments: Arguments) -> None:
        llama_cpp.llama_backend_init()
        path = str(arguments.model / "model.gguf").encode()
        model_params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(path, model_params)
        per_sequence = -(-arguments.sequence_len // CONTEXT_UNIT_TOKENS) * CONTEXT_UNIT_TOKENS
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = per_sequence * arguments.requests
        params.n_seq_max = arguments.requests
        params.n_threads = params.n_threads_batch = arguments.threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot serve {path.decode()}")
        self._batch_tokens = int(llama_cpp.llama_n_batch(self._context))
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self._model)
        )
        self._batch = llama_cpp.llama_batch_init(self._batch_tokens, 0, 1)

    def generate(self, prompts: list[list[int]], output_len: int) -> list[int]:
        """Answer the prompts greedily, in step with one another."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        tokens = self._prefill(prompts)
        answers = [[token] for token in tokens]
        for index in range(output_len - 1):
            step = [(t, len(prompts[s]) + index, s) for s, t in enumerate(tokens)]
            tokens = self._decode(step, set(range(len(step))))
            for answer, token in zip(answers, tokens, strict=True):
                answer.append(token)
        return [len(answer) for answer in answers]

    def _prefill(self, prompts: list[list[int]]) -> list[int]:
        """Fill the cache, as many tokens at once as a batch takes; return the first tokens."""
        flat = [(t, i, s) for s, prompt in enumerate(prompts) for i, t in enumerate(prompt)]
        first: list[int] = []
        for start in range(0, len(flat), self._batch_tokens):
            part = flat[start : start + self._batch_tokens]
            ends = {n for n, (_, i, s) in enumerate(part) if i == len(prompts[s]) - 1}
            first += self._decode(part, ends)
        return first

    def _decode(self, tokens: list[tuple[int, int, int]], wanted: set[int]) -> list[int]:
        """Run (token, position, sequence) triples; return the best token after each wanted one."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for n, (token, position, sequence) in enumerate(tokens):
            batch.token[n], batch.pos[n] = token, position
            batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
            batch.logits[n] = n in wanted
        status = llama_cpp.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode answered {status}")
        return [self._best(n) for n in sorted(wanted)]

    def _best(self, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, index)
        row = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self._vocab_size)).contents
        return int(np.frombuffer(row, np.float32).argmax())


def load(arguments: Arguments) -> Generate:
    """Load the GGUF file."""
    return Batches(arguments).generate


if __name__ == "__main__":
    main(load)
