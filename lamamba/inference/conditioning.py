"""Conditioning computed ahead of sampling, once for each time and label of a run.

A third of the parameters turns (time, label) into the modulations of the blocks. All images of a step share their time,
guided pairs too, and the steps are known beforehand: 64 guided images of 10 classes in 50 steps need 6400 rows of
modulations one by one, but only 550 different ones.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import is_compiled_module
from torch import Tensor

from lamamba.config import Grid
from lamamba.inference.cuda_graph import RecordedNetwork, can_record, record
from lamamba.models.deep_cache import DeepFeatureCache, LaMambaCacheConfig
from lamamba.models.unet import Constants, LaMambaUNet

ROWS_BYTES = 256 << 20
"""Memory for conditioning that is computed ahead; a row of XL takes 0.7 MB in float32."""


class FlowMapInputs:
    """What a flow map must know besides the time: where each step of a run ends, and the guidance scale.

    A step ends where the next one begins, and the last one at the image (0). Other networks take neither.

    Args:
        model: the network.
        timesteps: the times of the run in the order of their use.
    """

    def __init__(self, model: LaMambaUNet, timesteps: Sequence[float]):
        self._is_flow_map = model.config["objective"] == "flow-map"
        self._takes_scale = model.config.get("guidance_range") is not None
        self._ends = dict(zip(timesteps, [*timesteps[1:], 0.0], strict=True))
        self.scale: float | None = None
        """None: the network's lowest."""

    def at(self, times: Sequence[float]) -> dict[str, Tensor]:
        """Arguments of the network for these times: (n,) each.

        Raises:
            ValueError: for a time at which no step begins.
        """
        if not self._is_flow_map:
            return {}
        if lacking := [time for time in times if time not in self._ends]:
            raise ValueError(f"no step of this run begins at timestep {lacking[0]:g}, so where it ends is unknown")
        inputs = {"end_timestep": torch.tensor([self._ends[time] for time in times])}
        if self._takes_scale and self.scale is not None:
            inputs["guidance_scale"] = torch.full((len(times),), self.scale)
        return inputs


