"""Noise levels, losses, guidance and the sampling loop: this room knows t and eps, and no network."""
