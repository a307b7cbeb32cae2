"""Seeds to pictures: some in memory (images), or as many as one likes on disk by any number of processes (many)."""

from lamamba.sampling.generate import generate

__all__ = ["generate"]
