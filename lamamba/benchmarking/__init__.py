"""Cost of networks: multiply-adds and memory, counted on the meta device; time and memory, measured beside DiT."""
