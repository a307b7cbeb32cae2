"""What a network costs: multiply-adds and memory, counted without running it."""
