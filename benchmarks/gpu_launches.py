"""Kernels that a GPU launches in a forward pass of LaMamba-XL without gradients, counted without a GPU.

    python benchmarks/gpu_launches.py [--images 64] [--size 256] [--dtype bfloat16] [--list]

The network runs on meta tensors, which have no values, and every question for their device is answered with "cuda".
Counted are PyTorch's operators but those that only look at a tensor in another way or allocate one, and the launches of
Triton. Operators of ours run the code that they run on a GPU. A product of PyTorch counts as one kernel: its library
may launch two.

Also printed: the activations that a pass holds at once, which a CUDA graph keeps for itself.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent))

from lamamba.config import UNetConfig
from lamamba.models.unet import LaMambaUNet
from lamamba.ops.layers import gpu
from lamamba.ops.selective_scan import OP

PROCESSORS = 132
"""Multiprocessors of an H100 or H200."""
WITHOUT_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "detach")


class PretendedGPU(TorchFunctionMode):
    """Context manager: meta tensors say that they are on a CUDA device, and our operators run their GPU code."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function == Tensor.device.__get__:
            return torch.device("cuda", 0)
        if function == Tensor.is_cuda.__get__:
            return True
        if str(function).startswith("lamamba."):
            with self:
                return run_on_gpu(str(function).split(".")[1], *args)
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        args = [torch.device("meta") if isinstance(x, torch.device) else x for x in args]
        return function(*args, **kwargs)


def run_on_gpu(name: str, *args: Any) -> Any:
    """What an operator of ours runs on a CUDA device."""
    if name == "selective_scan":
        *inputs, backend = args
        return OP.get(backend).load().forward(*inputs)
    name = name.removeprefix("gpu_")
    return getattr(gpu._kernels(name), name)(*args)


class LaunchCounter(TorchDispatchMode):
    """Context manager that counts the kernels of what is computed inside it, by name, and the bytes held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes, self.peak = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not function.is_view and name not in WITHOUT_KERNEL:
            self.launches[f"aten.{name}"] += 1
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(output):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                self._hold(x)
        return output

    def _hold(self, x: Tensor) -> None:
        size = x.untyped_storage().nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(x.untyped_storage(), self._release, size)

    def _release(self, size: int) -> None:
        self.bytes -= size


@contextmanager
def counted() -> Iterator[LaunchCounter]:
    """Count what is computed inside on meta tensors, as on a CUDA device."""
    counter = LaunchCounter()

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        counter.launches[f"triton.{kernel.fn.__name__}"] += 1

    properties = SimpleNamespace(multi_processor_count=PROCESSORS, major=9, minor=0)
    with (
        mock.patch.object(triton.JITFunction, "run", launch),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.cuda, "device_of", nullcontext),
        torch.no_grad(), PretendedGPU(), counter,
    ):
        yield counter


def meta_network(config: UNetConfig, dtype: torch.dtype) -> LaMambaUNet:
    with torch.device("meta"):
        return LaMambaUNet(config).to(dtype).eval()


def count_block(model: LaMambaUNet, images: int, stage: int = 0, shifted: bool = False) -> Counter[str]:
    """Launches of one block of an encoder stage while sampling."""
    block = list(model.encoder[stage].blocks.values())[shifted]
    geometry = model.geometries[min(stage, 2)]
    weight = block.modulation.weight
    x = weight.new_empty((images, *geometry.grid, weight.shape[1]))
    modulation = weight.new_empty((images, weight.shape[0]))
    with counted() as counter:
        constants = block.constants(geometry)
        counter.launches.clear()
        block(x, None, geometry, modulation, constants)
    return counter.launches


def count_network(model: LaMambaUNet, images: int) -> LaunchCounter:
    """Launches of a whole pass while sampling."""
    weight = next(model.parameters())
    x = weight.new_empty((images, model.architecture.in_channels, *model.architecture.input_size))
    conditioning = weight.new_empty((images, model.condition_outputs))
    with counted() as counter:
        constants = model.make_constants(x)
        counter.launches.clear()
        counter.peak = counter.bytes = 0
        model(x, None, conditioning=conditioning, constants=constants)
    return counter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--list", action="store_true", help="name the kernels")
    options = parser.parse_args()
    model = meta_network(UNetConfig.preset("xl", image_size=options.size), getattr(torch, options.dtype))
    print(f"LaMamba-XL, {options.images} images of {options.size} pixels, {options.dtype}")
    for stage in range(3):
        for shifted in (False, True):
            launches = count_block(model, options.images, stage, shifted)
            print(f"stage {stage}, {'shifted' if shifted else 'plain'} block: {launches.total()} launches")
            if options.list:
                print("    " + ", ".join(f"{count} {name}" for name, count in launches.most_common()))
    counter = count_network(model, options.images)
    blocks = sum(len(stage.blocks) for stage in model._stages())
    print(f"network of {blocks} blocks: {counter.launches.total()} launches, "
          f"{counter.peak / options.images / 2**20:.1f} MB of activations an image at once")


if __name__ == "__main__":
    main()
