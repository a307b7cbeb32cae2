"""LoRA (arXiv 2106.09685) for a network, through diffusers' PeftAdapterMixin and peft, an extra.

A product W x of an adapted layer becomes W x + (alpha / r) B A x with A (r, in) and B (out, r); training changes A and
B alone. Both packages are imported when a method is first called: that takes seconds.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lamamba.config import check_known, unknown_name
from lamamba.models.ss2d import LocalMixing
from lamamba.utils.tensors import PICKLE_ADVICE, read_tensors
from lamamba.utils.text import shown

LORA_FILE = "pytorch_lora_weights.safetensors"
"""As diffusers names it."""
LORA_SETTINGS = "lora_adapter_metadata"
"""Of the file's metadata: peft's LoraConfig as JSON."""
BLOCK_PRODUCTS = (
    "scan.in_proj", "scan.out_proj", "attention.qkv", "attention.out_proj", "mlp.linear_in", "mlp.linear_out",
)
"""Layers that `lamamba train --lora.rank` adapts by default: the tokens' products of every block."""
PARTS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PEFT_ERRORS = (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError, re.error)
"""What peft and diffusers raise for settings and tensors that do not fit together."""


def check_peft() -> None:
    """Check that peft is installed.

    Raises:
        RuntimeError: with what to install.
    """
    if importlib.util.find_spec("peft") is None:
        raise RuntimeError("LoRA needs peft: pip install 'lamamba-diff[lora]'")


def _of_mixin(name: str, *, changes: bool = True) -> Callable[..., Any]:
    """A method of diffusers' PeftAdapterMixin, which is imported when it is called; the change is counted."""
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        check_peft()
        from diffusers.loaders.peft import PeftAdapterMixin

        if changes:
            self.adapter_changes += 1
        return getattr(PeftAdapterMixin, name)(self, *args, **kwargs)

    method.__name__, method.__doc__ = name, f"As `{name}` of diffusers' PeftAdapterMixin."
    return method


