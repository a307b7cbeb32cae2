"""Teachers, frozen networks: of a distillation (LAPTOP-Diff, arXiv 2404.11098), and of a flow map's velocity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lamamba.config import STAGES, UNetConfig
from lamamba.diffusion.distillation import feature_losses, output_loss
from lamamba.diffusion.flow_map import FlowFromNoise
from lamamba.diffusion.schedule import NUM_TIMESTEPS, NoiseSchedule, per_image
from lamamba.options.training import DistillOptions
from lamamba.runs.metadata import ModelMetadata, check_same_data
from lamamba.runs.model import fingerprint, open_network
from lamamba.utils.files import attribute_differences


class Teacher:
    """A frozen network whose output, and features of whose stages, a student learns.

    Args:
        options: with a teacher.
        student: the network that learns from it.
        metadata: of the student.
        device: where the teacher runs; it is whole on every rank.

    Raises:
        FileNotFoundError: when there is no such teacher.
        ValueError: when its inputs, classes, data, objective or features are not the student's.
    """

    def __init__(self, options: DistillOptions, student: UNetConfig, metadata: ModelMetadata, device: torch.device):
        assert options.teacher is not None
        network, saved = open_network(options.teacher)
        _check_fits(network.architecture, student, options)
        check_same_data(f"distill.teacher {options.teacher}", saved, "this run", metadata.label_names, metadata)
        self.sha256 = fingerprint(network)
        self._options, self._channels = options, student.in_channels
        self._network = network.to(device).requires_grad_(False).eval()
        self._points = [STAGES.index(stage) for stage in options.stages or STAGES]

    @property
    def needs_features(self) -> bool:
        """Whether the student's features are compared, too."""
        return self._options.features != "none"

    def terms(
        self, xt: Tensor, t: Tensor, labels: Tensor | None, output: Tensor, features: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """The distillation losses of each sample by name, unweighted: (b,) each.

        Args:
            xt, t, labels: the student's inputs; labels as they were dropped.
            output: the student's.
            features: the student's, of all stages; empty where they are not compared.
        """
        with torch.no_grad():
            found = self._network(xt, t, labels, return_features=self.needs_features)
        teacher_output, teacher_features = found if self.needs_features else (found, ())
        c = self._channels                                                      # without a learned variance
        terms = {"output": output_loss(output[:, :c], teacher_output[:, :c])}
        if self.needs_features:
            losses = feature_losses(
                [features[point] for point in self._points], [teacher_features[point] for point in self._points],
                self._options.features,
            )
            terms["feature"] = losses.sum(0)
        return terms


def _check_fits(teacher: UNetConfig, student: UNetConfig, options: DistillOptions) -> None:
    names = ["objective", "in_channels", "num_classes", "token_grid", "patch_size"]
    if options.features != "none":
        names.append("width")                                                   # of the features
    if differences := attribute_differences(teacher, student, names):
        hint = "; another width goes with distill.features=\"none\"" if teacher.width != student.width else ""
        raise ValueError(
            f"distill.teacher {options.teacher} does not fit this run's network ({'; '.join(differences)}){hint}"
        )


class VelocityTeacher:
    """A frozen network whose velocity, guided by the null label, a flow map learns.

    Args:
        options: with a teacher: a network of flow, noise or v; the last two as the velocity of the straight path.
        student: the flow map.
        metadata: of the student.
        device: where the teacher runs; it is whole on every rank.

    Raises:
        FileNotFoundError: when there is no such teacher.
        ValueError: when its inputs, classes, data or objective do not fit.
    """

    def __init__(self, options: DistillOptions, student: UNetConfig, metadata: ModelMetadata, device: torch.device):
        assert options.teacher is not None
        network, saved = open_network(options.teacher)
        config = network.architecture
        differences = attribute_differences(config, student, ("in_channels", "num_classes", "input_size"))
        if config.objective == "flow-map":
            differences.append("objective: 'flow-map' there, and a velocity comes from flow, noise or v")
        if differences:
            raise ValueError(
                f"distill.teacher {options.teacher} does not fit this run's flow map ({'; '.join(differences)})")
        check_same_data(f"distill.teacher {options.teacher}", saved, "this run", metadata.label_names, metadata)
        self.sha256 = fingerprint(network)
        self._null_label = config.num_classes
        self._network = network.to(device).requires_grad_(False).eval()
        self._conversion = None if config.objective == "flow" else FlowFromNoise(NoiseSchedule(config.objective))

    @torch.no_grad()
    def velocity(self, x: Tensor, t: Tensor, labels: Tensor | None, scale: Tensor | None) -> Tensor:
        """The velocity, uncond + scale (cond - uncond): (b, c, h, w).

        Args:
            x: (b, c, h, w) on the straight path.
            t: (b,) in 0 .. 1.
            labels: (b,); None for an unconditional network.
            scale: (b,) guidance scales; None for no guidance.
        """
        if scale is None or labels is None:
            return self._velocity(x, t, labels)
        both = torch.cat([labels, torch.full_like(labels, self._null_label)])
        cond, uncond = self._velocity(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return uncond + per_image(scale, x) * (cond - uncond)

    def _velocity(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        if self._conversion is None:
            return self._network(x, t * NUM_TIMESTEPS, labels)
        y, timestep = self._conversion.inputs(x, t)
        return self._conversion.velocity(self._network(y, timestep, labels), y, t)
