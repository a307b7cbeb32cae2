"""Fast inference: conditioning computed ahead, CUDA graphs, packed weights, torch.compile."""
