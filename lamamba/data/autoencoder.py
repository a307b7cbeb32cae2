"""Frozen autoencoders of diffusers: loaded from safetensors alone, identified by a hash, images to moments and back."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import Tensor, nn

from lamamba.utils.tensors import FLOATS, PICKLES, check_finite, read_header, weight_files
from lamamba.utils.text import first_line

logger = logging.getLogger("lamamba.data")

KINDS = ("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderDC", "AutoencoderTiny")
"""Classes of diffusers whose latents are one grid per image."""
WITH_POSTERIOR = ("AutoencoderKL", "AsymmetricAutoencoderKL")
"""Those whose latents are drawn from a normal posterior; the others are deterministic."""
_IRRELEVANT = {"sample_size", "force_upcast"}
"""Entries of a configuration that do not change latents."""


def pixels_per_latent(config: Mapping[str, Any]) -> int:
    """Downsampling factor of an autoencoder, from its configuration: every stage but one halves the image.

    Raises:
        ValueError: for the configuration of another class.
    """
    names = ("block_out_channels", "down_block_out_channels", "encoder_block_out_channels")
    stages = next((stages for name in names if (stages := config.get(name))), None)
    if not isinstance(stages, list | tuple) or not 1 <= len(stages) <= 16:
        raise ValueError(f"a {config.get('_class_name')} is not one of {', '.join(KINDS)}, or its stages are no list")
    return 2 ** (len(stages) - 1)


class Autoencoder:
    """A frozen autoencoder. Nothing is unpickled to load it.

    Args:
        name: a folder saved by diffusers (or that of a pipeline, for its vae), or a hub id such as
            stabilityai/sd-vae-ft-ema or owner/pipeline/vae.
        device: of its weights.
        dtype: of its weights and activations; float32 for float16 where its configuration says force_upcast. Moments
            are float32 always.

    Raises:
        FileNotFoundError, OSError: when there is no such autoencoder.
        ValueError: when its weights are damaged, incomplete, not safetensors, or it is of an unknown class.
    """

    def __init__(self, name: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.name = str(name)
        network: Any = _load(self.name)
        self.config: dict[str, Any] = dict(network.config)
        if dtype == torch.float16 and self.config.get("force_upcast"):
            logger.info("%s overflows in float16, as its force_upcast says: it computes in float32", name)
            dtype = torch.float32
        self.device, self.dtype = torch.device(device), dtype
        self.kind = type(network).__name__
        self.network: Any = network.requires_grad_(False).eval()
        """The diffusers model itself."""
        self.sha256 = self._identity()
        """Of weights and configuration; the same for copies under other names."""
        for tensor in [*self.network.parameters(), *self.network.buffers()]:
            tensor.data = tensor.data.clone()                                   # a file's alignment rounds otherwise
        self.network = nn.Module.to(self.network, self.device, dtype)          # diffusers' own warns of nothing
        self.in_channels: int = self.config["in_channels"]
        self.out_channels: int = self.config.get("out_channels") or self.in_channels
        """Of the images that it decodes to."""
        self.has_posterior = self.kind in WITH_POSTERIOR

    def _identity(self) -> str:
        digest = hashlib.sha256(json.dumps([self.kind, _non_default(type(self.network), self.config)]).encode())
        for key, tensor in sorted(self.network.state_dict().items()):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}, {self.sha256[:12]})"

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation (b, c, h, w) float32 of the latents of pixels (b, in_channels, H, W) in [-1, 1].

        Autoencoders without a posterior return their latents and None.
        """
        encoded = self.network.encode(pixels.to(self.device, self.dtype))
        if self.has_posterior:
            return encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
        latents = encoded.latent if hasattr(encoded, "latent") else encoded.latents
        return latents.float(), None

    @functools.lru_cache(maxsize=8)                                             # noqa: B019 (few are ever made)
    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(c, h, w) of the latents of a square image of this side in pixels, from encoding one.

        Raises:
            ValueError: when the autoencoder cannot encode this size, or would decode to another one.
        """
        side = pixels_per_latent(self.config)
        advice = f"choose a multiple of {4 * side}"                             # the network halves latents twice
        try:
            mean, _ = self.moments(torch.zeros(1, self.in_channels, image_size, image_size))
        except RuntimeError as error:
            raise ValueError(
                f"{self} cannot encode images of {image_size} x {image_size} pixels ({first_line(error)}); {advice}"
            ) from error
        c, h, w = mean.shape[1:]
        if (h * side, w * side) != (image_size, image_size):
            raise ValueError(
                f"{self} makes latents of {h} x {w} from images of {image_size} x {image_size} pixels, which are "
                f"{h * side} x {w * side} when they come back; {advice}"
            )
        return c, h, w

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (b, channels, H, W) float32, about -1 .. 1, of latents (b, c, h, w).

        Raises:
            FloatingPointError: when they are not finite.
        """
        pixels = self.network.decode(latents.to(self.device, self.dtype)).sample.float()
        if not pixels.isfinite().all():
            raise FloatingPointError(
                f"the autoencoder {self} decodes to NaN or infinities in {self.dtype}: take float32 or bfloat16"
            )
        return pixels