class ConditionedNetwork:
    """A network whose conditioning is computed ahead, some steps at a time: called as the network is.

    So is what Triton's kernels read of weights and grid alone. On a GPU, the second pass over batches of one shape is
    recorded as a CUDA graph, which later ones replay; of each kind of pass, one graph is kept.

    Args:
        model: the network; its weights must not change meanwhile, but adapters may come, go and be switched.
        timesteps: the times of the run in the order of their use; a step of a flow map ends at the next one.
        labels: see `prepare`.
        rows_bytes: memory for the rows, by default ROWS_BYTES; one step's rows are always computed together.
        cache: keeps the network's deep features between the steps of a run.
    """

    def __init__(
        self, model: LaMambaUNet, timesteps: Iterable[float], labels: Collection[int] | None = None,
        rows_bytes: int | None = None, cache: LaMambaCacheConfig | None = None,
    ):
        self._model, self._rows_bytes = model, ROWS_BYTES if rows_bytes is None else rows_bytes
        self._times = list(dict.fromkeys(float(t) for t in timesteps))
        self._rows: dict[float, Tensor] = {}
        self._flow_map = FlowMapInputs(model, self._times)
        self._row_bytes = model.condition_outputs * next(model.parameters()).element_size()
        self._cache = None if cache is None else DeepFeatureCache(cache)
        self._recorded: dict[tuple[bool, Sequence[str]], RecordedNetwork] = {}
        """By whether deep features are given and which features are returned."""
        self._ran: set[tuple[tuple[bool, Sequence[str]], torch.Size]] = set()
        self._records = True
        self._constants: tuple[tuple[Grid, torch.dtype, torch.device], Constants] | None = None
        self._adapter_changes = model.adapter_changes
        self._present: frozenset[int] | None = None
        self._set_labels(None if labels is None else frozenset(labels), None)

    def begin(self, images: int | None) -> None:
        """Begin a run over a batch of so many images: nothing is left of the one before. None: unconditional."""
        if self._cache is not None:
            self._cache.reset(images)

    def fits(self, labels: Collection[int]) -> bool:
        """Whether the rows of these labels at all timesteps of the run fit into memory."""
        return len(labels) * len(self._times) * self._row_bytes <= self._rows_bytes

    def set_guidance_scale(self, scale: float) -> None:
        """The scale that a flow map takes as an input in the next calls."""
        if scale != self._flow_map.scale:
            self._flow_map.scale, self._rows = scale, {}

    def prepare(self, labels: Collection[int] | None, mixtures: Tensor | None = None) -> None:
        """Announce the labels of the next calls; rows that exist for the same labels are kept.

        Args:
            labels: the null label among them where calls are guided by it; None for an unconditional network.
            mixtures: (m, num_classes + 1) weights of label embeddings; label num_classes + 1 + i means the i-th.
        """
        present = None if labels is None else frozenset(labels)
        if present != self._present or mixtures is not None:
            self._set_labels(present, mixtures)

    def _set_labels(self, present: frozenset[int] | None, mixtures: Tensor | None) -> None:
        self._present = present if mixtures is None else None                   # mixtures are never kept
        self._labels: Tensor | None = None
        self._row_of_label: Tensor | None = None
        if present is not None:
            distinct, known = sorted(present), self._model.architecture.num_classes + 1
            self._labels = torch.tensor(distinct, device=self._model.device)
            if mixtures is not None:
                weights = torch.cat([torch.eye(known), mixtures.float()])
                self._labels = weights[distinct].to(self._model.device)
                known += len(mixtures)
            rows = torch.zeros(known, dtype=torch.int64)
            rows[distinct] = torch.arange(len(distinct))
            self._row_of_label = rows.to(self._model.device)
        self._rows_per_step = 1 if self._labels is None else max(1, len(self._labels))
        self._steps_ahead = max(1, self._rows_bytes // (self._row_bytes * self._rows_per_step))
        self._rows = {}

    def __call__(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None) -> Tensor:
        """The network's output for images that share one time and have some of the announced labels.

        The network computes in its own precision; the output comes back in that of x.
        """
        self._follow_adapters()
        rows = self._rows_at(float(timestep[0]))
        if class_labels is None:
            chosen = rows.expand(x.shape[0], -1)
        else:
            assert self._row_of_label is not None
            chosen = rows[self._row_of_label[class_labels]]
        forward = functools.partial(self._run, x.to(chosen.dtype), chosen)
        if self._cache is None:
            return forward().to(x.dtype)
        return self._cache.run(forward, float(timestep[0]), x.shape[0]).to(x.dtype)

    def _follow_adapters(self) -> None:
        """Drop what was computed or recorded before the network's adapters were changed."""
        if self._adapter_changes != self._model.adapter_changes:
            self._adapter_changes, self._rows, self._recorded = self._model.adapter_changes, {}, {}
            self._constants = None
            if self._cache is not None:
                self._cache.restart()

    def _run(
        self, x: Tensor, conditioning: Tensor, *, deep_features: Tensor | None = None,
        return_features: Sequence[str] = (),
    ) -> Any:
        constants, kind = self._constants_for(x), (deep_features is not None, return_features)
        if self._records and can_record(x) and (kind, x.shape) in self._ran:
            recorded = self._recorded.get(kind)
            if recorded is None or not recorded.takes(x, conditioning):
                recorded = None                                                 # its memory is free for the next one
                self._recorded.pop(kind, None)
                recorded = record(self._model, x, conditioning, deep_features, return_features, constants)
                self._records = recorded is not None
            if recorded is not None:
                self._recorded[kind] = recorded
                return recorded(x, conditioning, deep_features)
        self._ran.add((kind, x.shape))
        return self._model(
            x, None, conditioning=conditioning, constants=constants, deep_features=deep_features,
            return_features=return_features,
        )

    def _constants_for(self, x: Tensor) -> Constants | None:
        """What the network computes from weights and grid alone; None where gradients are computed."""
        if torch.is_grad_enabled():
            return None
        made_for = self._model.run_grid, x.dtype, x.device
        if self._constants is None or self._constants[0] != made_for:
            self._constants = made_for, self._model.make_constants(x)
        return self._constants[1]

    def _rows_at(self, time: float) -> Tensor:
        if time not in self._rows:
            times, n = [time], self._rows_per_step                              # a time that was not announced
            if time in self._times:
                first = self._times.index(time) // self._steps_ahead * self._steps_ahead
                times = self._times[first : first + self._steps_ahead]
            labels = None if self._labels is None else torch.cat([self._labels] * len(times))
            inputs = {"timestep": torch.tensor(times), **self._flow_map.at(times)}
            inputs = {name: values.to(self._model.device).repeat_interleave(n) for name, values in inputs.items()}
            rows = self._model.condition(inputs.pop("timestep"), labels, **inputs)
            self._rows = dict(zip(times, rows.split(n), strict=True))
        return self._rows[time]


class UnpreparedNetwork:
    """A network that computes its conditioning in every call, because hooks move its weights or it is compiled."""

    def __init__(self, model: Any, timesteps: Iterable[float] = (), cache: LaMambaCacheConfig | None = None):
        self._model, self._adapter_changes = model, model.adapter_changes
        self._flow_map = FlowMapInputs(model, list(dict.fromkeys(float(t) for t in timesteps)))
        self._cache = None if cache is None else DeepFeatureCache(cache)

    def set_guidance_scale(self, scale: float) -> None:
        """The scale that a flow map takes as an input in the next calls."""
        self._flow_map.scale = scale

    def begin(self, images: int | None) -> None:
        """As that of ConditionedNetwork."""
        if self._cache is not None:
            self._cache.reset(images)

    def fits(self, labels: Collection[int]) -> bool:
        """True: nothing is kept."""
        return True

    def prepare(self, labels: Collection[int] | None, mixtures: Tensor | None = None) -> None:
        """Nothing is computed ahead."""
        if mixtures is not None:
            raise ValueError("a network that is compiled or offloaded by hooks cannot interpolate between classes")

    def __call__(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None) -> Tensor:
        inputs = {name: values.to(x.device).expand(len(x)) for name, values in self._flow_map.at(
            [float(timestep[0])]).items()}
        forward = functools.partial(self._model, x.to(self._model.dtype), timestep.to(x.device), class_labels, **inputs)
        if self._cache is None:
            return forward().to(x.dtype)
        if self._adapter_changes != self._model.adapter_changes:                # features of other weights
            self._adapter_changes = self._model.adapter_changes
            self._cache.restart()
        return self._cache.run(forward, float(timestep[0]), x.shape[0]).to(x.dtype)


def is_hooked(network: Any) -> bool:
    """Whether hooks of accelerate or diffusers bring the network's weights to the device when they are needed."""
    return hasattr(network, "_hf_hook") or hasattr(network, "_diffusers_hook")


def conditioned(
    network: Any, timesteps: Iterable[float], cache: LaMambaCacheConfig | None = None
) -> ConditionedNetwork | UnpreparedNetwork:
    """The network with its conditioning computed ahead wherever that is possible.

    Args:
        network: a LaMambaUNet.
        timesteps: those of the run.
        cache: how its deep features are kept between steps; by default as it was enabled for the network itself.

    Raises:
        ValueError: when the run is too short for the cache.
    """
    timesteps = list(timesteps)
    enabled = getattr(network, "_cache_config", None)
    if cache is None and isinstance(enabled, LaMambaCacheConfig):
        cache = enabled
    if cache is not None:
        cache.check_run(len(timesteps))
    if is_hooked(network) or is_compiled_module(network):
        return UnpreparedNetwork(network, timesteps, cache)
    return ConditionedNetwork(network, timesteps, cache=cache)
