"""Trained networks in the formats of other programs: diffusers pipeline folders with model cards, ONNX."""
