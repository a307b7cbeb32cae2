"""Exceptions that more than one package raises or catches."""

from __future__ import annotations


class RankZeroError(RuntimeError):
    """Rank 0 has failed; the other ranks stop, and leave the report of the failure to it."""