class Adapters:
    """The methods of diffusers' PeftAdapterMixin for LaMambaUNet.

        unet.add_adapter(LoraConfig(r=16, target_modules=["attention.qkv", "mlp.linear_in"]))       # of peft
        unet.save_lora_adapter("folder")
        unet.load_lora_adapter("folder", adapter_name="mine")

    Raises (every method):
        RuntimeError: without peft.
    """

    _hf_peft_config_loaded: bool | None = False
    _prepare_lora_hotswap_kwargs: dict[str, Any] | None = None
    adapter_changes = 0
    """Calls that may have changed what the adapters add: what was computed ahead before one of them is stale."""

    set_adapter = _of_mixin("set_adapter")
    enable_adapters = _of_mixin("enable_adapters")
    disable_adapters = _of_mixin("disable_adapters")
    enable_lora = _of_mixin("enable_lora")
    disable_lora = _of_mixin("disable_lora")
    active_adapters = _of_mixin("active_adapters", changes=False)
    fuse_lora = _of_mixin("fuse_lora")
    unfuse_lora = _of_mixin("unfuse_lora")
    unload_lora = _of_mixin("unload_lora")
    enable_lora_hotswap = _of_mixin("enable_lora_hotswap")
    _add_adapter = _of_mixin("add_adapter")
    _load_lora_adapter = _of_mixin("load_lora_adapter")
    _delete_adapters = _of_mixin("delete_adapters")
    _fuse_lora_apply = _of_mixin("_fuse_lora_apply")
    _unfuse_lora_apply = _of_mixin("_unfuse_lora_apply")

    @classmethod
    def _optionally_disable_offloading(cls, pipeline: Any) -> Any:
        from diffusers.loaders.peft import PeftAdapterMixin

        return PeftAdapterMixin._optionally_disable_offloading(pipeline)

    @property
    def has_adapters(self) -> bool:
        """Whether layers are wrapped for adapters, also for those that are disabled or fused."""
        modules: Iterable[Any] = self.modules()  # type: ignore[attr-defined]
        return any(hasattr(module, "base_layer") for module in modules)

    def check_plain(self, what: str) -> None:
        """Check that there are no adapters.

        Raises:
            ValueError: when there are, and what (to be done) needs a network without.
        """
        if self.has_adapters:
            names = ", ".join(getattr(self, "peft_config", {})) or "of peft"
            raise ValueError(
                f"{what} is for networks without adapters ({names}): call fuse_lora() and unload_lora() first to add "
                "them to the weights, or unload_lora() alone to leave them out; save_lora_adapter saves an adapter"
            )

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Add a fresh adapter and make it the active one.

        Args:
            adapter_config: peft's LoraConfig.
            adapter_name: of the adapter.

        Raises:
            ValueError: when a name is taken, or a layer is named that cannot have one.
        """
        check_peft()
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists

        if not isinstance(adapter_config, LoraConfig):
            raise ValueError(f"add_adapter takes peft's LoraConfig, not {type(adapter_config).__name__}")
        if adapter_config.target_parameters:
            raise ValueError(
                f"target_parameters={sorted(adapter_config.target_parameters)}: peft saves adapters of parameters that "
                f"are no layers, but cannot load them; name layers in target_modules, as in {list(BLOCK_PRODUCTS)}"
            )
        refused = [
            name for name, module in self._named_modules().items()
            if isinstance(module, LocalMixing) and check_target_module_exists(adapter_config, name)
        ]
        if refused:
            raise ValueError(
                f"{refused[0]} is a depthwise convolution fused with its SiLU, to which nothing low-rank can be added: "
                f"leave it out of target_modules, as in {list(BLOCK_PRODUCTS)}"
            )
        known = list(getattr(self, "peft_config", {}))
        try:
            self._add_adapter(adapter_config, adapter_name)
        except (ValueError, TypeError, NotImplementedError):
            if adapter_name not in known:                                       # layers before the one that failed
                self._delete_adapters(adapter_name)
            if not known:
                self.unload_lora()
            raise

    def load_lora_adapter(
        self, pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor], prefix: str | None = None, *,
        adapter_name: str | None = None, weight_name: str = LORA_FILE, subfolder: str | None = None,
        revision: str | None = None, token: str | bool | None = None, cache_dir: str | Path | None = None,
        local_files_only: bool = False, metadata: dict[str, Any] | None = None, hotswap: bool = False,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        """Load an adapter that `save_lora_adapter` (or `lamamba train --lora.rank`) has written, as another one.

        Args:
            pretrained_model_name_or_path_or_dict: a folder, a file, a hub id, or tensors.
            prefix: in front of the names of the tensors.
            adapter_name: by default "default_0" and so on.
            weight_name: of the file in the folder.
            subfolder, revision, token, cache_dir, local_files_only: see huggingface_hub.
            metadata: of LoraConfig, where tensors are given.
            hotswap, low_cpu_mem_usage: as in diffusers.

        Raises:
            OSError: when there is no such file.
            ValueError: when it is no LoRA, or one of another network; nothing is changed.
        """
        check_peft()
        source = pretrained_model_name_or_path_or_dict
        if isinstance(source, Mapping):
            tensors, where = dict(source), "state dict"
        else:
            path = _find_file(source, weight_name, subfolder, revision, token, cache_dir, local_files_only)
            tensors, where = read_tensors(path), str(path)
            metadata = metadata or read_settings(path)
        if prefix is not None:
            start = f"{prefix}."
            tensors = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
        check_fits(self._named_modules(), {name: tuple(tensor.shape) for name, tensor in tensors.items()}, where)
        _check_values(tensors, where)
        _check_settings(metadata or {}, tensors, where)
        known = list(getattr(self, "peft_config", {}))
        reports = logging.getLogger("diffusers.loaders.peft")
        reports.addFilter(_is_no_error)                                         # what is raised is not logged, too
        try:
            self._load_lora_adapter(
                tensors, prefix=None, adapter_name=adapter_name, metadata=metadata, hotswap=hotswap,
                low_cpu_mem_usage=low_cpu_mem_usage,
            )
        except Exception as error:                                              # peft's own checks are few
            if not known:
                self.unload_lora()
            if not isinstance(error, PEFT_ERRORS):
                raise
            reason = " ".join(str(error.__cause__ or error).split())
            raise ValueError(f"{where} cannot be loaded by peft: {reason:.200}") from error
        finally:
            reports.removeFilter(_is_no_error)

    def save_lora_adapter(
        self, save_directory: str | Path, adapter_name: str = "default", *, upcast_before_saving: bool = False,
        weight_name: str = LORA_FILE,
    ) -> None:
        """Save an adapter, as diffusers does, as safetensors.

        Args:
            save_directory: made where it is missing.
            adapter_name: of the adapter.
            upcast_before_saving: save float32.
            weight_name: of the file, *.safetensors.

        Raises:
            ValueError: when there is no such adapter, or the file would be a pickle.
        """
        check_peft()
        from peft.utils import get_peft_model_state_dict

        known = getattr(self, "peft_config", {})
        check_known("adapter", adapter_name, known)
        if not weight_name.endswith(".safetensors"):
            raise ValueError(f"weight_name={weight_name!r} must end in .safetensors")
        values = {k: sorted(v) if isinstance(v, set) else v for k, v in known[adapter_name].to_dict().items()}
        tensors = get_peft_model_state_dict(self, adapter_name=adapter_name, save_embedding_layers=False)
        tensors = {name: (tensor.float() if upcast_before_saving else tensor).detach().contiguous()
                   for name, tensor in tensors.items()}
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        text = json.dumps(values, indent=2, sort_keys=True)
        # one entry: safetensors writes several in any order
        save_file(tensors, Path(save_directory) / weight_name, metadata={LORA_SETTINGS: text})

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Remove adapters; without any left the network is as it was before the first.

        Raises:
            ValueError: for an unknown name.
        """
        self._check_names(adapter_names)
        self._delete_adapters(adapter_names)
        if not getattr(self, "peft_config", None):
            self.unload_lora()

    def set_adapters(self, adapter_names: list[str] | str, weights: Any = None) -> None:
        """Make these adapters the active ones.

        Args:
            adapter_names: of adapters that are loaded.
            weights: a number for all, or one for each, or a dictionary of parts as in diffusers; by default 1.

        Raises:
            ValueError: for an unknown name, or a weight that is no finite number.
        """
        from diffusers.utils import set_weights_and_activate_adapters

        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_names(names)
        given = list(weights) if isinstance(weights, list | tuple) else [weights] * len(names)
        if len(given) != len(names):
            raise ValueError(f"{len(given)} weights came for {len(names)} adapters; give one for all, or one for each")
        for weight in given:
            if not isinstance(weight, Mapping | None) and (
                    isinstance(weight, str | bool) or not math.isfinite(float(weight))):
                raise ValueError(
                    f"weights={shown(weights)} must be finite numbers: one for all, or one for each adapter")
        set_weights_and_activate_adapters(self, names, [1.0 if weight is None else weight for weight in given])
        self.adapter_changes += 1

    def _check_names(self, adapter_names: list[str] | str) -> None:
        check_peft()
        known = list(getattr(self, "peft_config", {}))
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            check_known("adapter", name, known)

    def _named_modules(self) -> dict[str, nn.Module]:
        """The layers by the names that they have without adapters."""
        modules: Iterable[tuple[str, Any]] = self.named_modules()  # type: ignore[attr-defined]
        return {name: getattr(module, "base_layer", module) for name, module in modules}


