"""Weights of fewer bits: how they are made, checked, read from checkpoints and written to them."""
