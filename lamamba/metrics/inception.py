"""The Inception network of 2015-12-05, by which FID is defined, in PyTorch, from the public weight file.

TensorFlow's graph (Szegedy et al., 2015) differs from later Inceptions: average pooling excludes padding, the last
block pools by maximum, there are 1008 classes, and images are resized without half-pixel centres. Tensor names are
those of the public file, pt_inception-2015-12-05-6726825d.pth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamamba.metrics.features import FeatureNetworkInfo, Outputs, hash_weights, to_arrays, to_tensor
from lamamba.utils.repeatable import own_random_state
from lamamba.utils.tensors import read_pickle

SIDE = 299
NUM_FEATURES, NUM_CLASSES = 2048, 1008
SPATIAL_CHANNELS = 7
"""Of 17 x 17: the 2023 features that sFID is made of."""
FILE_NAME = "pt_inception-2015-12-05-6726825d.pth"
URLS = (
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE_NAME}",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
)
"""The same tensors twice."""
PUBLISHED_SHA256 = "6726825d"
"""The public file's hash begins so: its publishers put it into the name."""


def resize_like_tensorflow1(images: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, as tf.image.resize_bilinear(align_corners=False) did it: source = target * scale, no half pixels.

    Args:
        images: (b, c, h, w), float32. Rows and columns past the last repeat it.

    Returns:
        (b, c, height, width)
    """
    def axis(source: int, target: int) -> tuple[Tensor, Tensor, Tensor]:
        scale = torch.tensor(source / target, dtype=torch.float32)              # TensorFlow's scale is a float
        position = torch.arange(target, dtype=torch.float32) * scale
        low = position.floor().long().clamp(max=source - 1)
        share = (position - low).to(images)
        return low.to(images.device), (low + 1).clamp(max=source - 1).to(images.device), share

    top, bottom, down = axis(images.shape[2], height)
    left, right, across = axis(images.shape[3], width)
    upper, lower = images[:, :, top], images[:, :, bottom]
    upper = upper[..., left] + (upper[..., right] - upper[..., left]) * across
    lower = lower[..., left] + (lower[..., right] - lower[..., left]) * across
    return upper + (lower - upper) * down[:, None]


class _Convolution(nn.Module):
    """Convolution, batch normalisation with running statistics, ReLU.

    Args:
        inputs, outputs: channels.
        kernel: size, or (height, width).
        same: pad so that an odd kernel of stride 1 keeps the image's size.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], *, stride: int = 1, same: bool = True):
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if same else 0
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    """Mean over 3 x 3 neighbours that exist: TensorFlow does not count padding."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _halved(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


Branches = Sequence[Sequence[Any]]
"""Layers of each branch: a pooling, or name, output channels and kernel of a convolution, and 2 where it halves."""


class _Mixed(nn.Module):
    """Branches side by side, their outputs concatenated; layers with which several begin are computed once."""

    def __init__(self, inputs: int, branches: Branches):
        super().__init__()
        self._branches = branches
        for branch in branches:
            width = inputs
            for name, outputs, kernel, *halves in filter(lambda layer: not callable(layer), branch):
                if not hasattr(self, name):
                    self.add_module(name, _Convolution(
                        width, outputs, kernel, stride=2 if halves else 1, same=not halves))
                width = outputs

    def forward(self, x: Tensor) -> Tensor:
        computed: dict[Any, Tensor] = {}
        ends = []
        for branch in self._branches:
            y = x
            for layer in branch:
                if layer not in computed:
                    computed[layer] = layer(y) if callable(layer) else getattr(self, layer[0])(y)
                y = computed[layer]
            ends.append(y)
        return torch.cat(ends, dim=1)


def _mixed_5(pooled: int) -> Branches:
    """mixed .. mixed_2: 35 x 35."""
    return [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        [_average, ("branch_pool", pooled, 1)],
    ]


MIXED_6A: Branches = [
    [("branch3x3", 384, 3, 2)],
    [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
    [_halved],
]
"""mixed_3: 35 x 35 to 17 x 17."""


def _mixed_6(middle: int) -> Branches:
    """mixed_4 .. mixed_7: 17 x 17, with kernels of 1 x 7 and 7 x 1."""
    return [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", middle, 1), ("branch7x7_2", middle, (1, 7)), ("branch7x7_3", 192, (7, 1))],
        [("branch7x7dbl_1", middle, 1), ("branch7x7dbl_2", middle, (7, 1)), ("branch7x7dbl_3", middle, (1, 7)),
         ("branch7x7dbl_4", middle, (7, 1)), ("branch7x7dbl_5", 192, (1, 7))],
        [_average, ("branch_pool", 192, 1)],
    ]


MIXED_7A: Branches = [
    [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
    [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
     ("branch7x7x3_4", 192, 3, 2)],
    [_halved],
]
"""mixed_8: 17 x 17 to 8 x 8."""


def _mixed_7(pool: Callable[[Tensor], Tensor]) -> Branches:
    """mixed_9 and mixed_10: 8 x 8. The last pools by maximum, the other by average: so is the graph of 2015."""
    single = [("branch3x3_1", 384, 1)]
    double = [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3)]
    return [
        [("branch1x1", 320, 1)],
        [*single, ("branch3x3_2a", 384, (1, 3))], [*single, ("branch3x3_2b", 384, (3, 1))],
        [*double, ("branch3x3dbl_3a", 384, (1, 3))], [*double, ("branch3x3dbl_3b", 384, (3, 1))],
        [pool, ("branch_pool", 192, 1)],
    ]


class Inception(nn.Module):
    """23.9 M parameters; made with random weights, see `load_inception`."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2, same=False)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3, same=False)
        self.Mixed_5b, self.Mixed_5c = _Mixed(192, _mixed_5(32)), _Mixed(256, _mixed_5(64))
        self.Mixed_5d, self.Mixed_6a = _Mixed(288, _mixed_5(64)), _Mixed(288, MIXED_6A)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (
            _Mixed(768, _mixed_6(middle)) for middle in (128, 160, 160, 192))
        self.Mixed_7a = _Mixed(768, MIXED_7A)
        self.Mixed_7b, self.Mixed_7c = _Mixed(1280, _mixed_7(_average)), _Mixed(2048, _mixed_7(_maximum))
        self.fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features, spatial features and logits.

        Args:
            images: (b, 3, h, w), 0 .. 255, any size.

        Returns:
            features (b, 2048): pool3. spatial (b, 2023): the first 7 channels of mixed_6/conv after its ReLU, flattened
            rows first, channels last. logits (b, 1008): without bias, as Inception Scores are computed.
        """
        x = (resize_like_tensorflow1(images.float(), SIDE, SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))           # (b, 64, 147, 147)
        x = _halved(x)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))                               # (b, 192, 71, 71)
        x = _halved(x)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))                          # (b, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))                          # (b, 768, 17, 17)
        first: Any = self.Mixed_6d.branch1x1
        spatial = first(x)[:, :SPATIAL_CHANNELS]                                # TensorFlow's mixed_6/conv
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                          # (b, 2048, 8, 8)
        features = x.mean(dim=(2, 3))
        return {
            "features": features, "spatial": spatial.permute(0, 2, 3, 1).flatten(1),
            "logits": F.linear(features, self.fc.weight),
        }


def load_inception(path: str | Path | None = None) -> tuple[Inception, str]:
    """The network with the public weights, and the SHA-256 of its tensors.

    Args:
        path: the file under whatever name, as pytorch-fid or torch-fidelity publish it; None downloads it into
            PyTorch's hub folder, once.

    Raises:
        ValueError: when the file is damaged, is another network, or would execute something.
        OSError: when it is missing or cannot be downloaded.
    """
    path = Path(path) if path is not None else _download()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; the Inception weights are public: {URLS[0]}")
    try:
        weights = read_pickle(path)
    except ValueError as error:
        raise ValueError(f"{error}; download it again: {URLS[0]}") from error
    with own_random_state():
        model = Inception()
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    for name in [name for name in expected if name.endswith(".num_batches_tracked")]:
        if name not in found:                                                   # older files have none
            del expected[name]
    if found != expected:
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        what = ", ".join(f"{n}: {found.get(n, 'missing')} for {expected.get(n, 'nothing')}" for n in odd[:3])
        raise ValueError(
            f"{path} is not the Inception network of 2015-12-05: {len(odd)} of its tensors do not fit ({what}); "
            f"{FILE_NAME} is the right file, torchvision's Inception is another network"
        )
    for name in expected:
        if not weights[name].is_floating_point() and not name.endswith(".num_batches_tracked"):
            raise ValueError(f"{path}: {name} is {weights[name].dtype}, not floating point; download the file again")
    model.load_state_dict(weights, strict=False)
    if bad := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise ValueError(f"{path}: {bad[0]} holds NaN or infinities; download the file again")
    return model.eval().requires_grad_(False), hash_weights(model)


def _download() -> Path:
    """The public file in PyTorch's hub folder; checked against the hash in its name."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / FILE_NAME
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    for url in URLS:
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=PUBLISHED_SHA256, progress=True)
            return path
        except (OSError, RuntimeError) as error:
            failures.append(f"{url}: {error}")
    raise OSError(
        f"the Inception weights could not be downloaded ({'; '.join(failures)}); fetch them elsewhere, and name the "
        "file: weights=FILE. Without them: features=digits for handwritten digits, or features=module:function"
    )


class InceptionFeatures:
    """pool3, the spatial features of sFID, and logits of the Inception network of 2015-12-05.

    Args: as `load_inception`.
    """

    distance_name = "FID"
    has_class_logits = False                                                    # 1008, in an order of its own

    def __init__(self, weights: str | Path | None = None, device: torch.device | str = "cpu"):
        model, digest = load_inception(weights)
        self._model, self._device = model.to(device), device
        self.info = FeatureNetworkInfo("inception-2015-12-05", digest, "299 x 299, bilinear as TensorFlow 1", 3)

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Outputs:
        return to_arrays(self._model(to_tensor(images, self._device)))
