"""transformers' generate: one static batch."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from .measurement import Arguments, Generate, main


def load(arguments: Arguments) -> Generate:
    """Load the checkpoint in its own dtype."""
    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], output_len: int) -> list[int]:
        ids_BT = torch.tensor(prompts)
        answers_BT = model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            do_sample=False,
            min_new_tokens=output_len,
            max_new_tokens=output_len,
        )
        return [len(answer) - ids_BT.shape[1] for answer in answers_BT]

    return generate


if __name__ == "__main__":
    main(load)