def _non_default(kind: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a configuration that differ from its class's defaults: new entries do not change the hash."""
    plain = json.loads(json.dumps({key: value for key, value in config.items() if not key.startswith("_")}))
    standard = json.loads(json.dumps(_defaults(kind), default=str))
    return {
        key: value for key, value in sorted(plain.items())
        if key not in _IRRELEVANT and (key not in standard or value != standard[key])
    }


def _defaults(kind: type) -> dict[str, Any]:
    return {key: value.default for key, value in inspect.signature(kind).parameters.items()}


def _load(name: str) -> nn.Module:
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()                                     # what matters is checked below
    try:
        return _load_checked(name)
    finally:
        diffusers_logging.set_verbosity(verbosity)


def _load_checked(name: str) -> nn.Module:
    place, options = _find(name)
    try:
        config = diffusers.AutoencoderKL.load_config(place, **options)
    except OSError as error:
        raise OSError(f"there is no autoencoder {name!r}: {first_line(error)}") from error
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind not in KINDS:
        raise ValueError(f"{name} is a {kind or 'thing without a class'}, not one of {', '.join(KINDS)}")
    if Path(place).is_dir():
        _check_files(Path(place), getattr(diffusers, kind), config)
    try:
        network, report = getattr(diffusers, kind).from_pretrained(
            place, **options, use_safetensors=True, low_cpu_mem_usage=False, torch_dtype=torch.float32,
            output_loading_info=True, disable_mmap=True,
        )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"the weights of {name} cannot be loaded: {first_line(error)}; only whole safetensors files are read, as "
            "a pickle (.bin, .pt) could run code"
        ) from error
    wrong = [
        f"{kind}: {', '.join(map(str, list(report[f'{kind}_keys'])[:3]))}"
        for kind in ("missing", "unexpected", "mismatched") if report.get(f"{kind}_keys")
    ]
    if wrong:
        raise ValueError(f"the weights of {name} do not fit its configuration ({'; '.join(wrong)})")
    check_finite(network, name)
    return network


def _check_files(folder: Path, kind: Any, config: Mapping[str, Any]) -> None:
    """Compare a configuration with the types of its class's defaults and the header of the weights, before anything is
    allocated.

    Raises:
        ValueError: naming the file and the entry that does not fit.
    """
    found = {name: entry for file in weight_files(folder) for name, entry in read_header(file).items()}
    where, sides = folder / "config.json", [side for entry in found.values() for side in entry.shape]
    for key, default in _defaults(kind).items():
        value = config.get(key, default)
        atoms, usual = _atoms(value), _atoms(default)
        fits = {int: (int,), float: (int, float), bool: (bool,), str: (str,), type(None): (int, float, str, type(None))}
        allowed = fits[type(usual[0])] if usual else (int, float, type(None))
        if any(type(atom) not in allowed for atom in atoms) or (isinstance(default, tuple) and not _is_list(value)):
            raise ValueError(f"{where}: {key}={str(value)[:60]} is of another type than a {kind.__name__} takes")
        most = len(found) if "layers" in key or "num" in key else max(1024, *sides, 0)
        if key not in _IRRELEVANT and any(isinstance(atom, int) and abs(atom) > most for atom in atoms):
            raise ValueError(f"{where}: {key}={str(value)[:60]} is larger than anything in the weights ({most})")
    try:
        with torch.device("meta"):
            expected = kind.from_config(config).state_dict()
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{where} describes no {kind.__name__}: {first_line(error)}") from error
    for name, (shape, dtype) in found.items():
        if dtype not in FLOATS:
            raise ValueError(f"{folder}: {name} has type {dtype}, not one of {', '.join(FLOATS)}")
        if name in expected and tuple(expected[name].shape) != shape:
            raise ValueError(
                f"the weights of {folder} do not fit its configuration: {name} has shape {shape}, not "
                f"{tuple(expected[name].shape)}"
            )


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _atoms(value: Any) -> list[Any]:
    """The values in nested lists."""
    return [atom for item in value for atom in _atoms(item)] if _is_list(value) else [value]


def _find(name: str) -> tuple[str, dict[str, Any]]:
    """Name and options for from_pretrained.

    Raises:
        FileNotFoundError: when a folder holds none.
        ValueError: when its weights are only there as a pickle.
    """
    path = Path(name)
    if path.is_file():
        if path.suffix in PICKLES:
            raise ValueError(_pickle_message(name, path.name))
        raise ValueError(f"{name} is a file; give the folder that holds config.json and the safetensors weights")
    if not path.is_dir():
        parts = name.split("/")
        if name.startswith((".", "/", "~")) or len(parts) < 2:
            raise FileNotFoundError(
                f"there is no autoencoder {name!r}; give a folder as diffusers saves it, or a hub id such as "
                "stabilityai/sd-vae-ft-ema"
            )
        return "/".join(parts[:2]), {"subfolder": "/".join(parts[2:])} if parts[2:] else {}
    if (path / "model_index.json").is_file() and (path / "vae").is_dir():
        path /= "vae"
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{name} holds no autoencoder: there is no config.json in it")
    if not any(path.glob("*.safetensors")):
        pickles = [file.name for file in sorted(path.iterdir()) if file.suffix in PICKLES]
        if pickles:
            raise ValueError(_pickle_message(name, pickles[0]))
        raise FileNotFoundError(f"{name} holds no weights: there is no .safetensors file in it")
    return str(path), {"local_files_only": True}


def _pickle_message(name: str, file: str) -> str:
    return (
        f"{name} has its weights as a pickle ({file}), which can run code when it is opened; it was not opened. Get "
        "the safetensors version, or make one where you trust the file: torch.load(..., weights_only=True), then "
        "safetensors.torch.save_file"
    )
