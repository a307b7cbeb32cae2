"""Seeds and labels to images: in memory (generate), or on disk by any number of processes (folder)."""

from lamamba.sampling.generate import generate

__all__ = ["generate"]
