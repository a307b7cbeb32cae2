"""Training that starts from a trained network, or continues an official checkpoint."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, Literal

import torch

from lamamba.config import UNetConfig
from lamamba.models.adapters import BLOCK_PRODUCTS, check_peft, find_targets, largest_rank
from lamamba.models.official import load_official, official_optimizer, read_official
from lamamba.models.unet import LaMambaUNet
from lamamba.options.training import LoraOptions, ModelOptions, StartOptions, TrainConfig, TrainOptions
from lamamba.runs.folder import RunFolder
from lamamba.runs.lora import LoraBase
from lamamba.runs.model import fingerprint, open_network
from lamamba.training.checkpoint import TrainState, put, restore_optimizer
from lamamba.utils.distributed import is_rank_zero
from lamamba.utils.files import attribute_differences

logger = logging.getLogger("lamamba.training")


def with_network_of_source(options: TrainOptions) -> TrainOptions:
    """The options with the network of start.source, where their own [model] section names no size or there is a LoRA.

    The objective is the source's, too, unless the section has one: a flow map may start from a flow. A run that has a
    checkpoint keeps the network that it has: the source may be gone.

    Raises:
        FileNotFoundError, ValueError: when there is no such source, or it is damaged.
    """
    own, default = options.model, ModelOptions()
    names_size = dataclasses.replace(own, objective=None, guidance_range=None) != default
    if options.start.source is None or (names_size and options.lora.rank is None):
        return options
    run = RunFolder(options.out)
    if run.names():
        model = TrainConfig.from_dict(run.read_config().train).model
    else:
        model = ModelOptions.of(_open_source(options.start)[0].architecture)
    if own != default and options.lora.rank is None:
        objective = own.objective or model.objective
        model = dataclasses.replace(model, objective=objective, guidance_range=own.guidance_range)
    return dataclasses.replace(options, model=model)


def start_network(options: StartOptions, architecture: UNetConfig, label_names: tuple[str, ...] = ()) -> LaMambaUNet:
    """A network with the averaged weights of the source, and a fresh label table where requested.

    A fresh table keeps the row of the null label. A flow map may start from a flow, whose outputs are its own at first.

    Raises:
        FileNotFoundError: when there is no such source.
        ValueError: when the source is another network, or has other classes and options.replace_labels is not set.
    """
    saved = check_start(options, architecture, label_names)
    network = LaMambaUNet(architecture)                                         # its label table is fresh already
    table = saved.state_dict()
    if options.replace_labels:
        no_class = table.pop("label_embedding.weight")[-1]
        with torch.no_grad():
            network.label_embedding.weight[-1] = no_class
    missing, unexpected = network.load_state_dict(table, strict=False)
    assert not unexpected, unexpected
    fresh = ["label_embedding.weight"] if options.replace_labels else []
    if saved.architecture.objective == "flow":                                  # of flow maps, zero at first
        fresh += [name for name in network.state_dict() if name.startswith(("gap_embedding.", "guidance_embedding."))]
    assert sorted(missing) == sorted(fresh), missing
    return network


def open_base(config: TrainConfig, architecture: UNetConfig) -> tuple[LaMambaUNet, LoraBase] | None:
    """The network that a run's LoRA is for, and its name and hash; None for a run without.

    Raises:
        FileNotFoundError, ValueError: as `start_network`, and for layers that it does not have.
        RuntimeError: without peft.
    """
    if config.lora.rank is None:
        return None
    check_peft()
    source = config.start.source
    network, _ = _open_source(config.start)
    _check_same(network.architecture, architecture, Path(str(source)), set(), replaces_labels=False)
    lora_layers(network, config.lora)
    return network, LoraBase(base=str(source), base_sha256=fingerprint(network))


def lora_layers(network: LaMambaUNet, options: LoraOptions) -> list[str]:
    """Names of the layers that a LoRA adapts.

    Raises:
        ValueError: for a name of none, or a rank above that of all of them.
    """
    modules = dict(network.named_modules())
    names = options.layers or [
        name for name in BLOCK_PRODUCTS if any(module.endswith(f".{name}") for module in modules)]
    layers = find_targets(modules, names)
    widest = max(largest_rank(modules[name]) for name in layers)
    if options.rank is not None and options.rank > widest:
        raise ValueError(f"lora.rank={options.rank} is more than any of its layers has; choose at most {widest}")
    return layers


def add_lora_layers(network: LaMambaUNet, options: LoraOptions) -> None:
    """Add a fresh LoRA, B = 0, to a network, in place; all other weights need no gradients any more."""
    from peft import LoraConfig

    assert options.rank is not None
    alpha: Any = options.rank if options.alpha is None else options.alpha       # peft takes fractions, too
    network.requires_grad_(False)
    network.add_adapter(LoraConfig(r=options.rank, lora_alpha=alpha, target_modules=lora_layers(network, options)))


def check_start(options: StartOptions, architecture: UNetConfig, label_names: tuple[str, ...] = ()) -> LaMambaUNet:
    """The network that training starts from, when it fits; other names of as many classes are warned of.

    Raises:
        FileNotFoundError, ValueError: as `start_network` and `continue_official`.
    """
    saved, names = _open_source(options)
    found = saved.architecture.objective
    if architecture.objective == "flow-map" and found not in ("flow", "flow-map"):
        raise ValueError(
            f"start.source={options.source} is a {found} model, and a flow map starts from a flow or a flow map: give "
            "one, or leave start.source out"
        )
    changes = {"num_classes"} if options.replace_labels else set()
    if architecture.objective == "flow-map" and saved.architecture.objective == "flow" and options.mode == "weights":
        changes |= {"objective", "guidance_range"}
    _check_same(saved.architecture, architecture, Path(str(options.source)), changes)
    if names and label_names and names != label_names and not options.replace_labels and is_rank_zero():
        there, here = next(pair for pair in zip(names, label_names, strict=True) if pair[0] != pair[1])
        logger.warning(
            "%s was trained on other classes (%r where this data has %r), and they keep its labels; "
            "start.replace_labels gives them fresh ones", options.source, there, here)
    return saved


def _open_source(options: StartOptions) -> tuple[LaMambaUNet, tuple[str, ...]]:
    """The network, and the names of its classes where they are known."""
    assert options.source is not None
    source = Path(options.source)
    if options.mode == "everything":
        return _load_part(_read_training_checkpoint(source), "model", source), ()
    if source.suffix == ".pt":
        return load_official(source), ()
    network, metadata = open_network(source)
    return network, metadata.label_names


def _read_training_checkpoint(path: Path) -> dict[str, Any]:
    content = read_official(path)
    if lacking := [part for part in ("model", "ema", "opt") if part not in content]:
        raise ValueError(
            f"{path} lacks {', '.join(lacking)}: it is no whole training checkpoint; use start.mode='weights'"
        )
    return content


def _load_part(content: dict[str, Any], part: Literal["model", "ema"], path: Path) -> LaMambaUNet:
    """Weights or average of an official training checkpoint; errors name its file."""
    try:
        return load_official(content, weights=part)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def continue_official(path: Path, state: TrainState) -> None:
    """Continue an official training checkpoint: weights, average, AdamW's state and its number of steps.

    The official file keeps one average; further ones start from its weights.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it holds another network, or lacks a part.
    """
    content = _read_training_checkpoint(path)
    networks = {part: _load_part(content, part, path) for part in ("model", "ema")}
    _check_same(networks["model"].architecture, state.model.architecture, path, set())
    for network, part in ((state.model, "model"), *(
        (average, "ema" if average is state.ema else "model") for average in state.averages.values()
    )):
        tensors = dict(networks[part].named_parameters())
        for name, parameter in network.named_parameters():
            put(parameter, tensors[name])
    moments, step, group = official_optimizer(content, networks["model"])
    restore_optimizer(state.model, state.optimizer, moments)
    state.step = step
    ours = state.optimizer.param_groups[0]
    for key in ("lr", "weight_decay", "betas"):
        if group.get(key) != ours[key]:
            logger.warning("%s was trained with %s=%s; this run goes on with %s", path, key, group.get(key), ours[key])


def _check_same(
    saved: UNetConfig, wanted: UNetConfig, source: Path, changes: set[str], *, replaces_labels: bool = True
) -> None:
    names = [field.name for field in dataclasses.fields(UNetConfig) if field.name not in changes]
    if differences := attribute_differences(saved, wanted, names):
        hint = ""
        if replaces_labels and saved.num_classes != wanted.num_classes and "num_classes" not in changes:
            hint = "; to train on other classes, give start.replace_labels"
        raise ValueError(
            f"{source} is another network than this run's ({'; '.join(differences)}): leave out the model's "
            f"options, or let them describe the one that is there{hint}"
        )
