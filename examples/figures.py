"""Figures from arrays: the distances of real digits, and of noise, from real digits: python examples/figures.py"""

import numpy as np

from lamamba.data.digits import Digits
from lamamba.metrics import Statistics, frechet_distance, kernel_distance, precision_recall
from lamamba.metrics.digits_network import DigitFeatures

images = Digits().images.transpose(0, 2, 3, 1)                                  # uint8 (1797, 8, 8, 1)
noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
extract = DigitFeatures()                                                       # or your own function: (n, d) features


def features(batch: np.ndarray) -> np.ndarray:
    return extract(batch)["features"]


reference = features(images[::2])
for name, samples in (("other real digits", features(images[1::2])), ("noise", features(noise[1::2]))):
    moments = [Statistics(part.shape[1]).add(part) for part in (samples, reference)]
    distance = frechet_distance(*(array for part in moments for array in (part.mean, part.covariance())))
    precision, recall = precision_recall(reference, samples, k=3)
    kernel, _ = kernel_distance(reference, samples, subset_size=500)
    print(f"{name:<18} Frechet distance {distance:7.2f}   precision {precision:.2f}   recall {recall:.2f}   "
          f"kernel distance {kernel:.4f}")
