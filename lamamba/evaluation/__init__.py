"""How good samples are. Takes images as arrays; never samples by itself."""
