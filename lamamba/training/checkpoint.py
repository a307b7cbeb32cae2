"""The content of a checkpoint, written and read by all ranks together.

    step_00000500/ema/, ema_0.999/, ...     averaged networks, whole, as diffusers saves them: what samplers load
                  model/                    the network itself          (or shards/, where it is split among processes)
                  optimizer.safetensors     AdamW's state
                  shards/*.safetensors      network and AdamW's state in shards (torch.distributed.checkpoint)
                  sampling.json             what a sampler must know
                  state.json                step, omitted batches, world size, device, precision
                  manifest.json             every file's hash

Either kind is read at any world size. Of a run with a LoRA, each network is a folder of that alone (lamamba.runs.lora).
All of it is safetensors and JSON: nothing is ever unpickled.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, distribute_tensor

from lamamba.models.adapters import LORA_FILE
from lamamba.models.unet import LaMambaUNet
from lamamba.options.training import RUN_VERSION
from lamamba.runs.folder import CheckpointState
from lamamba.runs.lora import LoraBase, save_lora
from lamamba.runs.metadata import ModelMetadata
from lamamba.runs.model import average_folders, load_network
from lamamba.training.distributed import Processes
from lamamba.utils.distributed import local, whole
from lamamba.utils.files import write_json
from lamamba.utils.tensors import read_tensors
from lamamba.utils.text import first_line

logger = logging.getLogger("lamamba.training")

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainState:
    """Everything that training changes."""

    model: LaMambaUNet
    averages: dict[float, LaMambaUNet]
    """The averaged networks by their decay, the first one first."""
    optimizer: torch.optim.Optimizer
    base: LoraBase | None = None
    """The network that the run's LoRA is for."""
    step: int = 0
    """Optimizer steps done."""
    omitted: int = 0
    """Batches of the data's order that were not trained on ("left_out" in state.json)."""
    faults: int = 0
    """How often a loss or gradient was not finite."""

    @property
    def next_batch(self) -> int:
        """Number of the batch, in the data's order, that comes next."""
        return self.step + self.omitted

    @property
    def ema(self) -> LaMambaUNet:
        """The first averaged network."""
        return next(iter(self.averages.values()))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema = decay ema + (1 - decay) model, for every parameter that is trained, or for this rank's part of it."""
    pairs = [pair for pair in zip(ema.parameters(), model.parameters(), strict=True) if pair[1].requires_grad]
    torch._foreach_lerp_([local(p) for p, _ in pairs], [local(p) for _, p in pairs], 1 - decay)


