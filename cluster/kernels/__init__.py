"""Arithmetic that modules of a model call: one operation, one oracle in plain torch."""
