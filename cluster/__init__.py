"""Sluice: a serving cluster for large language models on Ray."""
