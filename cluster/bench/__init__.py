"""Measurements: of a serving cluster, and of the gateway alone."""
