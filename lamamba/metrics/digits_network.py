"""A small convolutional classifier of handwritten digits as a feature network: FD-digits.

Its weights are part of the package, so that distances compare between machines. `python -m
lamamba.metrics.digits_network` trains them again (half a minute on a CPU), on the digits that `DigitClassifier` trains
on, too, shifted by up to a pixel; its accuracy is that on the held-out digits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lamamba.data.digits import SIDE, Digits
from lamamba.metrics.digits import HELD_OUT
from lamamba.metrics.features import FeatureNetworkInfo, Outputs, hash_weights, to_tensor
from lamamba.utils.repeatable import own_random_state
from lamamba.utils.tensors import read_tensors

WEIGHTS = Path(__file__).parent / "digits.safetensors"
NUM_FEATURES = 64


class DigitNetwork(nn.Module):
    """Two convolutions, a linear layer of 64 features, ten logits."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Conv2d(1, 16, 3, padding=1)
        self.far = nn.Conv2d(16, 32, 3, padding=1)
        self.inner = nn.Linear(32 * (SIDE // 2) ** 2, NUM_FEATURES)
        self.outer = nn.Linear(NUM_FEATURES, 10)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features (b, 64) and logits (b, 10) of images (b, 1, 8, 8), 0 .. 255."""
        x = F.gelu(self.near(images / 127.5 - 1))
        x = F.max_pool2d(F.gelu(self.far(x)), 2)
        features = F.gelu(self.inner(x.flatten(1)))
        return {"features": features, "logits": self.outer(features)}


class DigitFeatures:
    """The trained network of the package.

    Takes grey images of 8 x 8 pixels, or of a multiple, which average pooling brings to 8 x 8.
    """

    distance_name = "FD-digits"
    has_class_logits = True

    def __init__(self) -> None:
        with own_random_state():
            self._model = DigitNetwork()
        self._model.load_state_dict(read_tensors(WEIGHTS))
        self._model.eval().requires_grad_(False)
        self.info = FeatureNetworkInfo("digits", hash_weights(self._model), "8 x 8, means over squares", 1)

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Outputs:
        height, width, channels = images.shape[1:]
        if height != width or height % SIDE or channels != 1:
            raise ValueError(
                f"the classifier of digits reads grey squares whose side is a multiple of {SIDE}, not "
                f"{height} x {width} pixels with {channels} channels"
            )
        outputs = self._model(F.avg_pool2d(to_tensor(images, "cpu"), height // SIDE))
        return {name: tensor.numpy() for name, tensor in outputs.items()}


def train(epochs: int = 60, seed: int = 0) -> tuple[DigitNetwork, float]:
    """Train the network; returns it with its accuracy on held-out digits."""
    digits = Digits()
    order = np.random.default_rng(0).permutation(len(digits))                   # as DigitClassifier's
    images, labels = torch.from_numpy(digits.images[order]).float(), torch.from_numpy(digits.labels[order])
    torch.manual_seed(seed)
    model = DigitNetwork()
    training, classes = images[HELD_OUT:], labels[HELD_OUT:]
    steps = epochs * (len(training) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(training))[: len(training) // 64 * 64].split(64):
            padded = F.pad(training[rows], (1, 1, 1, 1))
            down, across = torch.randint(0, 3, (2,)).tolist()
            logits = model(padded[:, :, down : down + SIDE, across : across + SIDE])["logits"]
            loss = F.cross_entropy(logits, classes[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        correct = model.eval()(images[:HELD_OUT])["logits"].argmax(dim=1) == labels[:HELD_OUT]
    return model, float(correct.float().mean())


def main() -> None:
    model, accuracy = train()
    save_file(model.state_dict(), WEIGHTS, metadata={"held_out_accuracy": f"{accuracy:.4f}"})


if __name__ == "__main__":
    main()
