"""Seeds to pictures: some in memory (images), or as many as one likes on disk by any number of processes (many)."""

from lamamba.generation.images import generate

__all__ = ["generate"]
