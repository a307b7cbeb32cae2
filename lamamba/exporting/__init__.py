"""Trained networks for other programs: diffusers pipeline folders, ONNX, model cards."""