@torch.no_grad()
def whole_network(network: LaMambaUNet, processes: Processes) -> LaMambaUNet | None:
    """The whole network on rank 0, None on the others; a collective: all ranks must call it.

    A network that is not sharded is returned as it is; a sharded one is gathered on the CPU.
    """
    if not processes.is_sharded:
        return network if processes.is_rank_zero else None
    state = {}
    for name, parameter in network.named_parameters():
        tensor = whole(parameter)
        if processes.is_rank_zero:
            state[name] = tensor.cpu()
    if not processes.is_rank_zero:
        return None
    copy_ = LaMambaUNet(network.architecture)
    copy_.load_state_dict(state, assign=True)
    return copy_.requires_grad_(False).eval()


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state under the parameters' names: "exp_avg/head.linear.weight", ..."""
    return {
        f"{key}/{name}": value for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Undo `optimizer_tensors`.

    Raises:
        ValueError: for a tensor that is not of this network's AdamW.
    """
    parameters = dict(model.named_parameters())
    for full, value in tensors.items():
        key, _, name = full.partition("/")
        parameter = parameters.get(name)
        shape = parameter.shape if parameter is not None and key in MOMENTS else ()
        if parameter is None or key not in (*MOMENTS, "step") or value.shape != shape or not value.is_floating_point():
            raise ValueError(f"the optimizer's {full}, {value.dtype} {tuple(value.shape)}, is not of this network")
        value = value.to(parameter.device)                                      # a fused AdamW counts steps there, too
        optimizer.state[parameter][key] = _split_like(parameter, value) if key in MOMENTS else value


def write_checkpoint(
    folder: Path, state: TrainState, metadata: ModelMetadata, processes: Processes, setup: Mapping[str, Any]
) -> None:
    """Write all files into an empty folder, all ranks together; nothing is flushed or renamed yet.

    Raises:
        OSError, RuntimeError: when a file cannot be written; RankZeroError on the ranks that could write theirs.
    """
    values = {
        "version": RUN_VERSION, "step": state.step, "left_out": state.omitted, "faults": state.faults,
        "ema_decays": list(state.averages), "optimizer_steps": _optimizer_steps(state), **setup,
    }

    def write_rank_0_files() -> None:
        metadata.save(folder / "sampling.json")
        write_json(folder / "state.json", values)
        if not processes.is_sharded:
            _save_network(state.model, folder / "model", state.base)
            tensors = optimizer_tensors(state.model, state.optimizer) | {"random/torch": torch.get_rng_state()}
            save_file(tensors, folder / "optimizer.safetensors")

    processes.on_rank_0(write_rank_0_files)
    for decay, place in average_folders(folder, state.averages).items():
        network = whole_network(state.averages[decay], processes)
        processes.on_rank_0(functools.partial(_save_network, network, place, state.base))
    if processes.is_sharded:
        writer = HuggingFaceStorageWriter(str(folder / "shards"), save_distributed=True)
        dcp.save(_shards(state), storage_writer=writer)


def _save_network(network: LaMambaUNet | None, folder: Path, base: LoraBase | None) -> None:
    """Save a network, or the LoRA alone of one that has a base."""
    assert network is not None                                                  # on rank 0
    if base is None:
        network.save_pretrained(folder)
    else:
        save_lora(network, base, folder)


def _optimizer_steps(state: TrainState) -> float:
    steps = {float(local(moments["step"])) for moments in state.optimizer.state.values()}
    assert len(steps) <= 1, f"parameters have made different numbers of steps: {steps}"
    return steps.pop() if steps else 0.0


def _shards(state: TrainState) -> dict[str, Tensor]:
    """The network and the optimizer's moments, by name; moments of 0 steps are created where there are none yet."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in state.model.named_parameters():
        tensors[f"model/{name}"] = parameter.detach()
        moments = state.optimizer.state[parameter]
        moments.setdefault("step", torch.tensor(0.0, device=parameter.device))
        for key in MOMENTS:
            tensors[f"{key}/{name}"] = moments.setdefault(key, torch.zeros_like(parameter.detach()))
    return tensors


def read_checkpoint(folder: Path, state: TrainState, processes: Processes) -> None:
    """Continue from a checkpoint, written whole or in shards, at any world size.

    Raises:
        ValueError: when it belongs to another network, keeps other averages, or is damaged.
    """
    saved = CheckpointState.load(folder)
    kept = list(saved.ema_decays or list(state.averages)[:1])
    if kept != list(state.averages):
        raise ValueError(
            f"{folder} keeps averages of {kept}, this run of {list(state.averages)}; repeat its ema_decays"
        )
    for decay, place in average_folders(folder, state.averages).items():
        _read_network(place, state.averages[decay])
    state.optimizer.state.clear()                                               # a checkpoint of step 0 has no moments
    try:
        if (folder / "shards").is_dir():
            _read_tensors(folder / "shards", tensors := _shards(state))
            for parameter in state.model.parameters():
                state.optimizer.state[parameter]["step"] = torch.tensor(
                    saved.optimizer_steps or 0.0, device=parameter.device
                )
        else:
            _read_network(folder / "model", state.model)
            if processes.is_sharded:
                tensors = {key: value for key, value in _shards(state).items() if not key.startswith("model/")}
                if saved.optimizer_steps != 0:                                  # before the first step there are none
                    _read_tensors(folder, tensors)
                    steps = read_tensors(folder / "optimizer.safetensors")
                    for name, parameter in state.model.named_parameters():
                        state.optimizer.state[parameter]["step"] = steps[f"step/{name}"].to(parameter.device)
            else:
                tensors = read_tensors(folder / "optimizer.safetensors")
                torch.set_rng_state(tensors.pop("random/torch"))
                restore_optimizer(state.model, state.optimizer, tensors)
    except (KeyError, SafetensorError, dcp.api.CheckpointException) as error:
        raise ValueError(f"{folder} does not fit this network or is damaged: {first_line(error)}") from error
    state.step, state.omitted, state.faults = saved.step, saved.left_out, saved.faults


def _read_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not dist.is_initialized())


@torch.no_grad()
def _read_network(folder: Path, target: LaMambaUNet) -> None:
    if target.has_adapters:
        _read_lora(folder / LORA_FILE, target)
        return
    saved = load_network(folder)
    if saved.architecture != target.architecture:
        raise ValueError(f"{folder} is a network with another configuration: {saved.architecture}")
    tensors = dict(saved.named_parameters())
    for name, parameter in target.named_parameters():
        put(parameter, tensors[name])


def _read_lora(path: Path, target: LaMambaUNet) -> None:
    """Read the LoRA of a network; its base stays as it is."""
    tensors = read_tensors(path)
    parameters = {name.replace(".default", ""): p for name, p in target.named_parameters() if ".lora_" in name}
    if {name: p.shape for name, p in parameters.items()} != {name: value.shape for name, value in tensors.items()}:
        raise ValueError(f"{path} is a LoRA of another network, or of other layers or another rank than this run's")
    for name, parameter in parameters.items():
        put(parameter, tensors[name])


@torch.no_grad()
def put(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter, or this rank's part of it into a sharded one."""
    parameter.copy_(_split_like(parameter, value.to(parameter.device, parameter.dtype)))


def _split_like(parameter: Tensor, value: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def averages_of(model: LaMambaUNet, decays: tuple[float, ...]) -> dict[float, LaMambaUNet]:
    """Copies of a network, for the averages of its weights, by their decay; weights that are not trained are shared."""
    shared = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return {
        decay: copy.deepcopy(model, {id(parameter): parameter for parameter in shared}).requires_grad_(False).eval()
        for decay in decays
    }
