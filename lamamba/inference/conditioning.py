"""What a sampling run makes of its times and labels, made once for the whole run.

A network reads a third of its parameters to turn (time, label) into the vectors that tell its blocks what to do. All
images of a step share their time, guided pairs share it too, and the steps are known beforehand: 64 guided images of 10
classes in 50 steps are 6400 rows one by one, but only 550 different ones.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lamamba.inference.cuda_graph import RecordedNetwork, is_small, record
from lamamba.models.unet import LaMambaUNet

ROWS_BYTES = 256 << 20
"""Memory for conditioning that is made ahead; a row of XL takes 0.7 MB in float32."""


class ConditionedNetwork:
    """A network whose conditioning is made ahead, some steps at a time: called as the network is.

    On a GPU, passes over small batches are recorded as a CUDA graph and replayed.

    Args:
        model: the network; its weights must not change meanwhile.
        timesteps: the times of the run in the order of their use.
        labels: every label of the run, "no class" among them where it is guided; None for an unconditional network.
        rows_bytes: memory for what is made ahead; one step's rows are always made together.
        mixtures: (m, num_classes + 1) places between labels, as weights of their embeddings; label num_classes + 1 + i
            then means the i-th of them.
    """

    def __init__(
        self, model: LaMambaUNet, timesteps: Iterable[float], labels: Iterable[int] | None,
        rows_bytes: int = ROWS_BYTES, mixtures: Tensor | None = None,
    ):
        self._model = model
        self._times = list(dict.fromkeys(float(t) for t in timesteps))
        self._labels: Tensor | None = None
        self._row_of_label: Tensor | None = None
        if labels is not None:
            distinct = sorted(set(labels))
            known = model.architecture.num_classes + 1
            self._labels = torch.tensor(distinct, device=model.device)
            if mixtures is not None:
                weights = torch.cat([torch.eye(known), mixtures.float()])
                self._labels = weights[distinct].to(model.device)
                known += len(mixtures)
            rows = torch.zeros(known, dtype=torch.int64)
            rows[distinct] = torch.arange(len(distinct))
            self._row_of_label = rows.to(model.device)
        self._rows_per_step = 1 if self._labels is None else len(self._labels)
        row_bytes = model.condition_outputs * next(model.parameters()).element_size()
        self._steps_ahead = max(1, rows_bytes // (row_bytes * self._rows_per_step))
        self._made: dict[float, Tensor] = {}
        self._recorded: RecordedNetwork | None = None
        self._records = True

    def __call__(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None) -> Tensor:
        """The network's output for images that share one time and have some of the run's labels.

        The network computes in its own precision; the output comes back in that of x.
        """
        rows = self._rows_at(float(timestep[0]))
        if class_labels is None:
            chosen = rows.expand(x.shape[0], -1)
        else:
            assert self._row_of_label is not None
            chosen = rows[self._row_of_label[class_labels]]
        return self._run(x.to(chosen.dtype), chosen).to(x.dtype)

    def _run(self, x: Tensor, conditioning: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and is_small(x, self._model):
            if self._recorded is None or not self._recorded.takes(x, conditioning):
                self._recorded = record(self._model, x, conditioning) if self._records else None
                self._records = self._recorded is not None
            if self._recorded is not None:
                return self._recorded(x, conditioning)
        return self._model(x, None, conditioning=conditioning)

    def _rows_at(self, time: float) -> Tensor:
        if time not in self._made:
            times, n = [time], self._rows_per_step                              # a time that nobody announced
            if time in self._times:
                first = self._times.index(time)
                times = self._times[first : first + self._steps_ahead]
            labels = None if self._labels is None else torch.cat([self._labels] * len(times))
            rows = self._model.condition(torch.tensor(times, device=self._model.device).repeat_interleave(n), labels)
            self._made = dict(zip(times, rows.split(n), strict=True))
        return self._made[time]
