"""Write a checkpoint as OpenVINO's intermediate representation, with optimum-intel's command."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

WEIGHT_FORMATS = {"bf16": "fp16", "int8": "int8", "int4": "int4"}
"""optimum-intel's names. There is no bf16 file: fp16 weights are turned into it when compiled."""


def main() -> None:
    """Export what the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--scheme", choices=WEIGHT_FORMATS, required=True)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    options = {
        "--model": arguments.model,
        "--task": "text-generation-with-past",
        "--weight-format": WEIGHT_FORMATS[arguments.scheme],
    }
    program = str(Path(sys.executable).with_name("optimum-cli"))
    parts = [part for option in options.items() for part in option]
    subprocess.run([program, "export", "openvino", *parts, arguments.out], check=True)


if __name__ == "__main__":
    main()
