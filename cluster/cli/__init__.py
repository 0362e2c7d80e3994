"""The `sluice` command. Its modules import torch, ray and transformers only when they run."""

from cluster.cli.app import main

__all__ = ["main"]
