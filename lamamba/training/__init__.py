"""Training: where every random number comes from, the loop, and what it leaves on disk."""