def _find_file(
    source: str | Path, weight_name: str, subfolder: str | None, revision: str | None, token: str | bool | None,
    cache_dir: str | Path | None, local_files_only: bool,
) -> Path:
    path = Path(source)
    if path.is_dir():
        path = path / (subfolder or "") / weight_name
        if not path.is_file():
            raise FileNotFoundError(f"{path.parent} holds no LoRA: there is no {weight_name} in it")
    elif not path.exists():
        if path.is_absolute() or str(source).startswith((".", "~")) or len(path.parts) != 2:
            raise FileNotFoundError(f"{source} does not exist: name a folder, a file, or a hub id as in owner/name")
        path = Path(hf_hub_download(
            str(source), weight_name, subfolder=subfolder, revision=revision, token=token, cache_dir=cache_dir,
            local_files_only=local_files_only,
        ))
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: weights {PICKLE_ADVICE}")
    return path


def read_settings(path: Path) -> dict[str, Any] | None:
    """The LoraConfig in a LoRA's file, as plain values; None where another program has left it out.

    Raises:
        ValueError: when it is damaged.
    """
    with safe_open(path, "np") as file:
        text = (file.metadata() or {}).get(LORA_SETTINGS)
    if text is None:
        return None
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: {LORA_SETTINGS} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: {LORA_SETTINGS} must be named values")
    return values


