"""Noise schedules, losses, guidance and sampling, for any network."""
