"""What runs inside a peer's environment: nothing of Sluice, nothing that only Sluice depends on.

Started as ``python -m drivers.NAME`` in the folder above, so that importing it imports no part of
``cluster`` either.
"""