def check_fits(modules: Mapping[str, nn.Module], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Check that the tensors of a LoRA are for these layers.

    Args:
        modules: layers by name.
        shapes: of tensors by name, in peft's form.
        where: for messages.

    Raises:
        ValueError: naming the first tensor that does not fit.
    """
    if not any(f".{part}" in name for part in PARTS for name in shapes):
        raise ValueError(f"{where} holds no LoRA in peft's form (tensors called LAYER.lora_A.weight)")
    for name, shape in sorted(shapes.items()):
        layer, _, part = name.rpartition(".lora_")
        part = f"lora_{part}"
        if part not in PARTS:
            continue                                                            # of DoRA, biases: for peft to check
        module = modules.get(layer)
        if module is None:
            raise ValueError(f"{where} is a LoRA of another network: this one has no layer {layer}")
        expected = _expected_shape(module, part, shape)
        if expected is not None and shape != expected:
            raise ValueError(
                f"{where} is a LoRA of another network: {name} has shape {shape}, and {layer} needs {expected}")
        other = f"{layer}.{part.translate(str.maketrans('AB', 'BA'))}"
        if other not in shapes:
            raise ValueError(f"{where} is damaged: it has {name} without {other}")
        if "_A" in part and (shape[:1] != shapes[other][1:2] or shape[0] < 1):
            raise ValueError(
                f"{where} is damaged: {name} of shape {shape} and {other} of shape {shapes[other]} have no rank in "
                "common")


def _is_no_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR


def _check_values(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOAT_TYPES:
            raise ValueError(f"{where}: {name} has type {tensor.dtype}, not one of {', '.join(map(str, FLOAT_TYPES))}")
        if not tensor.isfinite().all():
            raise ValueError(f"{where}: {name} holds NaN or infinities: take an earlier checkpoint")


def _check_settings(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> None:
    """Check that kind, rank and alpha of a LoraConfig are those of the tensors; the rest is for peft to check."""
    kind, rank, alpha = settings.get("peft_type", "LORA"), settings.get("r", 1), settings.get("lora_alpha", 1)
    if getattr(kind, "value", kind) != "LORA":
        raise ValueError(f"{where}: peft_type={shown(kind)} must be LORA: other adapters are not read")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{where}: r={shown(rank)} must be a whole number of at least 1")
    if type(alpha) not in (int, float) or not abs(alpha) < 1e30:             # of whole numbers beyond floats, too
        raise ValueError(f"{where}: lora_alpha={shown(alpha, 40)} must be a finite number")
    if "r" in settings and not settings.get("rank_pattern"):
        for name, tensor in tensors.items():
            if ".lora_A." in name and tensor.shape[0] != rank:
                raise ValueError(
                    f"{where} is damaged: {name} has rank {tensor.shape[0]}, and its settings say r={rank}")
    for whole in settings.get("modules_to_save") or ():
        if not any(name.startswith(f"{whole}.") or f".{whole}." in name for name in tensors):
            raise ValueError(f"{where} is damaged: modules_to_save has {shown(whole)}, and there are no tensors of it")
    is_dora = any(".lora_magnitude_vector" in name for name in tensors)
    if is_dora != bool(settings.get("use_dora", is_dora)):
        raise ValueError(
            f"{where} is damaged: use_dora={settings['use_dora']!r}, and there are {'' if is_dora else 'no '}tensors "
            "called LAYER.lora_magnitude_vector")


def _expected_shape(module: nn.Module, part: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that a LoRA's tensor of this rank has for a layer; None for what peft alone knows."""
    rank = shape[:1] if "_A" in part else shape[1:2]
    if isinstance(module, nn.Linear):
        sizes = {"lora_A.weight": (*rank, module.in_features), "lora_B.weight": (module.out_features, *rank)}
    elif isinstance(module, nn.Conv2d):
        sizes = {"lora_A.weight": (*rank, module.in_channels, *module.kernel_size),
                 "lora_B.weight": (module.out_channels, *rank, 1, 1)}
    elif isinstance(module, nn.Embedding):
        sizes = {"lora_embedding_A": (*rank, module.num_embeddings), "lora_embedding_B": (module.embedding_dim, *rank)}
    else:
        return None
    return sizes.get(part, ())


def find_targets(modules: Mapping[str, nn.Module], names: Iterable[str]) -> list[str]:
    """The full names of the layers that have one of these names, or end in one.

    Raises:
        ValueError: for a name of none, or of a layer that a LoRA cannot adapt.
    """
    kinds = (nn.Linear, nn.Embedding, nn.Conv2d)
    layers = [name for name, module in modules.items() if isinstance(module, kinds)
              and not isinstance(module, LocalMixing)]
    found: set[str] = set()
    for name in names:
        of_name = [layer for layer in layers if layer == name or layer.endswith(f".{name}")]
        if not of_name:
            raise unknown_name("layer for a LoRA", name, sorted({".".join(layer.split(".")[-2:]) for layer in layers}))
        found.update(of_name)
    return sorted(found)


def largest_rank(module: nn.Module) -> int:
    """The rank of a layer's weight matrix: a LoRA of more rows adds nothing."""
    return min(_matrix_sides(module))


def count_parameters(modules: Mapping[str, nn.Module], targets: Iterable[str], rank: int) -> int:
    """Parameters of a LoRA of these layers."""
    return rank * sum(sum(_matrix_sides(modules[name])) for name in targets)


def _matrix_sides(module: nn.Module) -> tuple[int, int]:
    """Rows and columns of a layer's weight as a matrix; a convolution's kernel lies along the columns."""
    assert isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d)
    return module.weight.shape[0], module.weight[0].numel()
