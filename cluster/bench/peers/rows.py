"""The rows of the comparison: how much work, with which weights, and who takes part."""

from __future__ import annotations

from dataclasses import dataclass

SCHEMES = ("bf16", "int8", "int4")
"""How weights are held: as the checkpoint has them, 8 bits per weight, 4 bits per weight."""


@dataclass(frozen=True, slots=True)
class Work:
    """A batch of equal requests: greedy, never ended early, every prompt different."""

    num_requests: int  # all given at once
    input_len: int  # tokens of each prompt
    output_len: int  # tokens generated for each

    def __str__(self) -> str:
        return f"{self.num_requests} x ({self.input_len:,} in, {self.output_len:,} out)"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the comparison, the same for everyone who takes part."""

    name: str  # as the command line knows it
    scheme: str  # one of SCHEMES
    work: Work
    peers: tuple[str, ...]  # in the order of their turns; Sluice comes first

    @property
    def title(self) -> str:
        """The row's name for people."""
        return f"{self.scheme} {self.work}"


_SHORT = Work(16, 256, 64)
ROWS = (
    Row("bf16", "bf16", _SHORT, ("sluice", "vllm", "openvino", "transformers", "llama.cpp")),
    Row("int8", "int8", _SHORT, ("sluice", "openvino", "llama.cpp")),
    Row("int4", "int4", _SHORT, ("sluice", "openvino", "llama.cpp")),
    # Seven times the tokens of the others: for the engines that batch continuously by themselves.
    Row("long", "bf16", Work(32, 1024, 128), ("sluice", "vllm", "openvino")),
)
